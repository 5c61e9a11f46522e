"""Group token sequences of unequal length so that little of a batch is padding."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

TokenIds = npt.NDArray[np.int32]
NO_TEXT = -1
"""In the place of a text's number where a sample has fewer texts than others."""


def token_budget_batches(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield index arrays, longest sequences first, each with (rows × longest) ≤ `budget` padded tokens.

    A sequence longer than the budget forms a batch of its own. Every index appears exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        rows = max(1, budget // longest)
        yield order[start : start + rows]
        start += rows


def padded_size(lengths: npt.NDArray[np.int64], batches: Iterable[npt.NDArray[np.int64]]) -> int:
    """Tokens of batches of sequences of these lengths, padding included."""
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def padded(sequences: Sequence[TokenIds], pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids padded on the right, and the mask of what is none of the padding, both (batch, longest)."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = np.full((len(sequences), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return input_ids, mask


def pad(sequences: Sequence[TokenIds], pad_id: int, device: "torch.device | str" = "cpu") -> dict[str, "torch.Tensor"]:
    """The same as `input_ids` and `attention_mask` on a device."""
    import torch  # an exported model does without

    input_ids, mask = padded(sequences, pad_id)
    return {
        "input_ids": torch.from_numpy(input_ids).to(device, non_blocking=True),
        "attention_mask": torch.from_numpy(mask).to(device, non_blocking=True),
    }
