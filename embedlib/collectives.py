"""Exchange between training processes; the identity where there is one process."""

import torch
from torch import distributed


def world_size() -> int:
    """Number of training processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process' number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def all_gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all processes in rank order, (sum of rows, dim), and where this process' own begin. No gradient.

    Processes may bring different numbers of rows.
    """
    if world_size() == 1:
        return rows.detach(), 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    distributed.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    joined = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return joined, sum(sizes[: rank()])


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest `value` of all processes."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def from_first_process(value: float, device: torch.device) -> float:
    """What the first process has, in all of them: where they must agree to the last bit, as on when to stop."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device, dtype=torch.float64)
    distributed.broadcast(shared, 0)
    return float(shared)
