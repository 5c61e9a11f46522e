"""Independent pieces of CPU work side by side, each in a thread with its share of the cores.

The threads of one PyTorch operation meet at its end; threads that each have operations of their own meet once, at the
end of their pieces, and lose less to a machine on which something else runs, too.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

# Python has one interpreter lock: beyond so many threads they would rather wait for it than compute.
MAX_THREADS = 8

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process computes with."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def use_cores(number: int) -> None:
    """Compute with so many, in PyTorch too, whether it is imported already or not at all."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(number)


def side_by_side(function: Callable[[Piece], Result], pieces: Sequence[Piece], max_threads: int) -> list[Result]:
    """`function` of each piece, in order, computed by at most `max_threads` threads that share the cores."""
    whole = cores()
    num_threads = min(max_threads, whole, len(pieces))
    if num_threads <= 1:
        return [function(piece) for piece in pieces]

    def run(piece: Piece) -> Result:
        use_cores(whole // num_threads)
        return function(piece)

    try:
        return list(_pool(num_threads).map(run, pieces))
    finally:
        use_cores(whole)  # for this thread and those to come


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="side-by-side")
