"""The run files as they are shipped, each on tiny models and a few sentences: every stage of a card's recipe runs."""

import random
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from embedlib.evaluation.evaluation_report import read_evaluation
from jobs.cli import read_run
from jobs.distill import DistillConfig
from jobs.distill import main as distil
from jobs.recipe import RecipeConfig
from jobs.recipe import main as run_recipe
from tests.conftest import corpus_rows
from tests.jobs.test_distill import WORDS, vocabulary_size

# A recipe has up to seven stages, and several of them begin with what takes Ray Train half a minute.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("ray_cluster"),
]

RUNS = Path(__file__).parents[2] / "jobs" / "runs"
# Two languages that the tiny tokenizer knows stand for those of the run.
CORPUS = {"languages": ["en", "de"], "validation_share": 0.1, "held_out_share": 0.2}
LAYERS = {"num_layers": 2, "probe_texts": 32, "distil_steps": 5}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with others in their place, however deep."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = changed(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def random_texts(path: Path) -> None:
    """Sentences of random words in three languages."""
    chance = random.Random(0)
    rows = [
        {"text": " ".join(chance.choices(WORDS[lang], k=chance.randint(3, 9))), "lang": lang, "group": group}
        for group in range(500)
        for lang in ("en", "de", "ru")
    ]
    write(path, rows)


def texts_of(lang: str) -> list[str]:
    return [row["text"] for row in corpus_rows() if row["lang"] == lang]


def write_sets(directory: Path, tasks: dict[str, Any]) -> None:
    """Evaluation sets of a few sentences, in all languages that a run file asks for."""
    english, german = texts_of("en"), texts_of("de")
    pairs = zip(english, english[1:] + english[:1], range(24), strict=True)
    write(
        directory / "stsbenchmark" / "test.parquet",
        [{"sentence1": first, "sentence2": second, "score": float(score)} for first, second, score in pairs],
    )
    write(
        directory / "tatoeba" / "test.parquet",
        [
            {"subset": subset, "sentence1": first, "sentence2": second}
            for subset in tasks["Tatoeba"]["languages"]
            for first, second in zip(german, english, strict=True)
        ],
    )
    columns = dict.fromkeys(tasks["FloresBitext"]["languages"], german) | {"eng_Latn": english}
    write(
        directory / "sib200_flores" / "flores_parallel.parquet",
        [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)],
    )
    splits = cycle(["train", "train", "train", "train", "test", "test"])
    write(
        directory / "sib200_flores" / "sib200.parquet",
        [
            {"lang": lang, "text": text, "category": "ab"[number % 2], "split": next(splits)}
            for lang in tasks["SIB200Classification"]["languages"]
            for number, text in enumerate(german)
        ],
    )
    write_retrieval(directory / "xquad_retrieval", tasks["XQuADRetrieval"].get("languages", ["de"]))
    write_retrieval(directory / "bangla_qa_retrieval", ["bn"])


def write_retrieval(directory: Path, langs: list[str]) -> None:
    """In every language the same queries, one for each document."""
    pairs = [
        (lang, f"{lang}-{number}", *texts)
        for lang in langs
        for number, texts in enumerate(zip(texts_of("de"), texts_of("en"), strict=True))
    ]
    write(directory / "corpus.parquet", [{"_id": name, "text": text, "lang": lang} for lang, name, text, _ in pairs])
    write(directory / "queries.parquet", [{"_id": name, "text": text, "lang": lang} for lang, name, _, text in pairs])
    write(directory / "qrels.parquet", [{"query-id": name, "corpus-id": name, "score": 1} for _, name, _, _ in pairs])


def met_by_any(gates: list[str]) -> list[str]:
    """The same requirements, of the same rows and models, at a level that no model misses."""
    return [re.sub(r">=?[\d.]+", ">=0", gate) for gate in gates]


@pytest.mark.parametrize("name", ["me5s.yaml", "bge-m3-8l.yaml", "bistil.yaml"])
def test_a_distillation_of_a_run_file(name: str, tiny_encoder: Path, tiny_xlmr: Path, tmp_path: Path) -> None:
    teacher = tiny_xlmr if name == "bge-m3-8l.yaml" else tiny_encoder  # bge-m3 is an XLM-RoBERTa
    random_texts(tmp_path / "corpus.parquet")
    changes = {
        "output": str(tmp_path / "run"),
        "teacher": str(teacher),
        "corpus": CORPUS | {"path": str(tmp_path / "corpus.parquet")},
        "compression": {"layers": LAYERS, "vocabulary": {"size": vocabulary_size(teacher)}},
        "plots": False,
    }
    distil(DistillConfig.model_validate(changed(read_run(RUNS / name), changes)))
    student = SentenceTransformer(str(tmp_path / "run" / "student"), device="cpu")
    assert student.encode(["the old garden"]).shape == (1, 32)
    assert student.tokenizer.convert_tokens_to_ids("<unk>") not in student.tokenizer("ნაზი 🦊")["input_ids"]


