"""Inverted lists on a GPU: what goes there, what stays on CPUs, and that both find the same."""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from embedlib import gpu_index
from embedlib.gpu_index import (
    MOST_LISTS,
    MOST_OF_CODES,
    MOST_RESULTS,
    adder,
    has_kernels,
    is_on_gpu,
    lists_on_gpu,
    queries_at_once,
    within_limits,
)
from embedlib.index import assign, new_index, search_index, train_index
from embedlib.schemas import vector_column
from embedlib.shard import Chunk, Shard, build_shard
from embedlib.topk import recall

DIM = 32
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: lists on a GPU are not tested")


def unit_vectors(num_rows: int, seed: int) -> npt.NDArray[np.float32]:
    raw = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


VECTORS, QUERIES = unit_vectors(4000, 0), unit_vectors(50, 1)


@pytest.mark.parametrize(
    ("factory", "known"),
    [
        ("IVF16,Flat", True),
        ("IVF16,SQ8", True),
        ("IVF16,SQfp16", True),
        ("IVF16,PQ8", True),
        ("IVF16,SQ6", False),
        ("IVF16,PQ16x4", False),
        ("IVF16,PQ16x4fs", False),
        ("IVF16,RaBitQ", False),
        ("IVF16_HNSW8,Flat", False),
        ("OPQ8,IVF16,PQ8", False),
        ("HNSW8", False),
    ],
)
def test_kinds_that_a_gpu_can_search_are_told_without_one(factory: str, known: bool) -> None:
    index = new_index(DIM, factory)
    assert has_kernels(index) == known
    assert not is_on_gpu(index)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8"])
def test_lists_that_nobody_assigned_are_found_by_the_index(factory: str) -> None:
    index = train_index(lambda _: VECTORS, DIM, factory)
    index.add_with_ids(VECTORS, np.arange(len(VECTORS)))
    assigned = search_index(index, QUERIES, 20, 4, assign(index, QUERIES, 4))
    np.testing.assert_array_equal(search_index(index, QUERIES, 20, 4, None), assigned)
    assert (search_index(index, QUERIES, 20, 1, None) != assigned).any()


def test_queries_go_in_runs_for_which_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_index, "RESIDUAL_BYTES", 7 * 4 * DIM * 4)
    runs = queries_at_once(QUERIES, nprobe=4)
    assert [len(run) for run in runs] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(runs), QUERIES)
    assert len(queries_at_once(QUERIES, nprobe=MOST_LISTS)) == len(QUERIES)


class Elsewhere:
    """Stands in for a GPU's copy, which must not be asked."""


@pytest.mark.parametrize(
    ("factory", "most"),
    [("IVF16,Flat", MOST_RESULTS), ("IVF16,SQfp16", MOST_RESULTS), ("IVF16,SQ8", MOST_OF_CODES)],
)
def test_what_is_beyond_a_gpu_goes_to_the_cpus(factory: str, most: int, tmp_path: Path) -> None:
    shard = built(tmp_path, factory, False)
    shard = shard._replace(gpu_index=Elsewhere())
    exact = shard._replace(faiss_index=None).search(QUERIES, 5, 512)
    found = shard.search(QUERIES, 5, 512, nprobe=16, num_candidates=most + 1)
    np.testing.assert_array_equal(found.rows, exact.rows)
    assert within_limits(shard.faiss_index, most, MOST_LISTS)
    assert not within_limits(shard.faiss_index, most, MOST_LISTS + 1)
    with pytest.raises(AttributeError):
        shard.search(QUERIES, 5, 512, nprobe=16, num_candidates=most)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,SQfp16", "IVF16,SQ4", "IVF16,PQ8", "IVF16,PQ16"])
@pytest.mark.parametrize("most", [1, 100, MOST_RESULTS])
def test_a_gpu_finds_what_the_same_index_finds_on_cpus(factory: str, most: int) -> None:
    index = train_index(lambda _: VECTORS, DIM, factory, on_gpu=True)
    adder(index)(VECTORS, 7 * np.arange(len(VECTORS)))
    k = most if within_limits(index, most, 16) else MOST_OF_CODES
    lists = lists_on_gpu(index)
    assert is_on_gpu(lists)
    for nprobe in (2, 16):
        found = search_index(lists, QUERIES, k, nprobe, None)
        expected = search_index(index, QUERIES, k, nprobe, None)
        np.testing.assert_array_equal((found < 0).sum(axis=1), (expected < 0).sum(axis=1))
        assert (found[found >= 0] % 7 == 0).all()
        # Scores that are nearly equal may change places.
        assert recall(found, expected) > 0.97


@pytest.mark.gpu
@on_gpu
def test_a_shard_on_a_gpu_finds_the_exact_best_in_all_lists(tmp_path: Path) -> None:
    shard = built(tmp_path, "IVF16,SQ8", True)
    assert shard.gpu_index is not None
    assert shard.resident is None
    exact = shard._replace(faiss_index=None).search(QUERIES, 5, 512)
    found = shard.search(QUERIES, 5, 512, nprobe=16, num_candidates=64)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_array_equal(found.scores, exact.scores)


def built(directory: Path, factory: str, on_gpu: bool) -> Shard:
    """A shard of all vectors with an index."""
    columns = {"id": range(len(VECTORS)), "text": [str(row) for row in range(len(VECTORS))]}
    rows = pa.table(columns | {"vector": vector_column(VECTORS)})
    empty = train_index(lambda _: VECTORS, DIM, factory, on_gpu)
    assert isinstance(empty, faiss.IndexIVF)
    build_shard(lambda: iter([Chunk(0, rows)]), directory / "shard", empty, on_gpu=on_gpu)
    return Shard.open(directory / "shard", on_gpu)
