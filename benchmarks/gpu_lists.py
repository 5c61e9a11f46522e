"""Inverted lists on one GPU: learned, filled and searched there, against the same index on CPUs and exact search.

    python -m benchmarks.gpu_lists [--quick] [--json OUT] [--rows N] [--queries N] [--kind SQ8]

Vectors are unit vectors of chance whose directions differ in variance as 1 to rank, as those of texts do more or less,
stored as float16. `nprobe` is raised by half until the exact ten best are among the candidates, as jobs/mine.py wants
it. Candidates go to the machine's memory, where a shard compares them by their own vectors, which is not counted. CPUs
get a part of the training, of the filling and of the queries, and are counted for all of it.
"""

import sys
import time
from collections.abc import Callable, Iterator
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
from embedlib.gpu_index import MOST_LISTS, adder, lists_on_gpu
from embedlib.index import TRAINING_VECTORS_A_LIST, search_index, train_index
from embedlib.shard import SLACK
from embedlib.topk import recall

GPU = torch.device("cuda")
DIM, K, RECALL_AT, MIN_RECALL = 384, 100, 10, 0.95
ROWS_A_LIST = 512
BLOCK_ROWS, BLOCK_QUERIES = 262_144, 8192
SAMPLED_QUERIES = 256
# What CPUs get of the work.
CPU_LISTS, CPU_ROWS, CPU_QUERIES = 4096, 100_000, 4096


def main() -> None:
    """Measure, print and write."""
    parser = benchmark_parser(__doc__ or "", "fewer rows and queries")
    parser.add_argument("--rows", type=int, default=2_480_000)
    parser.add_argument("--queries", type=int, default=200_000)
    parser.add_argument("--kind", default="SQ8", help="codes in the lists, as faiss.index_factory names them")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_lists: no CUDA device here; it measures search on one")
    if options.quick:
        options.rows, options.queries = 100_000, 5_000
    num_runs = options.runs or (1 if options.quick else 3)
    vectors, queries = vectors_of_chance(options.rows, 0), vectors_of_chance(options.queries, 1).astype(np.float32)
    lists = 1 << round(np.log2(options.rows / ROWS_A_LIST))
    measured = measure(vectors, queries, f"IVF{lists},{options.kind}", num_runs)
    print_runs(measured["runs"], options.rows, options.queries, f"IVF{lists},{options.kind}")
    size = {"rows": options.rows, "queries": options.queries, "dim": DIM, "k": K, "lists": lists}
    write_result(options.json, {"machine": describe_machine() | size} | measured)


