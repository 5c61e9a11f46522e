"""Exact search: the largest inner products with all of the vectors, on CPUs by FAISS, or on a GPU that has them."""

from typing import TYPE_CHECKING, Union

import faiss
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the processes of shards on CPUs do without PyTorch, which takes seconds and memory to import
    import torch

Vectors = npt.NDArray[np.floating]


def brute_force(
    queries: npt.NDArray[np.float32], vectors: Union[Vectors, "torch.Tensor"], k: int, block_rows: int
) -> npt.NDArray[np.int64]:
    """Positions in `vectors` (rows, dim) of the `k` largest inner products, (queries, at most k), in no order.

    Vectors of a GPU are searched there; of others only `block_rows` are in memory at a time as float32.
    """
    k = min(k, len(vectors))
    if not isinstance(vectors, np.ndarray):
        from embedlib.gpu_search import search_on_gpu

        return search_on_gpu(queries, vectors, k)
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(vectors), block_rows):
        block = np.ascontiguousarray(vectors[start : start + block_rows], np.float32)
        scores, found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, found + start)
    return np.asarray(heap.I)
