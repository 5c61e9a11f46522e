"""Independent pieces of CPU work side by side, each in a thread with its share of the cores.

The threads of one PyTorch operation meet at its end; threads that each have operations of their own meet once, at the
end of their pieces, and lose less to a machine on which something else runs, too.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Piece], Result], pieces: Sequence[Piece], max_threads: int) -> list[Result]:
    """`function` of each piece, in order, computed by at most `max_threads` threads that share PyTorch's cores."""
    cores = torch.get_num_threads()
    num_threads = min(max_threads, cores, len(pieces))
    if num_threads <= 1:
        return [function(piece) for piece in pieces]

    def run(piece: Piece) -> Result:
        torch.set_num_threads(cores // num_threads)
        return function(piece)

    try:
        return list(_pool(num_threads).map(run, pieces))
    finally:
        torch.set_num_threads(cores)  # for this thread and those to come


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="side-by-side")
