"""What distillation reads at random: token ids and teacher vectors of every sample, as memory-mapped arrays.

Parquet is for streaming; a random batch of 512 rows needs an array. Tokens lie end to end in one file with offsets in
another, vectors in a third, so that a corpus of any size costs a process no memory beyond the pages it touches.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap as open_sparse_memmap

from embedlib.batching import TokenIds
from embedlib.errors import DataError

TOKENS, OFFSETS, VECTORS = "tokens.npy", "offsets.npy", "vectors.npy"


class DistillationSet(NamedTuple):
    """Samples by index: token ids of the student's tokenizer and the teacher's vector."""

    tokens: npt.NDArray[np.int32]
    """All token ids end to end."""
    offsets: npt.NDArray[np.int64]
    """Where each sample's tokens begin, and the end of the last, (num_samples + 1,)."""
    vectors: npt.NDArray[np.float16]
    """Teacher vectors before normalisation, (num_samples, dim)."""

    @classmethod
    def open(cls, directory: Path) -> "DistillationSet":
        """Map the arrays of `directory`, read-only."""
        return cls(*(np.load(directory / name, mmap_mode="r") for name in (TOKENS, OFFSETS, VECTORS)))

    @classmethod
    def of(cls, tokens: Sequence[TokenIds], vectors: npt.NDArray[np.float16]) -> "DistillationSet":
        """A small set held in memory."""
        offsets = np.cumsum([0, *(len(sequence) for sequence in tokens)])
        return cls(np.concatenate(tokens), offsets, vectors)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1

    def lengths(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each of the samples `rows`."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def samples(self, rows: npt.NDArray[np.int64]) -> tuple[Sequence[TokenIds], torch.Tensor]:
        """Token ids and teacher vectors (len(rows), dim) float32 of the samples `rows`."""
        tokens = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return tokens, torch.from_numpy(self.vectors[rows].astype(np.float32))


def new_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A new array file mapped for writing, its blocks reserved: a full disk is an OSError here, not a SIGBUS later."""
    array: npt.NDArray[Any] = open_sparse_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def write_tokens(directory: Path, num_samples: int, batches: Iterable[Sequence[TokenIds]]) -> None:
    """Write token ids that arrive in sample order, in batches, without holding them all."""
    offsets = new_array(directory / OFFSETS, np.int64, (num_samples + 1,))
    row = 0
    raw = directory / "tokens.raw"
    with raw.open("wb") as file:
        for batch in batches:
            for sequence in batch:
                if row == num_samples:
                    raise DataError(f"{directory}: got more than {num_samples} token sequences; expected {num_samples}")
                sequence.astype(np.int32).tofile(file)
                offsets[row + 1] = offsets[row] + len(sequence)
                row += 1
    if row != num_samples:
        raise DataError(f"{directory}: got {row} token sequences; expected {num_samples}")
    tokens = new_array(directory / TOKENS, np.int32, (int(offsets[-1]),))
    tokens[:] = np.memmap(raw, dtype=np.int32, mode="r")
    raw.unlink()


def write_vectors(
    directory: Path,
    num_samples: int,
    dim: int,
    batches: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]],
) -> None:
    """Write teacher vectors that arrive as (ids, rows) in any order; DataError unless every id comes exactly once."""
    vectors = new_array(directory / VECTORS, np.float16, (num_samples, dim))
    seen = np.zeros(num_samples, dtype=np.int64)
    for ids, rows in batches:
        vectors[ids] = rows
        np.add.at(seen, ids, 1)
    if (seen != 1).any():
        missing, repeated = int((seen == 0).sum()), int((seen > 1).sum())
        raise DataError(
            f"{directory}: teacher vectors of {num_samples} samples: {missing} missing, {repeated} repeated"
        )
