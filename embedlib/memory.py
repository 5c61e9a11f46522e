"""What a process keeps between steps: the memory of large tensors, and few of the kernels made for their shapes."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
# oneDNN's own cache, and that of what PyTorch calls it by.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT_KERNELS_A_THREAD = 8


def keep_freed_memory(block_bytes: int = 1 << 30) -> None:
    """Tell glibc's allocator to reuse blocks below this size instead of unmapping them; nothing on other C libraries.

    Handing them back after every step costs a page fault for each 4 kB. Where no two steps ask for the same sizes,
    as packed batches do not, what is kept fits less and less of what is asked for, and grows.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)  # autograd's thread would otherwise have an arena too small for large tensors
        mallopt(M_MMAP_THRESHOLD, block_bytes)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def keep_few_kernels(num_threads: int) -> None:
    """Have oneDNN keep fewer of the kernels it makes for each shape of a product, in a process that has made none yet.

    Packed batches hardly ever have a shape twice, and a thousand kernels in either cache are a gigabyte; the layers of
    a model repeat a handful for each of `num_threads`. It is not for a process that answers single texts, whose few
    lengths come again and again. Processes that this one starts inherit it.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS_A_THREAD * num_threads))
