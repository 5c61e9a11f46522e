"""Mining on a real local cluster: what is found, whatever the shards, the resume, the gate and the refusals."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from embedlib.encoder import Encoder
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.schemas import vector_column, vectors_of
from jobs.metrics import NOTE
from jobs.mine import MineConfig, mine, warning_of
from jobs.miner import runs
from jobs.parts import part_name
from tests.jobs.processes import kill_ray_workers

pytestmark = pytest.mark.ray

RULE = {"max_negatives": 3, "relative_margin": 0.01, "range_max": 20}


@pytest.fixture(scope="module")
def pairs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each noun and predicate in English with its German and French translations: 48 pairs of 24 queries, and two that
    cannot be used."""
    rows = pq.read_table(tiny_corpus).to_pylist()
    texts = {(row["lang"], row["group"]): row["text"] for row in rows}
    pairs = [(texts["en", group], texts[lang, group], lang) for lang in ("de", "fr") for group in range(24)]
    pairs += [("a query", None, "de"), ("  ", "eine Antwort", "de")]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.table(dict(zip(("query", "positive", "lang"), zip(*pairs, strict=True), strict=True))), path)
    return path


def config_for(output: Path, model: Path, pairs: Path, corpus: Path | None, **changes: Any) -> MineConfig:
    values = {"pairs": str(pairs), "corpus": str(corpus) if corpus else None, "output": str(output)}
    values |= {"model": str(model), "rule": RULE, "backend": "torch-float32", "vector_dtype": "float32"}
    return MineConfig.model_validate(values | {"queries_per_block": 10} | changes)


