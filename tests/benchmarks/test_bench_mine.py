from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import mine


def test_texts_are_distinct_and_all_there(tmp_path: Path) -> None:
    table = pa.table({"query": ["a", "a", "b", "c", "d"], "passage": ["x", "y", "x", "z", "w"]})
    pq.write_table(table, tmp_path / "source.parquet")
    texts = mine.write_texts(tmp_path / "source.parquet", tmp_path / "texts", 3, 2)
    pairs = pq.read_table(texts.pairs).to_pydict()
    assert len(set(pairs["query"])) == len(set(pairs["passage"])) == 2
    assert set(pq.read_table(texts.corpus)["text"].to_pylist()).isdisjoint(pairs["passage"])
    assert len(pq.read_table(texts.corpus)) == 1
    with pytest.raises(SystemExit, match="--sizes asks for 9"):
        mine.write_texts(tmp_path / "source.parquet", tmp_path / "more", 9, 2)


def test_agreement_tells_ties_from_differences() -> None:
    ours = {"a": [("x", 0.9), ("y", 0.5)], "b": [("x", 0.9)], "c": [("x", 0.9)], "d": [("x", 0.9)]}
    peers = {"a": [("y", 0.5), ("x", 0.9)], "b": [("z", 0.9 + 1e-6)], "c": [("z", 0.8)], "d": []}
    found = mine.agreement(ours, peers)
    assert (found["queries"], found["same"], found["ties"], found["others"]) == (4, 1, 1, 2)
    assert found["farthest"] == pytest.approx(0.1)


def test_labelled_pairs_are_those_of_their_own_language(tmp_path: Path) -> None:
    tables = {
        "queries": {"lang": ["en", "de"], "_id": ["q", "q"], "text": ["who", "wer"]},
        "corpus": {"lang": ["en", "de"], "_id": ["a", "b"], "par_id": ["1", "1"], "text": ["she", "sie"]},
        "qrels": {"lang": ["en", "de"], "query-id": ["q", "q"], "corpus-id": ["a", "b"]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    pairs, corpus, group = mine.labelled_pairs(tmp_path)
    assert pairs[["text_query", "text_passage"]].to_numpy().tolist() == [["who", "she"], ["wer", "sie"]]
    assert (len(corpus), group) == (2, "par_id")
