"""One FAISS index: train, add, save; read it with `faiss.read_index`."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedlib.errors import ConfigError, DataError

# Enough to place a centroid well; more costs time alone.
TRAINING_VECTORS_A_LIST = 256
DEFAULT_LISTS = 1024

Rows = Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]


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
            index = _new_index(vectors.shape[1], factory)
            if not index.is_trained:
                index.train(_sample(parts(), _training_rows(index)))
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), ids.astype(np.int64))
    if index is None:
        raise DataError("index: no vectors")
    return index


def write_index(parts: Callable[[], Rows], path: Path, factory: str) -> int:
    """Build an index and put its file in place when whole; return how many vectors it holds."""
    index = build_index(parts, factory)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    faiss.write_index(index, str(scratch))
    scratch.replace(path)
    return int(index.ntotal)


def _new_index(dim: int, factory: str) -> faiss.Index:
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"index_factory: {factory!r}: FAISS does not know it for {dim} dimensions") from error
    # An inverted file keeps ids itself; the other kinds number their vectors.
    return index if isinstance(index, faiss.IndexIVF) else faiss.IndexIDMap2(index)


def _training_rows(index: faiss.Index) -> int:
    lists = index.nlist if isinstance(index, faiss.IndexIVF) else DEFAULT_LISTS
    return int(lists) * TRAINING_VECTORS_A_LIST


def _sample(parts: Rows, num_rows: int) -> npt.NDArray[np.float32]:
    return np.concatenate(list(_until(parts, num_rows)))


def _until(parts: Rows, num_rows: int) -> Iterator[npt.NDArray[np.float32]]:
    for _, vectors in parts:
        yield np.ascontiguousarray(vectors[:num_rows], np.float32)
        num_rows -= len(vectors)
        if num_rows <= 0:
            return
