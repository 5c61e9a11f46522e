"""One shard of a corpus on disk: its vectors, its texts and, where asked for, a FAISS index of them, all memory-mapped.

A shard holds consecutive rows of a corpus, of equal texts the first alone. Candidates come from the index, or from
brute force without one; their scores are always computed from the stored vectors in double precision, so that they do
not depend on how the corpus is cut or on what the index forgot.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from embedlib.errors import ConfigError, DataError
from embedlib.index import Assignment, read_index, search_index
from embedlib.schemas import vectors_of
from embedlib.topk import NO_ROW, Hits, best

Vectors = npt.NDArray[np.floating]
ATTRIBUTES = ("rows", "keys", "documents", "langs")
FILES = ("vectors", "positions", *ATTRIBUTES)
TEXTS_NAME, INDEX_NAME = "texts.arrow", "index.faiss"
# Rows beyond the ones asked for, since brute force and an index may order near-equal scores as they like.
SLACK = 8
# faiss on GPUs gives no more neighbours than this.
MAX_GPU_NEIGHBOURS = 2048
RESCORED_BYTES = 64 << 20


class Chunk(NamedTuple):
    """Consecutive rows of a corpus."""

    first_row: int
    """Number of the first over the whole corpus."""
    rows: pa.Table
    """`id`, `text`, `vector` and, where known, `lang` and `document`."""


class Shard(NamedTuple):
    """An open shard."""

    vectors: Vectors
    """(rows, dim) as stored."""
    rows: npt.NDArray[np.int64]
    """(rows,) their numbers in the corpus, ascending."""
    keys: npt.NDArray[np.uint64]
    documents: npt.NDArray[np.uint64]
    langs: npt.NDArray[np.uint64]
    texts: pa.Table
    """`id` and `text` of each row."""
    positions: npt.NDArray[np.int64]
    """(numbers from the first row to the last,) where each row, or the one with its text, stands here."""
    faiss_index: faiss.Index | None

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Memory-map what `build_shard` wrote."""
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in FILES}
        with pa.memory_map(str(directory / TEXTS_NAME)) as source:
            texts = pa.ipc.open_file(source).read_all()
        index = directory / INDEX_NAME
        return cls(**arrays, texts=texts, faiss_index=read_index(index) if index.exists() else None)

    @property
    def first_row(self) -> int:
        """Number of the first row, which is never a copy."""
        return int(self.rows[0])

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        block_rows: int,
        nprobe: int = 1,
        assignment: Assignment | None = None,
    ) -> Hits:
        """The best `k` distinct texts for `queries` (queries, dim), with the scores of the stored vectors."""
        if self.faiss_index is None:
            return best(self._hits(queries, brute_force(queries, self.vectors, k + SLACK, block_rows)), k)
        rows = search_index(self.faiss_index, queries, k + SLACK, nprobe, assignment)
        found = self.positions[np.maximum(rows - self.first_row, 0)]
        return best(self._hits(queries, np.where(rows == NO_ROW, NO_ROW, found)), k)

    def at(self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Hits:
        """What `queries` (queries, dim) would score with corpus `rows` (queries, n), where this shard holds them."""
        here = (rows >= self.first_row) & (rows < self.first_row + len(self.positions))
        found = self.positions[np.where(here, rows - self.first_row, 0)]
        return self._hits(queries, np.where(here, found, NO_ROW))

    def texts_of(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """`id` and `text` of corpus rows that this shard holds."""
        return self.texts.take(pa.array(self.positions[rows - self.first_row]))

    def _hits(self, queries: npt.NDArray[np.float32], found: npt.NDArray[np.int64]) -> Hits:
        there = found != NO_ROW
        scores = np.where(there, inner_products(queries, self.vectors, found), -np.inf).astype(np.float32)
        attributes = [np.asarray(getattr(self, name)[found]) for name in ATTRIBUTES]
        return Hits(scores, *attributes).masked(~there)


def build_shard(chunks: Callable[[], Iterable[Chunk]], directory: Path, empty_index: faiss.Index | None = None) -> None:
    """Write the shard of some chunks, which are read twice; `empty_index` is trained, and is filled.

    Raises DataError, naming the row, for a vector that is zero or not finite, and for widths that differ.
    """
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    keys = np.concatenate([text_keys(chunk.rows["text"]) for chunk in chunks()])
    _, firsts, numbers = np.unique(keys, return_index=True, return_inverse=True)
    kept = np.sort(firsts)
    np.save(scratch / "keys.npy", keys[kept])
    np.save(scratch / "positions.npy", np.searchsorted(kept, firsts[numbers]))
    write_rows(chunks(), kept, scratch, empty_index)
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


def write_rows(
    chunks: Iterable[Chunk], kept: npt.NDArray[np.int64], directory: Path, index: faiss.Index | None
) -> None:
    """Write all but the keys of the rows at `kept` positions, ascending, of all chunks together."""
    attributes: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("rows", "documents", "langs")}
    stored: Vectors | None = None
    begin = written = 0
    with ExitStack() as files:
        for chunk in chunks:
            end = begin + len(chunk.rows)
            chosen = kept[slice(*np.searchsorted(kept, [begin, end]))] - begin
            begin = end
            rows = chunk.rows.take(pa.array(chosen))
            numbers = chunk.first_row + chosen
            vectors = checked(vectors_of(rows["vector"]), numbers)
            if stored is None:
                shape = (len(kept), vectors.shape[1])
                stored = np.lib.format.open_memmap(directory / "vectors.npy", "w+", vectors.dtype, shape)
                schema = rows.select(["id", "text"]).schema
                texts = files.enter_context(pa.ipc.new_file(str(directory / TEXTS_NAME), schema))
            if vectors.shape[1] != stored.shape[1]:
                raise DataError(
                    f"vectors: row {numbers[0]} has {vectors.shape[1]} dimensions; expected {stored.shape[1]}"
                )
            stored[written : written + len(vectors)] = vectors
            written += len(vectors)
            texts.write_table(rows.select(["id", "text"]))
            attributes["rows"].append(numbers)
            for name, column in (("documents", "document"), ("langs", "lang")):
                known = column in rows.column_names
                attributes[name].append(text_keys(rows[column]) if known else np.zeros(len(rows), np.uint64))
            if index is not None:
                index.add_with_ids(vectors.astype(np.float32), numbers)
    for name, parts in attributes.items():
        np.save(directory / f"{name}.npy", np.concatenate(parts))
    if index is not None:
        faiss.write_index(index, str(directory / INDEX_NAME))


def checked(vectors: Vectors, rows: npt.NDArray[np.int64]) -> Vectors:
    """`vectors` (rows, dim); DataError naming the first of `rows` that is zero or not finite."""
    sizes = np.abs(vectors).max(axis=1, initial=0)
    bad = np.flatnonzero(~np.isfinite(sizes) | (sizes == 0))
    if len(bad):
        kind = "zero" if sizes[bad[0]] == 0 else "not finite"
        raise DataError(f"vectors: row {rows[bad[0]]} and {len(bad) - 1} more: {kind}; expected unit vectors")
    return vectors


def text_keys(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """What tells one text of a column from another: 64 bits of SipHash; 0 for null."""
    texts = np.array(column.to_pylist(), object)
    known = np.array([text is not None for text in texts], np.bool_)
    keys = np.zeros(len(texts), np.uint64)
    keys[known] = pd.util.hash_array(texts[known], categorize=False)
    return keys


def brute_force(queries: npt.NDArray[np.float32], vectors: Vectors, k: int, block_rows: int) -> npt.NDArray[np.int64]:
    """Positions in `vectors` (rows, dim) of the `k` largest inner products, (queries, at most k), in no order.

    Only `block_rows` vectors are in memory at a time as float32.
    """
    k = min(k, len(vectors))
    resources = faiss.StandardGpuResources() if faiss.get_num_gpus() else None
    if resources and k > MAX_GPU_NEIGHBOURS:
        raise ConfigError(f"{k} candidates: faiss finds at most {MAX_GPU_NEIGHBOURS} on a GPU; lower rule.range_max")
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(vectors), block_rows):
        block = np.ascontiguousarray(vectors[start : start + block_rows], np.float32)
        metric = faiss.METRIC_INNER_PRODUCT
        few = min(k, len(block))
        if resources:
            scores, found = faiss.knn_gpu(resources, queries, block, few, metric=metric)
        else:
            scores, found = faiss.knn(queries, block, few, metric=metric)
        heap.add_result(scores, found + start)
    return np.asarray(heap.I)


def inner_products(
    queries: npt.NDArray[np.float32], vectors: Vectors, found: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Inner products of each query (queries, dim) with the vectors it found (queries, k), in double precision."""
    scores = np.empty(found.shape)
    step = max(1, RESCORED_BYTES // (8 * found.shape[1] * vectors.shape[1]))
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        candidates = vectors[found[some]].astype(np.float64)
        scores[some] = np.matmul(candidates, queries[some, :, None].astype(np.float64))[..., 0]
    return scores
