from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from embedlib.errors import DataError
from embedlib.index import assign, merge_indexes, save_index, train_index
from embedlib.schemas import vector_column
from embedlib.shard import INDEX_NAME, Chunk, Shard, build_shard, text_keys
from embedlib.topk import NO_ROW

FIRST = 100
CHANCE = np.random.default_rng(0)
VECTORS = (lambda raw: raw / np.linalg.norm(raw, axis=1, keepdims=True))(CHANCE.normal(size=(500, 16))).astype(
    np.float16
)
TEXTS = [f"text {number}" for number in range(500)]
TEXTS[250], TEXTS[499] = TEXTS[3], TEXTS[3]
VECTORS[250] = VECTORS[499] = VECTORS[3]
QUERIES = VECTORS[::25].astype(np.float32)


def table(begin: int, end: int, vectors: npt.NDArray[np.float16] = VECTORS) -> pa.Table:
    ids = [f"id-{number}" for number in range(begin, end)]
    langs = pa.array(["en" if number % 2 else None for number in range(begin, end)])
    return pa.table({"id": ids, "text": TEXTS[begin:end], "vector": vector_column(vectors[begin:end]), "lang": langs})


def chunks() -> Iterator[Chunk]:
    yield Chunk(FIRST, table(0, 200))
    yield Chunk(FIRST + 200, table(200, 500))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    directory = tmp_path_factory.mktemp("shard") / "one"
    build_shard(chunks, directory)
    return Shard.open(directory)


@pytest.mark.parametrize("block_rows", [7, 100, 1000])
def test_brute_force_finds_the_largest_products(shard: Shard, block_rows: int) -> None:
    found = shard.search(QUERIES, 10, block_rows)
    distinct = np.delete(np.arange(500), [250, 499])
    scores = QUERIES.astype(np.float64) @ VECTORS[distinct].astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    assert found.rows.tolist() == (distinct[order] + FIRST).tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, axis=1), atol=1e-7)


def test_a_text_that_comes_again_is_the_first(shard: Shard) -> None:
    assert len(shard.rows) == 498
    assert shard.texts_of(np.array([103, 350, 599, 104]))["id"].to_pylist() == ["id-3", "id-3", "id-3", "id-4"]


def test_rows_of_other_shards_are_not_here(shard: Shard) -> None:
    rows = np.array([[99, 100, 599, 600]])
    found = shard.at(VECTORS[:1].astype(np.float32), rows)
    assert found.rows.tolist() == [[NO_ROW, 100, 103, NO_ROW]]
    assert found.scores[0, 1] == pytest.approx(1, abs=1e-3)
    assert found.scores[0, 0] == -np.inf


def test_what_is_asked_beyond_the_end_is_no_row(shard: Shard) -> None:
    assert (shard.search(QUERIES, 600, 64).rows[:, 498:] == NO_ROW).all()


def test_keys_tell_texts_apart_and_null_is_zero(shard: Shard) -> None:
    keys = text_keys(pa.chunked_array([["a", None], ["b", "a"]]))
    assert keys[1] == 0
    assert keys[0] == keys[3] != keys[2]
    assert set(shard.langs.tolist()) == {0, int(text_keys(pa.chunked_array([["en"]]))[0])}


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "HNSW16", "OPQ8,IVF8,PQ8x4fs"])
def test_an_index_gives_candidates_and_the_vectors_their_scores(factory: str, tmp_path: Path) -> None:
    empty = train_index(lambda num_rows: VECTORS[:num_rows].astype(np.float32), 16, factory)
    save_index(empty, tmp_path / "trained.faiss")
    build_shard(chunks, tmp_path / "ann", faiss.read_index(str(tmp_path / "trained.faiss")))
    opened = Shard.open(tmp_path / "ann")
    found = opened.search(QUERIES, 5, 64, 8, assign(empty, QUERIES, 8))
    exact = opened._replace(faiss_index=None).search(QUERIES, 5, 64)
    assert found.rows[:, 0].tolist() == exact.rows[:, 0].tolist()
    there = np.isin(found.rows, exact.rows)
    assert there.mean() > 0.8
    for query, (rows, scores) in enumerate(zip(found.rows, found.scores, strict=True)):
        products = VECTORS[rows - FIRST].astype(np.float64) @ QUERIES[query].astype(np.float64)
        np.testing.assert_allclose(scores, products, atol=1e-6)


@pytest.mark.parametrize("factory", ["IVF8,PQ8x4fs", "IVF8,RaBitQ"])
def test_rough_codes_give_more_candidates_for_their_vectors_to_be_compared(factory: str, tmp_path: Path) -> None:
    empty = train_index(lambda num_rows: VECTORS[:num_rows].astype(np.float32), 16, factory)
    save_index(empty, tmp_path / "trained.faiss")
    build_shard(chunks, tmp_path / "ann", faiss.read_index(str(tmp_path / "trained.faiss")))
    opened = Shard.open(tmp_path / "ann")
    exact = opened._replace(faiss_index=None).search(QUERIES, 5, 64)
    assignment = assign(empty, QUERIES, 8)
    few, many = (opened.search(QUERIES, 5, 64, 8, assignment, number) for number in (0, 400))
    assert np.isin(few.rows, exact.rows).mean() < 1
    assert many.rows.tolist() == exact.rows.tolist()
    np.testing.assert_array_equal(many.scores, exact.scores)


def test_shards_of_one_training_merge_into_one_file(tmp_path: Path) -> None:
    save_index(train_index(lambda _: VECTORS.astype(np.float32), 16, "IVF8,Flat"), tmp_path / "trained.faiss")
    for number, chunk in enumerate(chunks()):
        build_shard(
            lambda chunk=chunk: iter([chunk]), tmp_path / str(number), faiss.read_index(str(tmp_path / "trained.faiss"))
        )
    merge_indexes(tmp_path / "trained.faiss", [tmp_path / name / INDEX_NAME for name in "01"], tmp_path / "all.faiss")
    index = faiss.read_index(str(tmp_path / "all.faiss"))
    index.nprobe = 8
    assert index.ntotal == 200 + 299
    found = index.search(VECTORS[[0, 199, 300]].astype(np.float32), 1)[1]
    assert found[:, 0].tolist() == [FIRST, FIRST + 199, FIRST + 300]


@pytest.mark.parametrize(("value", "word"), [(np.nan, "not finite"), (np.inf, "not finite"), (0, "zero")])
def test_a_vector_that_says_nothing_is_refused(value: float, word: str, tmp_path: Path) -> None:
    broken = VECTORS.copy()
    broken[42] = value
    with pytest.raises(DataError, match=f"row 142 and 0 more: {word}"):
        build_shard(lambda: iter([Chunk(FIRST, table(0, 500, broken))]), tmp_path / "one")
    assert not (tmp_path / "one").exists()