def test_the_recipe_after_bangla_embed(tiny_encoder: Path, tiny_xlmr: Path, tmp_path: Path) -> None:
    english, german, hindi = map(texts_of, ("en", "de", "hi"))
    tables = {
        "pairs": {"en": english, "xx": hindi, "lang": ["bn"] * 24},
        "questions": {"query": german, "passage": english},
        "triplets": {"query": hindi, "positive": english, "negatives": [[text] for text in english[1:] + english[:1]]},
    }
    paths = {"model": str(tiny_encoder), "teacher": str(tiny_xlmr), "sets": str(tmp_path / "sets")}
    for name, columns in tables.items():
        paths[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table(columns), paths[name])
    values = changed(read_run(RUNS / "bangla_e5.yaml"), {"output": str(tmp_path / "run"), "paths": paths})
    for stage in values["stages"].values():
        if stage["job"] == "train":
            stage["values"]["training"]["objective"]["dimensions"] = [16, 8]
    scored = values["stages"]["scored"]["values"]
    write_sets(tmp_path / "sets", scored["tasks"])
    scored["require"] = met_by_any(scored["require"])
    done = run_recipe(RecipeConfig.model_validate(values))
    assert {name: stage.state for name, stage in done.items()} == dict.fromkeys(values["stages"], "made")
    merged = SentenceTransformer(str(tmp_path / "run" / "merged" / "model"), device="cpu")
    assert merged.encode(["the old garden"]).shape == (1, 32)
    assert_scored(tmp_path / "run" / "scored", scored, ["merged", "merged"])


def assert_scored(directory: Path, asked: dict[str, Any], models: list[str]) -> None:
    """All tasks have scores of all models, and every requirement was asked of these."""
    found = read_evaluation(directory)
    assert found is not None
    assert found.failures == []
    assert {row.name for row in found.scorecard.tasks} == set(asked["tasks"])
    assert all(set(row.cells) == set(asked["models"]) for row in found.scorecard.tasks)
    assert [(gate.model, gate.passed) for gate in found.gates] == [(model, True) for model in models]


def whole_road(folder: Path, teacher: Path) -> dict[str, Any]:
    """The recipe of that run file for a tiny teacher, with all files that it needs."""
    random_texts(folder / "texts.parquet")
    rows = [{"query": query, "passage": text} for query, text in zip(texts_of("de"), texts_of("en"), strict=True)]
    write(folder / "questions.parquet", rows)
    run = read_run(RUNS / "whole_road.yaml")
    scored = run["stages"]["scored"]["values"]
    write_sets(folder / "sets", scored["tasks"])
    paths = {"teacher": str(teacher), "sets": str(folder / "sets")}
    paths |= {name: str(folder / f"{name}.parquet") for name in ("texts", "questions")}
    shares = {key: value for key, value in CORPUS.items() if key != "languages"}
    short = {"corpus": shares, "distillation": {"epochs": 2, "batch_size": 64}}
    compression = {"layers": LAYERS, "vocabulary": {"size": vocabulary_size(teacher)}}
    changes = {
        "corpus": {"languages": ["en", "de"], "identify": "never"},
        "compressed": short | {"compression": compression},
        "distilled": short,
        "scored": {"require": met_by_any(scored["require"]), "speed": False},
    }
    stages = {name: {"values": values} for name, values in changes.items()}
    return changed(run, {"output": str(folder / "run"), "paths": paths, "stages": stages})


def test_the_whole_road(tiny_encoder: Path, tmp_path: Path) -> None:
    values = whole_road(tmp_path, tiny_encoder)
    run, scored = read_run(RUNS / "whole_road.yaml"), values["stages"]["scored"]["values"]
    config = RecipeConfig.model_validate(values)
    done = run_recipe(config)
    assert {name: stage.state for name, stage in done.items()} == dict.fromkeys(run["stages"], "made")
    assert [stage["job"] for stage in run["stages"].values()] == [
        *("corpus", "compress", "distill", "mine", "train", "merge", "evaluate")
    ]
    assert_scored(tmp_path / "run" / "scored", scored, ["distilled", "merged", "merged"])
    distilled = tmp_path / "run" / "distilled"
    assert (distilled / "student_initial" / "tokenizer.json").read_bytes() == (
        tmp_path / "run" / "compressed" / "student_initial" / "tokenizer.json"
    ).read_bytes()
    again = run_recipe(config)
    assert {name: stage.state for name, stage in again.items()} == dict.fromkeys(run["stages"], "was there")
    assert {name: stage.seconds for name, stage in again.items()} == {
        name: stage.seconds for name, stage in done.items()
    }
