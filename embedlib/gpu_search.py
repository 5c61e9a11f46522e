"""Exact search on a GPU, by PyTorch.

The time goes to the scores, one for each query and vector, which pass through memory. They are written once and read
once, for the maximum of each group of neighbours: the k largest scores lie in the k groups with the largest maxima,
and nothing else is looked at again. Vectors stored as float16 are multiplied as they are, with sums in float32; a query
is the sum of two float16 numbers, or one where that is all of it, so that nothing is lost.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

# Scores of one product, float32: 2 GiB.
GPU_QUERIES, GPU_ROWS = 2048, 262144
GROUP = 64
# Of a GPU's free memory: the rest is for scores and for what else runs there.
RESIDENT_SHARE = 0.6


def search_on_gpu(queries: npt.NDArray[np.float32], vectors: torch.Tensor, k: int) -> npt.NDArray[np.int64]:
    """Positions in `vectors` (rows, dim) of the `k` largest inner products, (queries, k), in no order."""
    parts = torch.from_numpy(np.ascontiguousarray(queries)).split(GPU_QUERIES)
    return np.concatenate([largest_products(part.to(vectors.device), vectors, k).cpu().numpy() for part in parts])


def on_gpu(vectors: npt.NDArray[np.floating], device: torch.device) -> torch.Tensor | None:
    """A GPU's copy of `vectors` (rows, dim); none for a CPU, and where they would leave no room for the scores."""
    if not has_room(vectors.nbytes, device):
        return None
    resident = torch.empty(vectors.shape, dtype=torch.from_numpy(vectors[:0].copy()).dtype, device=device)
    for start in range(0, len(vectors), GPU_ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + GPU_ROWS]))
        resident[start : start + GPU_ROWS] = block.to(device)
    return resident


def has_room(num_bytes: int, device: torch.device) -> bool:
    """Whether so much may stay in a GPU's memory."""
    return device.type != "cpu" and num_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def largest_products(queries: torch.Tensor, vectors: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the `k` largest inner products of `queries` (queries, dim) float32 with `vectors` (rows, dim)."""
    halves = list(_as_sum(queries, vectors.dtype))
    best = torch.empty(len(queries), 0, device=vectors.device)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), GPU_ROWS):
        scores, found = _largest(_products(halves, vectors[start : start + GPU_ROWS]), k)
        best, positions = torch.cat([best, scores], 1), torch.cat([positions, found + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), sorted=False)
        positions = positions.gather(1, kept)
    return positions


def _as_sum(queries: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Terms of `dtype` that add up to `queries`: to 22 bits, where one float16 is not all of them."""
    first = queries.to(dtype)
    yield first
    rest = queries - first.float()
    if rest.any():
        yield rest.to(dtype)


def _products(terms: list[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
    """(queries, rows) float32: inner products of the sum of the terms (queries, dim) with a block (rows, dim)."""
    if block.dtype == torch.float32 or not block.is_cuda:
        return torch.stack(terms).float().sum(0) @ block.float().T
    products = [torch.mm(term, block.T, out_dtype=torch.float32) for term in terms]
    return products[0] if len(products) == 1 else products[0].add_(products[1])


def _largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of each row of `scores` (queries, rows), or all there are, and where they stand."""
    num_rows = scores.shape[1]
    if short := -num_rows % GROUP:
        scores = functional.pad(scores, (0, short), value=-torch.inf)
    groups = scores.view(len(scores), -1, GROUP)
    maxima = groups.amax(2)
    chosen = maxima.topk(min(k, maxima.shape[1]), sorted=False).indices
    candidates = groups.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1)
    best, places = candidates.topk(min(k, num_rows), sorted=False)
    return best, chosen.gather(1, places // GROUP) * GROUP + places % GROUP
