"""How a corpus is cut into shards, and what each of them asks of the cluster."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from embedlib import sources
from embedlib.errors import ConfigError
from jobs import shards
from jobs.shards import (
    SearchConfig,
    cut,
    factory_of,
    index_bytes,
    mergeable,
    plan_shards,
    read_chunks,
    share_of_gpu,
    vector_bytes,
    whole_files,
)

DIM, ROWS = 16, 600


@pytest.fixture
def file(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=ROWS * DIM).astype(np.float32)
    table = pa.table({"id": range(ROWS), "vector": pa.FixedSizeListArray.from_arrays(vectors, DIM)})
    pq.write_table(table, tmp_path / "part-000000.parquet")
    return tmp_path / "part-000000.parquet"


def nodes(*cpus: float | None) -> list[dict[str, Any]]:
    """Nodes as Ray tells of them; None for one that is gone."""
    return [{"Alive": each is not None, "Resources": {"CPU": each} if each else {}} for each in cpus]


@pytest.mark.parametrize(("num_shards", "num_gpus"), [(1, 1), (2, 2), (3, 2), (5, 2), (7, 3), (8, 1)])
def test_all_shards_find_a_gpu_at_once(num_shards: int, num_gpus: int) -> None:
    share = share_of_gpu(num_shards, num_gpus)
    # A shard lies on one GPU, with others as far as their shares add up to it.
    assert num_gpus * int(1 / share + 1e-9) >= num_shards
    assert share_of_gpu(num_shards, 0) == 0
    # Those of two corpora search each other.
    assert num_gpus * int(1 / share_of_gpu(num_shards, num_gpus, 2) + 1e-9) >= 2 * num_shards


def test_a_shard_takes_no_more_memory_than_it_may(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(None, 0, 2, 2))
    monkeypatch.setattr(shards, "present_gpus", lambda: 0)
    parts = whole_files([file])
    assert index_bytes(None, parts) == 0
    assert index_bytes("HNSW8", parts) == ROWS * (4 * DIM + 8)
    assert index_bytes("IVF4,SQ8", parts) == ROWS * (DIM + 8)

    def number(index: str, **values: Any) -> int:
        work = file.parent / index
        work.mkdir(exist_ok=True)
        (work / "trained.faiss").touch()  # as if it had been trained
        return len(plan_shards(work, SearchConfig(index=index, **values), [file], [], {}).chunks)

    assert number("exact") == 2, "one for each node that works"
    assert number("exact", shards=5) == 5
    monkeypatch.setattr(shards, "SHARD_BYTES", ROWS * (DIM + 8) // 4 + 1)
    assert number("IVF4,SQ8") == 4


def test_indexes_that_cannot_be_merged_are_told_before_any_work(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mergeable("IVF8,SQ8")
    assert not any(mergeable(factory) for factory in (None, "HNSW8", "IVF8,PQ8x4fs", "OPQ8,IVF8,SQ8"))
    search = SearchConfig(index="OPQ8,IVF8,SQ8", merged=True, shards=2)
    monkeypatch.setattr(shards, "present_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"search\.merged: with OPQ8,IVF8,SQ8"):
        plan_shards(file.parent / "work", search, [file], [], {})


def test_gpus_search_exactly_what_they_can_hold(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = whole_files([file])
    assert vector_bytes(parts) == ROWS * DIM * 4
    monkeypatch.setattr(shards, "EXACT_ROWS", ROWS - 1)
    auto = SearchConfig()
    assert factory_of(auto, parts, 0) == "IVF1,PQ8x4fs"
    monkeypatch.setattr(shards, "GPU_BYTES", ROWS * DIM * 4 // 2)
    assert factory_of(auto, parts, 1) == "IVF1,PQ8x4fs"
    assert factory_of(auto, parts, 2) is None
    assert factory_of(SearchConfig(shards=1), parts, 2) == "IVF1,PQ8x4fs"
    assert factory_of(SearchConfig(merged=True), parts, 2) == "IVF1,SQ8"
    assert factory_of(SearchConfig(index="IVF8,Flat"), parts, 2) == "IVF8,Flat"


@pytest.mark.parametrize(("index", "on_gpus"), [("exact", True), ("IVF4,SQ8", True), ("HNSW8", False)])
def test_shards_ask_for_gpus_where_these_can_search(
    index: str, on_gpus: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(2, 2, 2))
    (file.parent / index).mkdir()
    (file.parent / index / "trained.faiss").touch()
    for num_gpus in (0, 2):
        monkeypatch.setattr(shards, "present_gpus", lambda num_gpus=num_gpus: num_gpus)
        plan = plan_shards(file.parent / index, SearchConfig(index=index), [file], [], {})
        assert plan.num_gpus == (num_gpus if on_gpus else 0)
        # One a GPU, however many nodes there are, or one a node.
        assert len(plan.chunks) == (num_gpus if on_gpus and num_gpus else 3)


def test_vector_files_are_read_in_batches(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ_ROWS", 70)
    runs = cut(whole_files([file]), 2)
    chunks = [chunk for run in runs for chunk in read_chunks(run, {"number": "id", "lang": "lang"})]
    assert max(len(chunk.rows) for chunk in chunks) == 70
    assert [chunk.first_row + row for chunk in chunks for row in range(len(chunk.rows))] == list(range(ROWS))
    assert [number for chunk in chunks for number in chunk.rows["number"].to_pylist()] == list(range(ROWS))
    assert chunks[0].rows.column_names == ["number"]


def test_a_resumed_run_searches_as_it_began(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(2))
    monkeypatch.setattr(shards, "EXACT_ROWS", ROWS - 1)
    monkeypatch.setattr(shards, "present_gpus", lambda: 1)
    assert plan_shards(tmp_path / "work", SearchConfig(), [file], [], {}).factory is None
    monkeypatch.setattr(shards, "present_gpus", lambda: 0)
    assert plan_shards(tmp_path / "work", SearchConfig(), [file], [], {}).factory is None
    assert factory_of(SearchConfig(), whole_files([file]), 0) is not None
