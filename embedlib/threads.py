"""Independent pieces of CPU work side by side, each in a thread with its share of the cores.

The threads of one PyTorch operation meet at its end; threads that each have operations of their own meet once, at the
end of their pieces, and lose less to a machine on which something else runs, too.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

# Python has one interpreter lock: beyond so many threads they would rather wait for it than compute.
MAX_THREADS = 8

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process computes with."""
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "get_num_threads"):  # which a module that is just being imported has not
        return int(torch.get_num_threads())
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(limit) if limit.isdecimal() else os.cpu_count() or 1


def use_cores(number: int) -> None:
    """Compute with so many, in PyTorch too, whether it is imported already or will be."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):
        torch.set_num_threads(number)


def in_threads(function: Callable[[Piece], Result], pieces: Sequence[Piece], num_threads: int) -> list[Result]:
    """`function` of each piece, in order, computed by at most so many threads."""
    num_threads = min(num_threads, len(pieces))
    return list(_pool(num_threads).map(function, pieces)) if num_threads > 1 else [function(piece) for piece in pieces]


def side_by_side(function: Callable[[Piece], Result], pieces: Sequence[Piece], max_threads: int) -> list[Result]:
    """The same, by threads that share PyTorch's cores."""
    import torch  # what does without it calls in_threads

    whole = torch.get_num_threads()
    num_threads = min(max_threads, whole, len(pieces))
    if num_threads <= 1:
        return [function(piece) for piece in pieces]

    def run(piece: Piece) -> Result:
        torch.set_num_threads(whole // num_threads)
        return function(piece)

    try:
        return in_threads(run, pieces, num_threads)
    finally:
        torch.set_num_threads(whole)  # for this thread and those to come


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="side-by-side")
