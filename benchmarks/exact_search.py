"""Exact search on one GPU: embedlib's brute force against FAISS's `knn_gpu`, the same vectors in the GPU's memory.

    python -m benchmarks.exact_search [--quick] [--json OUT] [--rows N] [--queries N] [--runs N]

Vectors and queries are unit vectors of chance, stored as float16: what they are does not change the work. Queries
start in the machine's memory and positions end there. `peak_fraction` is 2 · queries · rows · dim over the seconds and
over what a large float16 matrix product reaches in the same run; `recall` is of the best by double precision.
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine
from embedlib.brute_force import brute_force
from embedlib.gpu_index import build_knows_gpus

K = 100
PEAK_SIZE = 8192
JUDGED_QUERIES, JUDGED_ROWS = 64, 65536
EMBEDLIB, FAISS_HALF, FAISS_FLOAT = "embedlib", "faiss knn_gpu, float16", "faiss knn_gpu, float32"

Search = Callable[[], npt.NDArray[np.int64]]


def main() -> None:
    """Run all contestants in turn, print and write what was measured."""
    parser = benchmark_parser(__doc__ or "", "fewer rows and queries")
    parser.add_argument("--rows", type=int, default=2_480_000)
    parser.add_argument("--queries", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.exact_search: no CUDA device here; it measures search on one")
    if options.quick:
        options.rows, options.queries = 100_000, 5_000
    device = torch.device("cuda")
    vectors = unit_vectors(options.rows, options.dim, 0).to(device)
    queries = unit_vectors(options.queries, options.dim, 1).float()
    contestants = searches(queries, vectors)
    best = nearest(queries[:JUDGED_QUERIES].to(device), vectors)
    operations = 2 * options.queries * options.rows * options.dim
    peak = peak_flops(device)
    runs = []
    for name, search in contestants.items():
        search()
        seconds, found = timed(search, options.runs or (1 if options.quick else 3))
        runs.append(
            {
                "contestant": name,
                "seconds": seconds,
                "tflops": operations / median(seconds) / 1e12,
                "peak_fraction": operations / median(seconds) / peak,
                "recall": float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found[: len(best)], strict=True)])),
            }
        )
    middle = {run["contestant"]: median(run["seconds"]) for run in runs}
    peers = [seconds for name, seconds in middle.items() if name != EMBEDLIB]
    ratios = {"exact_search_vs_faiss": min(peers) / middle[EMBEDLIB]} if peers else {}
    print_runs(runs, options.rows, options.queries, peak)
    size = {"rows": options.rows, "queries": options.queries, "dim": options.dim, "k": K, "peak_tflops": peak / 1e12}
    write_result(options.json, {"machine": describe_machine() | size, "runs": runs, "ratios": ratios})


def searches(queries: torch.Tensor, vectors: torch.Tensor) -> dict[str, Search]:
    """The contestants; FAISS only where its build knows GPUs."""
    found: dict[str, Search] = {EMBEDLIB: lambda: brute_force(queries.numpy(), vectors, K, block_rows=len(vectors))}
    if build_knows_gpus():
        from faiss.contrib import torch_utils  # noqa: F401 (teaches knn_gpu PyTorch's tensors)

        resources = faiss.StandardGpuResources()
        single = vectors.float()

        def by_faiss(stored: torch.Tensor) -> npt.NDArray[np.int64]:
            asked = queries.to(vectors.device, stored.dtype)
            _, places = faiss.knn_gpu(resources, asked, stored, K, metric=faiss.METRIC_INNER_PRODUCT)
            return np.asarray(places.cpu().numpy())

        found |= {FAISS_HALF: lambda: by_faiss(vectors), FAISS_FLOAT: lambda: by_faiss(single)}
    return found


def unit_vectors(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    """(num_rows, dim) float16 of length one."""
    raw = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(raw, dim=1).half()


def nearest(queries: torch.Tensor, vectors: torch.Tensor) -> npt.NDArray[np.int64]:
    """Positions of the best K in double precision, (queries, K)."""
    parts = [queries.double() @ part.double().T for part in vectors.split(JUDGED_ROWS)]
    return np.asarray(torch.cat(parts, 1).topk(min(K, len(vectors))).indices.cpu().numpy())


def timed(search: Search, num_runs: int) -> tuple[list[float], npt.NDArray[np.int64]]:
    """Seconds of each run, and what the last one found."""
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        found = search()
        seconds.append(time.perf_counter() - start)
    return seconds, found


def peak_flops(device: torch.device) -> float:
    """Operations a second of a large float16 product."""
    matrix = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).half()
    events = []
    for _ in range(10):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        matrix @ matrix
        after.record()
        events.append((before, after))
    torch.cuda.synchronize(device)
    seconds = min(float(before.elapsed_time(after)) / 1e3 for before, after in events)
    return 2 * PEAK_SIZE**3 / seconds


def print_runs(runs: list[dict[str, Any]], num_rows: int, num_queries: int, peak: float) -> None:
    """One line a contestant."""
    title = f"best {K} of {num_queries:,} queries among {num_rows:,} rows; peak {peak / 1e12:.0f} TFLOP/s (float16)"
    table = Table(title=title)
    for column in ("contestant", "seconds", "TFLOP/s", "% of peak", "recall"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for run in runs:
        seconds = median(run["seconds"])
        share = f"{100 * run['peak_fraction']:.1f}"
        table.add_row(run["contestant"], f"{seconds:.2f}", f"{run['tflops']:.0f}", share, f"{run['recall']:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
