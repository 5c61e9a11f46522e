"""One FAISS index: train, add, search, save; several merged into one. What is written, `faiss.read_index` reads."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
from faiss.contrib.ivf_tools import search_preassigned

from embedlib.errors import ConfigError, DataError
from embedlib.gpu_index import is_on_gpu, search_lists, train_on_gpu

# FAISS wants 39 at least, and time grows with them; what recall comes of it, the job measures.
TRAINING_VECTORS_A_LIST = 64
DEFAULT_LISTS = 1024

Rows = Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]


class Assignment(NamedTuple):
    """The lists of an inverted file that are nearest to each query, the same for all shards of one training."""

    lists: npt.NDArray[np.int64]
    """(queries, nprobe)."""
    scores: npt.NDArray[np.float32]
    """(queries, nprobe) against their centroids."""


def build_index(parts: Callable[[], Rows], factory: str) -> faiss.Index:
    """An inner-product index over ids (rows,) and vectors (rows, dim), streamed twice where it has to be trained.

    Raises ConfigError for a factory string that FAISS does not know, DataError without vectors or for ids that are
    no integers.
    """
    index = None
    for ids, vectors in parts():
        if not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"index: ids are {ids.dtype}; expected integers. Leave columns.id out to number the rows.")
        if index is None:
            index = train_index(lambda num_rows: _sample(parts(), num_rows), vectors.shape[1], factory)
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), ids.astype(np.int64))
    if index is None:
        raise DataError("index: no vectors")
    return index


def train_index(
    sample: Callable[[int], npt.NDArray[np.float32]], dim: int, factory: str, on_gpu: bool = False
) -> faiss.Index:
    """An empty index that knows what it has to learn from vectors: `sample` gives at most so many (rows, dim).

    With `on_gpu` this process's GPU learns the lists of an inverted file.
    """
    index = new_index(dim, factory)
    if not index.is_trained:
        inverted = faiss.try_extract_index_ivf(index)
        lists = inverted.nlist if inverted else DEFAULT_LISTS
        vectors = sample(lists * TRAINING_VECTORS_A_LIST)
        if inverted and len(vectors) < lists:
            raise ConfigError(f"index_factory: {factory!r} has {lists} lists; {len(vectors)} vectors cannot train it")
        if inverted and on_gpu:
            train_on_gpu(index, vectors)
        else:
            index.train(vectors)
    # An inverted file keeps ids itself; the other kinds number their vectors.
    return index if faiss.try_extract_index_ivf(index) else faiss.IndexIDMap2(index)


def new_index(dim: int, factory: str) -> faiss.Index:
    """An inner-product index that has learned nothing; ConfigError for a kind that FAISS does not know."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"index_factory: {factory!r}: FAISS does not know it for {dim} dimensions") from error


def code_size(factory: str, dim: int) -> int:
    """Bytes that a vector's code takes in such an index, its id and a graph's links apart; ConfigError as above."""
    index = new_index(dim, factory)
    if inverted := faiss.try_extract_index_ivf(index):
        return int(inverted.code_size)
    return int((index.storage if isinstance(index, faiss.IndexHNSW) else index).sa_code_size())


def write_index(parts: Callable[[], Rows], path: Path, factory: str) -> int:
    """Build an index and put its file in place when whole; return how many vectors it holds."""
    index = build_index(parts, factory)
    save_index(index, path)
    return int(index.ntotal)


def save_index(index: faiss.Index, path: Path) -> None:
    """Put the file of an index in place when whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    faiss.write_index(index, str(scratch))
    scratch.replace(path)


def read_index(path: Path) -> faiss.Index:
    """An index whose vectors stay on disk until they are looked at, as far as its kind allows."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def assign(index: faiss.Index, queries: npt.NDArray[np.float32], nprobe: int) -> Assignment | None:
    """Which lists `search_index` shall look into for `queries` (queries, dim); none for kinds that have no lists."""
    if not isinstance(index, faiss.IndexIVF):
        return None
    scores, lists = index.quantizer.search(queries, min(nprobe, index.nlist))
    return Assignment(lists, scores)


def search_index(
    index: faiss.Index, queries: npt.NDArray[np.float32], k: int, nprobe: int, assignment: Assignment | None
) -> npt.NDArray[np.int64]:
    """Ids of the `k` best (queries, k) for `queries` (queries, dim), -1 where there are fewer.

    `nprobe` is how many lists of an inverted file are looked into, or how widely a graph is searched. Without an
    `assignment`, and on a GPU, the index finds the lists by itself.
    """
    if is_on_gpu(index):
        return search_lists(index, queries, k, nprobe)
    if assignment is not None:
        inverted: Any = index
        inverted.nprobe = assignment.lists.shape[1]
        return np.asarray(search_preassigned(inverted, queries, k, assignment.lists, assignment.scores)[1])  # type: ignore[no-untyped-call]
    return np.asarray(index.search(queries, k, params=_parameters(index, k, nprobe))[1])


def _parameters(index: faiss.Index, k: int, nprobe: int) -> Any:
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    if isinstance(inner, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(nprobe, k))  # type: ignore[attr-defined]
    inverted = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
    if isinstance(inner, faiss.IndexIVF):
        return inverted
    if isinstance(inner, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=inverted)  # type: ignore[call-arg]
    return None


def read_inverted(path: Path, flags: int = 0) -> faiss.IndexIVF:
    """An index that can be merged with others of its training; ConfigError where it is of a kind that cannot."""
    index = faiss.read_index(str(path), flags)
    if not isinstance(index, faiss.IndexIVF):
        raise ConfigError(f"merge: {path} has no inverted lists; expected an index of an IVF kind")
    return index


def merge_indexes(trained: Path, shards: Sequence[Path], path: Path, base: Path | None = None) -> None:
    """One index file over those of several shards of one training; its lists lie in `path` + "lists", read as needed.

    `base` is a merged index of the same training, whose lists come first. Raises ConfigError for kinds that cannot be
    merged.
    """
    index = read_inverted(trained)
    # FAISS 1.15 crashes over lists that are on disk already if it is told to map them; those stay there anyway.
    merged = [read_inverted(base, faiss.IO_FLAG_READ_ONLY)] if base else []
    merged += [read_inverted(shard, faiss.IO_FLAG_MMAP) for shard in shards]
    lists = path.with_name(f"{path.stem}.lists")
    lists.unlink(missing_ok=True)  # of a run that did not come to its end
    on_disk = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(lists))
    pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for part in merged:
        pointers.push_back(part.invlists)
    index.ntotal = on_disk.merge_from_multiple(pointers.data(), pointers.size(), False)
    index.replace_invlists(on_disk, True)
    on_disk.this.disown()  # type: ignore[attr-defined] # the index owns them now
    save_index(index, path)


def _sample(parts: Rows, num_rows: int) -> npt.NDArray[np.float32]:
    """An even share of all vectors, at most `num_rows`: the first of them may be of one file, or of one language."""
    kept: list[npt.NDArray[np.float32]] = []
    step, seen = 1, 0
    for _, vectors in parts:
        kept.append(np.ascontiguousarray(vectors[-seen % step :: step], np.float32))
        seen += len(vectors)
        while sum(map(len, kept)) >= 2 * num_rows:
            kept, step = [np.concatenate(kept)[::2].copy()], 2 * step
    every = np.concatenate(kept)
    return every[np.linspace(0, len(every) - 1, min(num_rows, len(every))).round().astype(np.int64)]
