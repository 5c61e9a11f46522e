"""mteb's scores through our encoder: equal to a second path, made of items, kept by what decides them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SentenceEvaluator,
    TranslationEvaluator,
)

from embedlib.artifact import model_fingerprint
from embedlib.encoder import Encoder
from embedlib.errors import DataError
from embedlib.evaluation.mteb_encoder import CachedEncoder, VectorCache, key_of, prompt_for
from embedlib.evaluation.scoring import Score, evaluate_task
from embedlib.evaluation.tasks import TaskConfig, load_task
from embedlib.model_directory import read_prompts
from tests.conftest import corpus_rows

KINDS = ["sts", "pair_classification", "bitext", "classification", "clustering", "retrieval", "reranking"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small evaluation set of every type: German and English sentences, alike by noun, predicate or both."""
    root = tmp_path_factory.mktemp("sets")
    rows = {lang: [row for row in corpus_rows() if row["lang"] == lang] for lang in ("de", "en")}
    texts = {lang: [row["text"] for row in each] for lang, each in rows.items()}
    nouns = [row["group"] // 4 for row in rows["en"]]
    shifted = texts["en"][1:] + texts["en"][:1]
    same = [float(a == b) for a, b in zip(nouns, nouns[1:] + nouns[:1], strict=True)]
    pairs = {"sentence1": texts["en"], "sentence2": shifted}
    ids = [f"d{number}" for number in range(24)]
    tables = {
        "sts": {"test": pairs | {"score": [same[row] + row / 100 for row in range(24)]}},
        "pair_classification": {"test": pairs | {"label": [int(each) for each in same]}},
        "bitext": {"test": {"sentence1": texts["de"], "sentence2": texts["en"]}},
        "classification": {
            "test": {"text": texts["de"], "label": nouns},
            "train": {"text": texts["en"], "label": nouns},
        },
        "clustering": {"test": {"text": texts["en"], "label": nouns}},
        "retrieval": {
            "corpus": {"_id": ids, "text": texts["en"]},
            "queries": {"_id": ["q" + each for each in ids], "text": texts["de"]},
            "qrels": {"query-id": ["q" + each for each in ids], "corpus-id": ids},
        },
        "reranking": {
            "test": {
                "query": texts["de"],
                "positive": [[text] for text in texts["en"]],
                "negative": [[shifted[row], shifted[(row + 5) % 24]] for row in range(24)],
            }
        },
    }
    for kind, files in tables.items():
        (root / kind).mkdir()
        for name, columns in files.items():
            pq.write_table(pa.table(columns), root / kind / f"{name}.parquet")
    return root


def encoder_of(model: Path, cache: Path, load: Callable[[], Encoder] | None = None) -> CachedEncoder:
    load = load or (lambda: Encoder.load(model, torch.device("cpu"), torch.float32))
    return CachedEncoder(load, read_prompts(model), VectorCache(cache), "tiny", model_fingerprint(model))


def score(kind: str, sets: Path, encoder: CachedEncoder, directory: Path) -> list[Score]:
    return evaluate_task(encoder, load_task(kind, TaskConfig(type=kind, path=kind), sets), directory)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_items_make_up_mtebs_score(kind: str, sets: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    (found,) = score(kind, sets, encoder_of(tiny_encoder, tmp_path / "vectors"), tmp_path / "scores")
    assert 0 <= found.value <= 100
    assert len(found.replicates) == (0 if kind == "clustering" else 500)
    path = next((tmp_path / "scores" / "items").glob("*.npz"), None)
    if path is None:
        assert kind == "clustering"  # its samples are of the same texts, so they say nothing of others
        return
    with np.load(path) as kept:
        from embedlib.evaluation.bootstrap import Items

        items = Items(str(kept["statistic"]), kept["values"], kept.get("gold"))  # type: ignore[arg-type]
        assert ("clusters" in kept) == (kind in ("retrieval", "reranking"))
    whole = items.score(np.arange(len(items.values)))
    assert 100 * whole == pytest.approx(found.value, abs=1e-3)


def second_path(kind: str, sets: Path, model: Path) -> float:
    """The score of sentence-transformers' own evaluators; only that for retrieval puts prompts before the texts."""

    def texts(file: str, column: str, prefix: str = "query: ") -> list[str]:
        return [prefix + text for text in pq.read_table(sets / kind / f"{file}.parquet")[column].to_pylist()]

    evaluator: SentenceEvaluator
    if kind == "retrieval":
        ids = [f"d{number}" for number in range(24)]
        queries = dict(zip(["q" + each for each in ids], texts("queries", "text", ""), strict=True))
        corpus = dict(zip(ids, texts("corpus", "text", ""), strict=True))
        evaluator = InformationRetrievalEvaluator(queries, corpus, {"q" + each: {each} for each in ids})
    elif kind == "bitext":
        evaluator = TranslationEvaluator(texts("test", "sentence1"), texts("test", "sentence2"))
    else:
        gold = pq.read_table(sets / kind / "test.parquet")["score"].to_pylist()
        evaluator = EmbeddingSimilarityEvaluator(texts("test", "sentence1"), texts("test", "sentence2"), gold)
    found = evaluator(SentenceTransformer(str(model), device="cpu"))
    assert isinstance(found, dict)
    return found[{"retrieval": "cosine_ndcg@10", "bitext": "src2trg_accuracy", "sts": "spearman_cosine"}[kind]]


@pytest.mark.parametrize(
    ("kind", "metric"), [("sts", "main_score"), ("bitext", "accuracy"), ("retrieval", "main_score")]
)
def test_scores_are_those_of_sentence_transformers_own_evaluators(
    kind: str, metric: str, sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    score(kind, sets, encoder_of(tiny_encoder, tmp_path / "vectors"), tmp_path / "scores")
    (path,) = (tmp_path / "scores").glob(f"results/embedlib__tiny/*/{kind}.json")
    (row,) = json.loads(path.read_text())["scores"]["test"]
    assert row[metric] == pytest.approx(second_path(kind, sets, tiny_encoder), abs=1e-3)


def test_finished_scores_need_no_model_and_half_finished_vectors_are_kept(
    sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    def no_model() -> Encoder:
        raise AssertionError("loaded")

    encoder = encoder_of(tiny_encoder, tmp_path / "vectors")
    first = score("bitext", sets, encoder, tmp_path / "scores")
    assert encoder.kept < encoder.texts
    idle = encoder_of(tiny_encoder, tmp_path / "vectors", no_model)
    assert score("bitext", sets, idle, tmp_path / "scores") == first
    assert score("bitext", sets, idle, tmp_path / "elsewhere") == first  # the texts have vectors
    assert idle.kept == idle.texts == encoder.texts


def test_the_fingerprint_tells_a_damaged_model_from_a_renamed_one(tiny_encoder: Path, tmp_path: Path) -> None:
    renamed = shutil.copytree(tiny_encoder, tmp_path / "renamed")
    assert model_fingerprint(renamed) == model_fingerprint(tiny_encoder)
    (renamed / "evaluation.json").write_text('{"retention": {}}')
    (renamed / "README.md").write_text("# told of it")
    assert model_fingerprint(renamed) == model_fingerprint(tiny_encoder)
    damaged = shutil.copytree(tiny_encoder, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.3.attention.self.query.weight"))
    weights[name] = weights[name][::-1].copy()
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    prompted = shutil.copytree(tiny_encoder, tmp_path / "prompted")
    config = prompted / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace("query: ", "question: "))
    assert len({model_fingerprint(each) for each in (tiny_encoder, damaged, prompted)}) == 3


def test_a_vector_that_is_not_finite_names_its_text(tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_encoder, torch.device("cpu"), torch.float32)
    encoder.encode = lambda texts, prompt: np.full((len(texts), 32), np.nan, np.float32)  # type: ignore[assignment, method-assign]
    with pytest.raises(DataError, match="2 of 2 texts a vector that is not finite; the first: 'one'"):
        encoder_of(tiny_encoder, tmp_path / "vectors", lambda: encoder).embed(["one", "two"], None)


def test_prompts_belong_to_the_key_and_suit_the_task(sets: Path) -> None:
    assert key_of("query: ", "a") != key_of("", "query: a")
    from mteb.types import PromptType

    kinds: list[Any] = ["sts", "retrieval"]
    sts, retrieval = (load_task(kind, TaskConfig(type=kind, path=kind), sets).metadata for kind in kinds)
    e5 = {"query": "query: ", "document": "passage: "}
    assert prompt_for(e5, retrieval, PromptType.document) == "document"
    assert prompt_for({"passage": "passage: "}, retrieval, PromptType.document) == "passage"
    assert prompt_for(e5, retrieval, PromptType.query) == "query"
    assert prompt_for(e5, sts, None) == "query"
    assert prompt_for({}, sts, None) is None
    instructed = {"query": "Given a question, retrieve passages: ", "document": ""}
    assert prompt_for(instructed, retrieval, PromptType.query) == "query"
    assert prompt_for(instructed, sts, None) is None
    assert prompt_for(instructed | {"STS": "Compare: "}, sts, None) == "STS"


def test_languages_that_translate_each_other_are_resampled_together(
    sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(sets / "sts" / "test.parquet")
    lang = pa.array(["de"] * len(rows) + ["fr"] * len(rows))
    pq.write_table(pa.concat_tables([rows, rows]).append_column("lang", lang), tmp_path / "both.parquet")
    task = load_task("Both", TaskConfig(type="sts", path="both.parquet"), tmp_path)
    de, fr = evaluate_task(encoder_of(tiny_encoder, tmp_path / "vectors"), task, tmp_path / "scores")
    assert de.replicates == fr.replicates


def test_pairs_of_languages_that_mteb_scores_at_once_have_their_own_intervals(
    sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(sets / "bitext" / "test.parquet")
    columns = {"de": rows["sentence1"], "en": rows["sentence2"]}
    pq.write_table(pa.table(columns), tmp_path / "columns.parquet")
    config = TaskConfig(type="bitext", path="columns.parquet", pivot="en")
    encoder = encoder_of(tiny_encoder, tmp_path / "vectors")
    (alone,) = evaluate_task(encoder, load_task("Pair", config, tmp_path), tmp_path / "alone")
    task = load_task("Pair", config, tmp_path)
    # As mteb's own FLORES: one table with a column a language.
    task.parallel_subsets = True
    task.dataset = {"test": Dataset.from_dict({name: column.to_pylist() for name, column in columns.items()})}
    (parallel,) = evaluate_task(encoder, task, tmp_path / "parallel")
    assert parallel.subset == "de-en"
    assert len(parallel.replicates) == 500
    assert parallel == alone


def test_a_cache_is_shared_and_equal_texts_cost_once(tmp_path: Path) -> None:
    one, other = VectorCache(tmp_path), VectorCache(tmp_path)
    keys = [key_of("", text) for text in ("a", "b", "a")]
    assert one.missing(keys) == [0, 1]
    one.add(keys[:2], np.array([[1, 2], [3, 4]], np.float32))
    other.refresh()
    assert other.missing(keys) == []
    assert other.get(keys).tolist() == [[1, 2], [3, 4], [1, 2]]


def test_scores_are_written_as_mteb_writes_them(sets: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    from mteb.results import TaskResult

    (found,) = score("sts", sets, encoder_of(tiny_encoder, tmp_path / "vectors"), tmp_path / "scores")
    (path,) = (tmp_path / "scores").glob("results/embedlib__tiny/*/sts.json")
    assert path.parent.name == model_fingerprint(tiny_encoder)
    assert 100 * TaskResult.from_disk(path).get_score() == pytest.approx(found.value, abs=1e-3)
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())[0]["metric"] == "cosine_spearman"