def measure(
    vectors: npt.NDArray[np.float16], queries: npt.NDArray[np.float32], factory: str, num_runs: int
) -> dict[str, Any]:
    """Seconds of each step on CPUs and on the GPU, and what is found."""
    index, learned = measure_learning(vectors, factory)
    print(f"learned {learned}", flush=True)
    filled = measure_filling(vectors, index)
    print(f"filled {filled}", flush=True)
    lists, copy_s = timed(lambda: lists_on_gpu(index))
    print(f"copied {copy_s}", flush=True)
    resident = torch.from_numpy(vectors).to(GPU)
    exact = brute_force(queries[:SAMPLED_QUERIES], resident, RECALL_AT, len(vectors))
    nprobe = 16
    while (found := found_of(lists, queries, nprobe, exact)) < MIN_RECALL and nprobe < MOST_LISTS:
        nprobe = min(nprobe * 3 // 2, MOST_LISTS)
    print(f"nprobe {nprobe}: {found:.3f} of the exact {RECALL_AT} best", flush=True)
    searches: dict[str, Callable[[npt.NDArray[np.float32]], Any]] = {
        "gpu": lambda block: search_index(lists, block, K + SLACK, nprobe, None),
        "exact, gpu": lambda block: brute_force(block, resident, K + SLACK, len(vectors)),
    }
    searched = {}
    for name, search in searches.items():
        search(queries[:BLOCK_QUERIES])
        searched[name] = median(
            timed(lambda search=search: list(map(search, blocks(queries))))[1] for _ in range(num_runs)
        )
    few = queries[:CPU_QUERIES]
    expected, seconds = timed(lambda: search_index(index, few, K + SLACK, nprobe, None))
    searched["cpu"] = seconds * len(queries) / len(few)
    steps = {"learn": learned, "fill": filled, "search": searched}
    return {
        "runs": [
            {"step": step, "where": where, "seconds": seconds}
            for step, measured in steps.items()
            for where, seconds in measured.items()
        ],
        "ratios": {f"{step}_gpu_vs_cpu": measured["cpu"] / measured["gpu"] for step, measured in steps.items()}
        | {"search_lists_vs_exact": searched["exact, gpu"] / searched["gpu"]},
        "recall_at_10": found,
        "nprobe": nprobe,
        "copy_seconds": copy_s,
        "same_as_cpu": recall(search_index(lists, few, K + SLACK, nprobe, None), expected),
    }


def measure_learning(vectors: npt.NDArray[np.float16], factory: str) -> tuple[faiss.Index, dict[str, float]]:
    """The empty index, and the seconds of learning it."""
    lists, _, kind = factory.removeprefix("IVF").partition(",")
    places = np.linspace(0, len(vectors) - 1, min(len(vectors), TRAINING_VECTORS_A_LIST * int(lists)))
    sample = vectors[places.astype(np.int64)].astype(np.float32)
    index, on_gpu = timed(lambda: train_index(lambda num_rows: sample[:num_rows], DIM, factory, on_gpu=True))
    fewer = min(CPU_LISTS, int(lists))
    _, on_cpu = timed(lambda: train_index(lambda num_rows: sample[:num_rows], DIM, f"IVF{fewer},{kind}"))
    # Vectors grow with the lists, and so do the products with each.
    return index, {"gpu": on_gpu, "cpu": on_cpu * (int(lists) / fewer) ** 2}


def measure_filling(vectors: npt.NDArray[np.float16], index: faiss.Index) -> dict[str, float]:
    """The seconds of filling an empty index, which has all vectors afterwards."""
    num_rows = min(CPU_ROWS, len(vectors))
    _, on_cpu = timed(lambda: fill(vectors[:num_rows], index.add_with_ids))
    index.reset()
    _, on_gpu = timed(lambda: fill(vectors, adder(index)))
    return {"gpu": on_gpu, "cpu": on_cpu * len(vectors) / num_rows}


def found_of(index: faiss.Index, queries: npt.NDArray[np.float32], nprobe: int, exact: npt.NDArray[np.int64]) -> float:
    """Share of the exact ten best of a sample of the queries that the index finds."""
    return recall(search_index(index, queries[:SAMPLED_QUERIES], RECALL_AT + SLACK, nprobe, None), exact)


def vectors_of_chance(num_rows: int, seed: int) -> npt.NDArray[np.float16]:
    """(num_rows, DIM) of length one."""
    chance = torch.Generator(GPU).manual_seed(seed)
    spread = torch.arange(1, DIM + 1, device=GPU) ** -0.5
    found = np.empty((num_rows, DIM), np.float16)
    for start in range(0, num_rows, BLOCK_ROWS):
        some = found[start : start + BLOCK_ROWS]
        raw = torch.randn(len(some), DIM, generator=chance, device=GPU) * spread
        some[:] = torch.nn.functional.normalize(raw, dim=1).half().cpu().numpy()
    return found


def blocks(queries: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """Queries as a miner sends them."""
    return (queries[start : start + BLOCK_QUERIES] for start in range(0, len(queries), BLOCK_QUERIES))


def fill(vectors: npt.NDArray[np.float16], add: Callable[[npt.NDArray[Any], npt.NDArray[Any]], None]) -> None:
    """Add all vectors, block by block."""
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS].astype(np.float32)
        add(block, np.arange(start, start + len(block)))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and its seconds."""
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


def print_runs(runs: list[dict[str, Any]], num_rows: int, num_queries: int, factory: str) -> None:
    """One line a step."""
    table = Table(title=f"{factory}: {num_rows:,} rows, best {K} of {num_queries:,} queries")
    for column in ("step", "where", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for run in runs:
        table.add_row(run["step"], run["where"], f"{run['seconds']:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
