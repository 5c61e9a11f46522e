"""What a benchmark runs on: the machine, the matrix products it reaches, and processes that start cold."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from embedlib.encoder import default_device, fast_dtype
from embedlib.memory import keep_freed_memory

if TYPE_CHECKING:  # a process whose memory is measured imports what it uses
    import torch

T = TypeVar("T")

MATMUL_SIZE, MATMUL_RUNS = 2048, 5
SAMPLE_SECONDS, LONGEST_PAUSE, WATCHING_SHARE = 0.2, 1.0, 0.1


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` in a process that has done nothing before: no warm caches, threads or allocator settings."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def watched_memory(held: Callable[[], int]) -> Iterator[list[int]]:
    """The most bytes that `held` told of while it is open, in a list of one.

    Counting the pages of many processes takes a tenth of a second of a core, so it is done less often where it is slow:
    a peak of less than a second may be missed.
    """
    peak, done = [0], threading.Event()

    def watch() -> None:
        pause = SAMPLE_SECONDS
        while not done.wait(pause):
            start = time.perf_counter()
            peak[0] = max(peak[0], held())
            pause = min(max(SAMPLE_SECONDS, (time.perf_counter() - start) / WATCHING_SHARE), LONGEST_PAUSE)
        peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def describe_machine() -> dict[str, Any]:
    """What the rates were measured on, with the matrix products it reaches."""
    import torch

    device = default_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": name_of(fast_dtype(device)),
        # The fast one alone besides: without hardware for it bfloat16 takes minutes.
        "matmul_gflops": {
            name_of(dtype): matmul_gflops(dtype, device) for dtype in {torch.float32, fast_dtype(device)}
        },
    }


def cpu_model() -> str:
    """The processor's name, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def name_of(dtype: "torch.dtype") -> str:
    """`torch.float32` → `float32`."""
    return str(dtype).removeprefix("torch.")


def matmul_gflops(dtype: "torch.dtype", device: "torch.device") -> float:
    """The best of several square matrix products, in 10⁹ operations a second; int8 adds up in int32."""
    import torch

    if device.type == "cpu":
        keep_freed_memory()  # pages asked for anew are no part of the product
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    seconds = []
    for _ in range(MATMUL_RUNS + 1):  # the first is slower: it sets up the kernel
        start = time.perf_counter()
        multiply(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / min(seconds) / 1e9
