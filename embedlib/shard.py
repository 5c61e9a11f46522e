"""One shard of a corpus on disk: its vectors, its texts and, where asked for, a FAISS index of them, all memory-mapped.

A shard holds consecutive rows of a corpus, of equal texts the first alone. Candidates come from the index, or from
brute force without one; their scores are always computed from the stored vectors in double precision, so that they do
not depend on how the corpus is cut or on what the index forgot.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import faiss
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from embedlib.brute_force import Vectors, brute_force
from embedlib.errors import DataError
from embedlib.gpu_index import adder, lists_on_gpu, within_limits
from embedlib.index import Assignment, read_index, search_index
from embedlib.schemas import vectors_of
from embedlib.topk import NO_ROW, Hits, best

if TYPE_CHECKING:
    import torch

ATTRIBUTES = ("rows", "keys", "documents", "langs")
FILES = ("vectors", "positions", *ATTRIBUTES)
TEXTS_NAME, INDEX_NAME, JUDGE_NAME = "texts.arrow", "index.faiss", "judge.npy"
# Rows beyond the ones asked for, since brute force and an index may order near-equal scores as they like.
SLACK = 8
RESCORED_BYTES = 16 << 20


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
    judge: Vectors | None
    """(rows, another dim): what a second model made of the texts, where one was asked."""
    resident: "torch.Tensor | None"
    """(rows, dim) `vectors` on a GPU, which then searches them."""
    gpu_index: faiss.Index | None
    """`faiss_index` on a GPU, which then searches it as far as it can."""

    @classmethod
    def open(cls, directory: Path, on_gpu: bool = False) -> Self:
        """Memory-map what `build_shard` wrote; with `on_gpu` a GPU takes a copy of what is searched, if it has room."""
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in FILES}
        with pa.memory_map(str(directory / TEXTS_NAME)) as source:
            texts = pa.ipc.open_file(source).read_all()
        path, judge = directory / INDEX_NAME, directory / JUDGE_NAME
        index = read_index(path) if path.exists() else None
        return cls(
            **arrays,
            texts=texts,
            faiss_index=index,
            judge=np.load(judge, mmap_mode="r") if judge.exists() else None,
            resident=_resident(arrays["vectors"]) if on_gpu and index is None else None,
            gpu_index=lists_on_gpu(index) if on_gpu and index is not None else None,
        )

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
        num_candidates: int = 0,
    ) -> Hits:
        """The best `k` distinct texts for `queries` (queries, dim), with the scores of the stored vectors.

        An index is asked for `num_candidates`, where that is more than it takes to give `k`.
        """
        enough = k + SLACK
        if self.faiss_index is None:
            vectors = self.vectors if self.resident is None else self.resident
            return best(self._hits(queries, brute_force(queries, vectors, enough, block_rows)), k)
        wanted = max(enough, num_candidates)
        index = (
            self.gpu_index if self.gpu_index and within_limits(self.faiss_index, wanted, nprobe) else self.faiss_index
        )
        rows = search_index(index, queries, wanted, nprobe, assignment)
        found = np.where(rows == NO_ROW, NO_ROW, self.positions[np.maximum(rows - self.first_row, 0)])
        if num_candidates > enough:
            found = self._nearest(queries, found, enough)
        return best(self._hits(queries, found), k)

    def at(self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Hits:
        """What `queries` (queries, dim) would score with corpus `rows` (queries, n), where this shard holds them."""
        return self._hits(queries, self._positions_of(rows))

    def judged(self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What the second model's `queries` (queries, dim) score with corpus `rows` (queries, n); -inf for others'."""
        assert self.judge is not None  # noqa: S101 (narrows the type)
        found = self._positions_of(rows)
        return np.where(found == NO_ROW, -np.inf, inner_products(queries, self.judge, found)).astype(np.float32)

    def texts_of(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """`id` and `text` of corpus rows that this shard holds."""
        return self.texts.take(pa.array(self.positions[rows - self.first_row]))

    def _positions_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where corpus `rows` stand here, -1 for those that another shard holds."""
        here = (rows >= self.first_row) & (rows < self.first_row + len(self.positions))
        return np.where(here, self.positions[np.where(here, rows - self.first_row, 0)], NO_ROW)

    def _nearest(self, queries: npt.NDArray[np.float32], found: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
        """The `k` best of the rows found (queries, n), in no order, in single precision: it is done for many."""
        scores = np.where(found == NO_ROW, -np.inf, inner_products(queries, self.vectors, found, np.float32))
        return np.take_along_axis(found, np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)

    def _hits(self, queries: npt.NDArray[np.float32], found: npt.NDArray[np.int64]) -> Hits:
        there = found != NO_ROW
        scores = np.where(there, inner_products(queries, self.vectors, found), -np.inf).astype(np.float32)
        attributes = [np.asarray(getattr(self, name)[found]) for name in ATTRIBUTES]
        return Hits(scores, *attributes).masked(~there)


def _resident(vectors: Vectors) -> "torch.Tensor | None":
    import torch

    from embedlib.gpu_search import on_gpu

    return on_gpu(vectors, torch.device("cuda"))


class VectorFile:
    """Vectors on their way into one .npy file, checked."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self.path, self.num_rows, self.written = path, num_rows, 0
        self.stored: Vectors | None = None

    def write(self, vectors: Vectors, rows: npt.NDArray[np.int64]) -> None:
        """Append `vectors` (rows, dim) of these corpus rows; DataError for vectors that cannot be."""
        checked(vectors, rows)
        if self.stored is None:
            shape = (self.num_rows, vectors.shape[1])
            self.stored = np.lib.format.open_memmap(self.path, "w+", vectors.dtype, shape)
        if vectors.shape[1] != self.stored.shape[1]:
            raise DataError(
                f"vectors: row {rows[0]} has {vectors.shape[1]} dimensions; expected {self.stored.shape[1]}"
            )
        self.stored[self.written : self.written + len(vectors)] = vectors
        self.written += len(vectors)


def build_shard(
    chunks: Callable[[], Iterable[Chunk]],
    directory: Path,
    empty_index: faiss.Index | None = None,
    judge: Callable[[], Iterable[Chunk]] | None = None,
    on_gpu: bool = False,
) -> None:
    """Write the shard of some chunks, which are read twice.

    `empty_index` is trained, and is filled, with `on_gpu` by the help of a GPU; `judge` gives the same rows with a
    second model's vectors. Raises DataError, naming the row, for a vector that is zero or not finite, and for widths
    that differ.
    """
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    keys = np.concatenate([text_keys(chunk.rows["text"]) for chunk in chunks()])
    _, firsts, numbers = np.unique(keys, return_index=True, return_inverse=True)
    kept = np.sort(firsts)
    np.save(scratch / "keys.npy", keys[kept])
    np.save(scratch / "positions.npy", np.searchsorted(kept, firsts[numbers]))
    write_rows(chunks(), kept, scratch, empty_index, on_gpu)
    if judge is not None:
        vectors = VectorFile(scratch / JUDGE_NAME, len(kept))
        for rows, table in rows_kept(judge(), kept):
            vectors.write(vectors_of(table["vector"]), rows)
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


def rows_kept(chunks: Iterable[Chunk], kept: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
    """Corpus numbers and rows of those at `kept` positions, ascending, of all chunks together."""
    begin = 0
    for chunk in chunks:
        end = begin + len(chunk.rows)
        chosen = kept[slice(*np.searchsorted(kept, [begin, end]))] - begin
        begin = end
        yield chunk.first_row + chosen, chunk.rows.take(pa.array(chosen))


def write_rows(
    chunks: Iterable[Chunk], kept: npt.NDArray[np.int64], directory: Path, index: faiss.Index | None, on_gpu: bool
) -> None:
    """Write all but the keys of the rows at `kept` positions."""
    if index is not None:
        add = adder(index) if on_gpu else index.add_with_ids
    attributes: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("rows", "documents", "langs")}
    stored = VectorFile(directory / "vectors.npy", len(kept))
    texts: pa.RecordBatchFileWriter | None = None
    with ExitStack() as files:
        for numbers, rows in rows_kept(chunks, kept):
            vectors = vectors_of(rows["vector"])
            stored.write(vectors, numbers)
            described = rows.select(["id", "text"])
            if texts is None:
                texts = files.enter_context(pa.ipc.new_file(str(directory / TEXTS_NAME), described.schema))
            texts.write_table(described)
            attributes["rows"].append(numbers)
            for name, column in (("documents", "document"), ("langs", "lang")):
                known = column in rows.column_names
                attributes[name].append(text_keys(rows[column]) if known else np.zeros(len(rows), np.uint64))
            if index is not None:
                add(vectors.astype(np.float32), numbers)
    for name, parts in attributes.items():
        np.save(directory / f"{name}.npy", np.concatenate(parts))
    if index is not None:
        faiss.write_index(index, str(directory / INDEX_NAME))


def checked(vectors: Vectors, rows: npt.NDArray[np.int64]) -> None:
    """DataError naming the first of `rows` whose vector, of `vectors` (rows, dim), is zero or not finite."""
    sizes = np.abs(vectors).max(axis=1, initial=0)
    bad = np.flatnonzero(~np.isfinite(sizes) | (sizes == 0))
    if len(bad):
        kind = "zero" if sizes[bad[0]] == 0 else "not finite"
        raise DataError(f"vectors: row {rows[bad[0]]} and {len(bad) - 1} more: {kind}; expected unit vectors")


def text_keys(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """What tells one text of a column from another: 64 bits of SipHash; 0 for null."""
    texts = np.array(column.to_pylist(), object)
    known = np.array([text is not None for text in texts], np.bool_)
    keys = np.zeros(len(texts), np.uint64)
    keys[known] = pd.util.hash_array(texts[known], categorize=False)
    return keys


def inner_products(
    queries: npt.NDArray[np.float32],
    vectors: Vectors,
    found: npt.NDArray[np.int64],
    dtype: type[np.float32 | np.float64] = np.float64,
) -> npt.NDArray[np.floating]:
    """Inner products of each query (queries, dim) with the vectors it found (queries, k)."""
    scores = np.empty(found.shape, dtype)
    step = max(1, RESCORED_BYTES // (scores.itemsize * max(1, found.shape[1]) * vectors.shape[1]))

    def score(start: int) -> None:
        some = slice(start, start + step)
        candidates = vectors[found[some]].astype(dtype)
        scores[some] = np.matmul(candidates, queries[some, :, None].astype(dtype))[..., 0]

    with ThreadPoolExecutor(faiss.omp_get_max_threads()) as threads:
        list(threads.map(score, range(0, len(queries), step)))
    return scores
