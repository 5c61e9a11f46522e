"""Inverted lists on a GPU, by FAISS: learned, filled and searched there, as far as its kernels go.

Which kinds and how many results its own kernels can do, without cuVS: https://github.com/facebookresearch/faiss/wiki/Faiss-on-the-GPU
and the code of 1.15.
"""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from faiss.contrib.ivf_tools import add_preassigned

SCALARS = ("QT_8bit", "QT_8bit_uniform", "QT_8bit_direct", "QT_4bit", "QT_4bit_uniform", "QT_fp16")
PRODUCT_BITS = 8
PRODUCTS = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}
# Tables of more than this do not fit a multiprocessor's shared memory as float32.
SINGLE_TABLES = 48
MOST_RESULTS = MOST_LISTS = 2048
# Beyond this a kernel over codes of bytes or of four bits takes the process down: FAISS 1.15.1 on an H100 gave 512, and
# not 1024.
MOST_OF_CODES = 512
ID_BYTES = 8
# What FAISS sets aside in each process; and what a search takes besides, a vector for every query and list.
SCRATCH_BYTES = 3 << 29
RESIDUAL_BYTES = 1 << 30


def has_kernels(index: faiss.Index) -> bool:
    """Whether a GPU can search this kind: lists of numbers, of bytes, or of 8-bit products."""
    if not (isinstance(index, faiss.IndexIVF) and isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat)):
        return False
    # Of kinds that derive from these there are some that only CPUs know.
    if type(index) is faiss.IndexIVFScalarQuantizer:
        return any(index.sq.qtype == getattr(faiss.ScalarQuantizer, name) for name in SCALARS)
    if type(index) is faiss.IndexIVFPQ:
        return index.pq.nbits == PRODUCT_BITS and index.pq.M in PRODUCTS
    return type(index) is faiss.IndexIVFFlat


def build_knows_gpus() -> bool:
    """Whether the FAISS that is installed is the one with kernels for GPUs."""
    return hasattr(faiss, "StandardGpuResources")


def is_on_gpu(index: faiss.Index) -> bool:
    """Whether it is such a copy; FAISS's build for CPUs has none."""
    return isinstance(index, getattr(faiss, "GpuIndexIVF", ()))


def within_limits(index: faiss.Index, k: int, nprobe: int) -> bool:
    """Whether a GPU can give so many results of an index that `has_kernels`, out of so many lists."""
    is_coded = isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype != faiss.ScalarQuantizer.QT_fp16
    return k <= (MOST_OF_CODES if is_coded else MOST_RESULTS) and nprobe <= MOST_LISTS


def lists_on_gpu(index: Any) -> Any:
    """A GPU's copy of a filled index that `has_kernels`; none where it would leave no room for the search."""
    import torch

    from embedlib.gpu_search import has_room

    centroids = index.nlist * index.d * np.dtype(np.float32).itemsize
    num_bytes = index.ntotal * (index.code_size + ID_BYTES) + centroids + SCRATCH_BYTES
    if not has_room(num_bytes, torch.device("cuda")):
        return None
    return copied(index)


def copied(index: faiss.Index) -> Any:
    """A GPU's copy of an index."""
    options = faiss.GpuClonerOptions()
    options.useFloat16 = isinstance(index, faiss.IndexIVFPQ) and index.pq.M > SINGLE_TABLES
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def search_lists(lists: faiss.Index, queries: npt.NDArray[np.float32], k: int, nprobe: int) -> npt.NDArray[np.int64]:
    """Ids of the `k` best (queries, k) that a GPU finds for `queries` (queries, dim) in `nprobe` lists; -1 for none."""
    parameters = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
    found = [lists.search(some, k, params=parameters)[1] for some in queries_at_once(queries, nprobe)]
    return np.concatenate(found) if found else np.empty((0, k), np.int64)


def queries_at_once(queries: npt.NDArray[np.float32], nprobe: int) -> list[npt.NDArray[np.float32]]:
    """`queries` (queries, dim) in runs for which a GPU has room."""
    run = max(1, RESIDUAL_BYTES // (nprobe * queries.shape[1] * queries.itemsize))
    return [queries[start : start + run] for start in range(0, len(queries), run)]


def adder(index: Any) -> Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64]], None]:
    """What adds vectors (rows, dim) of these ids (rows,) to a trained index; a GPU finds the lists."""
    quantizer = copied(index.quantizer)

    def add(vectors: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> None:
        add_preassigned(index, vectors, quantizer.search(vectors, 1)[1][:, 0], ids)  # type: ignore[no-untyped-call]

    return add


def train_on_gpu(index: faiss.Index, vectors: npt.NDArray[np.float32]) -> None:
    """Train an index of inverted lists with `vectors` (rows, dim); a GPU finds the lists."""
    inverted = faiss.extract_index_ivf(index)
    centroids = copied(faiss.IndexFlatIP(inverted.d))
    inverted.clustering_index = centroids
    index.train(vectors)
    inverted.clustering_index = None  # type: ignore[assignment]