@pytest.fixture(scope="module")
def whole(
    ray_cluster: None, tiny_encoder: Path, tiny_corpus: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What an undisturbed run on one shard makes."""
    output = tmp_path_factory.mktemp("mined") / "whole"
    mine(config_for(output, tiny_encoder, pairs, tiny_corpus))
    return output


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A directory where everything is embedded, and nothing mined."""
    return with_vectors_of(whole, tmp_path / "mined")


def with_vectors_of(whole: Path, output: Path) -> Path:
    shutil.copytree(whole / "work" / "vectors", output / "work" / "vectors")
    return output


def rows_of(output: Path) -> list[dict[str, Any]]:
    table = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_negatives_are_those_of_brute_force_whatever_the_shards(
    whole: Path, output: Path, tiny_encoder: Path, tiny_corpus: Path, pairs: Path
) -> None:
    mine(config_for(output, tiny_encoder, pairs, tiny_corpus, search={"shards": 3, "block_rows": 50}))
    found = rows_of(whole)
    assert rows_of(output) == found
    assert [row["id"] for row in found] == list(range(24))

    corpus = pq.read_table(tiny_corpus).to_pylist()
    encoder = Encoder.load(tiny_encoder, dtype=torch.float32)
    documents = encoder.encode([row["text"] for row in corpus], "document").astype(np.float64)
    for row in found:
        scores = documents @ encoder.encode([row["query"]], "query")[0].astype(np.float64)
        by_text = {row["text"]: score for row, score in zip(corpus, scores, strict=True)}
        lowest = min(by_text[text] for text in row["positives"])
        assert row["positive_scores"] == pytest.approx([by_text[text] for text in row["positives"]], abs=1e-5)
        others = {text: score for text, score in by_text.items() if text not in (*row["positives"], row["query"])}
        passing = sorted((score for score in others.values() if score <= lowest - 0.01 * abs(lowest)), reverse=True)
        assert row["negative_scores"] == pytest.approx(passing[: len(row["negatives"])], abs=1e-5)
        assert [corpus[number]["text"] for number in row["negative_ids"]] == row["negatives"]
        assert row["is_random"] == [False] * len(row["negatives"])

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["measurements"]["negatives"] == sum(len(row["negatives"]) for row in found)
    assert manifest["measurements"]["positives"] == 48
    assert set(manifest["parents"]) == {"model", "pairs", "corpus"}
    assert manifest["config"]["rule"]["relative_margin"] == 0.01
    assert manifest["measurements"]["rejected_pairs"] == 2
    quarantined = pq.read_table(whole / "quarantine" / "pairs.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in quarantined] == [(48, "null"), (49, "empty")]


def test_sentence_transformers_finds_the_same(
    ray_cluster: None, tiny_encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    mine(
        config_for(
            tmp_path, tiny_encoder, pairs, None, rule={"max_negatives": 4, "relative_margin": 0.02, "range_max": 48}
        )
    )
    table = pq.read_table(pairs, columns=["query", "positive"]).slice(0, 48)
    peers = mine_hard_negatives(
        Dataset(table),
        SentenceTransformer(str(tiny_encoder), device="cpu"),
        num_negatives=4,
        range_max=48,
        relative_margin=0.02,
        output_format="labeled-list",
        verbose=False,
    )
    expected = {row["query"]: set(row["positive"][1:]) for row in peers.to_list()}
    assert {row["query"]: set(row["negatives"]) for row in rows_of(tmp_path) if row["negatives"]} == expected


def test_a_killed_process_changes_nothing_and_a_resumed_run_repeats_nothing(
    whole: Path, output: Path, tiny_encoder: Path, tiny_corpus: Path, pairs: Path
) -> None:
    config = config_for(output, tiny_encoder, pairs, tiny_corpus, search={"shards": 2})
    killed: set[int] = set()

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < deadline:
            killed.update(kill_ray_workers("IndexShard") + kill_ray_workers("Miner"))
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    mine(config)
    killer.join()
    assert len(killed) >= 2
    assert rows_of(output) == rows_of(whole)

    kept, lost = (output / part_name(number) for number in (0, 1))
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (output / "manifest.json").unlink()
    mine(config)
    assert (lost.read_bytes(), kept.stat().st_mtime_ns) == (before, stamp)


def test_an_index_must_find_enough(
    whole: Path,
    output: Path,
    tiny_encoder: Path,
    tiny_corpus: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = {"index": "IVF6,Flat", "nprobe": 1, "shards": 2, "merged": True, "min_recall": 1.0}
    manifest = mine(config_for(output, tiny_encoder, pairs, tiny_corpus, search=search)).manifest
    assert manifest.measurements["recall_at_10"] == 1
    assert manifest.measurements["nprobe"] > 1
    assert "recall@10 with nprobe 1: 0." in capsys.readouterr().out
    if manifest.measurements["nprobe"] == 6:
        assert rows_of(output) == rows_of(whole)
    index = faiss.read_index(str(output / "index.faiss"))
    assert index.ntotal == sum(len(np.load(path)) for path in output.glob("work/shards-*/*-of-*/rows.npy"))
    index.nprobe = index.nlist
    rows = {row["row"]: row for row in pq.read_table(output / "index-rows.parquet").to_pylist()}
    parts = sorted((output / "work" / "vectors" / "corpus").glob("part-*.parquet"))
    corpus = pa.concat_tables([pq.read_table(part) for part in parts])
    _, found = index.search(vectors_of(corpus["vector"]).astype(np.float32), 1)
    texts = corpus["text"].to_pylist()
    # A tiny model may give two texts one vector.
    right = sum(rows[row]["text"] == text for row, text in zip(found[:, 0].tolist(), texts, strict=True))
    assert right > 0.9 * len(texts)
    by_id = dict(zip(corpus["id"].to_pylist(), texts, strict=True))
    assert all(row["id"] is None or by_id[row["id"]] == row["text"] for row in rows.values())
    other = with_vectors_of(whole, tmp_path / "refused")
    refused = config_for(other, tiny_encoder, pairs, tiny_corpus, search=search | {"raise_nprobe": False})
    with pytest.raises(ConfigError, match=r"nprobe: 1 finds 0\.\d+ of the exact 10 best"):
        mine(refused)


def test_what_is_short_is_filled_and_marked(
    whole: Path, tiny_encoder: Path, tiny_corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    rule = {"max_negatives": 6, "max_score": 0.5, "relative_margin": None, "short": "random", "range_max": 8}
    one, three, short = (with_vectors_of(whole, tmp_path / name) for name in ("one", "three", "short"))
    mine(config_for(one, tiny_encoder, pairs, tiny_corpus, rule=rule))
    mine(config_for(three, tiny_encoder, pairs, tiny_corpus, rule=rule, search={"shards": 3}))
    found, again = rows_of(one), rows_of(three)
    assert [row["negatives"] for row in found] == [row["negatives"] for row in again]
    assert any(any(row["is_random"]) for row in found)
    for row in found:
        assert len(set(row["negatives"])) == len(row["negatives"])
        assert not {row["query"], *row["positives"]} & {*row["negatives"]}
        assert max(row["negative_scores"], default=0) <= 0.5
    dropped = mine(config_for(short, tiny_encoder, pairs, tiny_corpus, rule=rule | {"short": "drop"})).manifest
    assert dropped.measurements["dropped"] == 24 - dropped.measurements["queries"] > 0


def test_a_margin_that_leaves_little_is_named() -> None:
    rule = {"max_negatives": 4, "relative_margin": 0.05, "absolute_margin": None}
    measured = {"queries": 90, "dropped": 10, "negatives": 300, "random": 250, "mean_score": {"positive": 0.9}}
    told = warning_of(measured | {"rejected": {"relative_margin": 3500}}, rule)
    assert told is not None
    assert "50 of 400 negatives" in told
    assert "relative_margin 0.05 left out 3,500" in told
    assert warning_of(measured | {"random": 100, "rejected": {"relative_margin": 3500}}, rule) is None
    assert warning_of(measured | {"rejected": {"positive": 100}}, rule) is None


def test_a_second_model_judges_what_the_first_finds(
    whole: Path, tiny_encoder: Path, tiny_xlmr: Path, tiny_corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    output = with_vectors_of(whole, tmp_path / "judged")
    rule = {"max_negatives": 6, "relative_margin": 0.02, "range_max": 30, "short": "random"}
    changes: dict[str, Any] = {"judge": str(tiny_xlmr), "rule": rule, "search": {"shards": 2}}
    manifest = mine(config_for(output, tiny_encoder, pairs, tiny_corpus, **changes)).manifest
    assert set(manifest.parents) == {"model", "pairs", "corpus", "judge"}
    judge = Encoder.load(tiny_xlmr, dtype=torch.float32)
    assert_judged(output, lambda query, texts: judge.encode(texts, "document") @ judge.encode([query], "query")[0])
    assert any(any(row["is_random"]) for row in rows_of(output))


@pytest.mark.slow
def test_what_a_judge_is_asked_does_not_depend_on_other_queries(
    tiny_encoder: Path, tiny_xlmr: Path, tiny_corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    """One query has very many positives, so that its block is searched far deeper than the others ask for."""
    rows = pq.read_table(pairs).slice(0, 24).to_pylist()
    rows += [rows[0] | {"positive": row["positive"]} for row in rows[1:20]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "uneven.parquet")
    found = []
    for size in (1, 24):
        output = tmp_path / f"blocks-of-{size}"
        changes: dict[str, Any] = {"judge": str(tiny_xlmr), "queries_per_block": size, "rule": {"max_negatives": 1}}
        mine(config_for(output, tiny_encoder, tmp_path / "uneven.parquet", tiny_corpus, **changes))
        found.append({row["query"]: row["negatives"] for row in rows_of(output)})
    assert found[0] == found[1]


def test_a_cross_encoder_judges_each_pair_once(
    whole: Path, tiny_encoder: Path, tiny_cross_encoder: Path, tiny_corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(whole / "work" / "vectors", work / "vectors")
    rule = {"max_negatives": 4, "relative_margin": None, "absolute_margin": 0.001, "range_max": 20}
    changes: dict[str, Any] = {"judge": str(tiny_cross_encoder), "work": str(work)}
    mine(config_for(tmp_path / "one", tiny_encoder, pairs, tiny_corpus, rule=rule, **changes))
    scorer = CrossEncoder(str(tiny_cross_encoder), device="cpu")
    assert 0 <= json.loads((tmp_path / "one" / NOTE).read_text())["cache_hits"] < 1
    assert_judged(tmp_path / "one", lambda query, texts: scorer.predict([(query, text) for text in texts]))

    (kept,) = work.glob("judged/*")
    stamps = {path: path.stat().st_mtime_ns for path in [*kept.iterdir(), *work.glob("shards-*/*")]}
    mine(config_for(tmp_path / "two", tiny_encoder, pairs, tiny_corpus, rule=rule | {"max_negatives": 2}, **changes))
    assert [row["negatives"] for row in rows_of(tmp_path / "two")] == [
        row["negatives"][:2] for row in rows_of(tmp_path / "one")
    ]
    assert json.loads((tmp_path / "two" / NOTE).read_text())["cache_hits"] == 1
    assert {path: path.stat().st_mtime_ns for path in stamps if path.suffix == ".parquet"} == {
        path: stamp for path, stamp in stamps.items() if path.suffix == ".parquet"
    }


def assert_judged(output: Path, scores_of: Callable[[str, list[str]], Any]) -> None:
    """Scores are the judge's, best first, and none breaks the margin that it sets."""
    rows = rows_of(output)
    assert sum(len(row["negatives"]) for row in rows) > 20
    for row in rows:
        assert row["positive_scores"] == pytest.approx(scores_of(row["query"], row["positives"]), abs=1e-4)
        if row["negatives"]:
            assert row["negative_scores"] == pytest.approx(scores_of(row["query"], row["negatives"]), abs=1e-4)
            mined = [score for score, drawn in zip(row["negative_scores"], row["is_random"], strict=True) if not drawn]
            assert mined == sorted(mined, reverse=True)
            assert max(row["negative_scores"]) < min(row["positive_scores"])


def test_a_language_of_negatives_is_seen_from_the_query(
    output: Path, tiny_encoder: Path, tiny_corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    table = pq.read_table(pairs)  # English queries, German and French answers
    pq.write_table(table.append_column("asked_in", pa.array(["en"] * len(table))), tmp_path / "asked.parquet")
    rule = {"max_negatives": 3, "relative_margin": None, "language": "same"}
    columns = {"lang": "lang", "query_lang": "asked_in"}
    shutil.rmtree(output / "work" / "vectors")  # these know no languages
    mine(config_for(output, tiny_encoder, tmp_path / "asked.parquet", tiny_corpus, rule=rule, columns=columns))
    lang_of = {row["text"]: row["lang"] for row in pq.read_table(tiny_corpus).to_pylist()}
    assert {lang_of[text] for row in rows_of(output) for text in row["negatives"]} == {"en"}
    # A quarter of the passages are English: who is short is filled all the same.
    filled = with_vectors_of(output, tmp_path / "filled")
    rule |= {"max_negatives": 15, "range_max": 15, "short": "random"}
    mine(config_for(filled, tiny_encoder, tmp_path / "asked.parquet", tiny_corpus, rule=rule, columns=columns))
    assert {len(row["negatives"]) for row in rows_of(filled)} == {15}
    assert {lang_of[text] for row in rows_of(filled) for text in row["negatives"]} == {"en"}
    assert any(any(row["is_random"]) for row in rows_of(filled))


def test_queries_with_many_positives_are_searched_for_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.miner.MOST_CANDIDATES", 60)
    depths = np.array([10, 20, 20, 30, 90, 100])
    assert [depths[run].tolist() for run in runs(depths)] == [[10, 20, 20], [30], [90], [100]]


def test_other_settings_take_over_where_nothing_is_mined_yet(
    output: Path, tiny_encoder: Path, tiny_corpus: Path, pairs: Path
) -> None:
    with pytest.raises(ConfigError, match=r"search\.merged: with exact search; expected an index of inverted lists"):
        mine(config_for(output, tiny_encoder, pairs, tiny_corpus, search={"merged": True}))
    assert mine(config_for(output, tiny_encoder, pairs, tiny_corpus)).manifest.measurements["queries"] == 24


def test_what_cannot_be_is_refused(
    whole: Path, tiny_encoder: Path, tiny_xlmr: Path, pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "work" / "vectors" / "corpus", tmp_path / "vectors")
    given = {"vectors": str(tmp_path / "vectors")}

    def refused(error: type[Exception], match: str, model: Path = tiny_encoder, **changes: Any) -> None:
        name = f"refused-{len(list(tmp_path.iterdir()))}"
        output = with_vectors_of(whole, tmp_path / name) if model == tiny_encoder else tmp_path / name
        with pytest.raises(error, match=match):
            mine(config_for(output, model, pairs, None, **changes))

    refused(ArtifactError, r"was made by model \w{12}; expected \w{12}, this model", tiny_xlmr, **given)
    refused(DataError, "no column 'answer'", **given, columns={"positive": "answer"})
    refused(ArtifactError, r"made with vectors .*float32.*; expected .*float16", **given, vector_dtype="float16")
    refused(ArtifactError, r'made with prompts \["document"\]; expected \["query"\]', **given, document_prompt="query")
    with pytest.raises(ValueError, match="corpus and vectors: both are passages to search"):
        config_for(tmp_path, tiny_encoder, pairs, pairs, **given)
    with pytest.raises(ValueError, match=r"columns.lang: none; rule.language 'other' needs"):
        config_for(tmp_path, tiny_encoder, pairs, None, rule={"language": "other"})
    refused(ConfigError, "negatives up to rank 500 of 48 distinct passages", rule={"max_negatives": 500})
    with pytest.raises(ArtifactError, match="holds negatives"):
        mine(config_for(whole, tiny_encoder, pairs, None, rule=RULE | {"seed": 1}))

    part = tmp_path / "vectors" / part_name(0)
    table = pq.read_table(part)
    broken = np.array(table["vector"].to_pylist(), np.float32)
    broken[7, 3] = np.nan
    for match, column, values in (
        (r"row 7 and 0 more: not finite", "vector", vector_column(broken)),
        (r"id 0 and 0 more are those of several rows", "id", pa.array([0, *range(len(table) - 1)])),
        (r"vectors are .*\[32\], others .*\[16\]; expected one model", "vector", vector_column(broken[:, :16].copy())),
    ):
        pq.write_table(table.set_column(table.column_names.index(column), column, values), part)
        refused(DataError, match, **given)
    pq.write_table(table.drop(["text"]), part)
    refused(DataError, r"no column 'text'; embed .* with --columns.keep", **given)
