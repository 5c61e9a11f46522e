"""What training reads at random: token ids, vectors and which texts make a sample, as memory-mapped arrays.

Parquet is for streaming; a random batch of 512 rows needs an array. Tokens lie end to end in one file with offsets in
another, vectors in a third, so that a corpus of any size costs a process no memory beyond the pages it touches.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap as open_sparse_memmap

from embedlib.batching import NO_TEXT, TokenIds
from embedlib.errors import DataError
from embedlib.objective import Samples

TOKENS, OFFSETS, VECTORS = "tokens.npy", "offsets.npy", "vectors.npy"
SAMPLES, GROUPS, SHARES, SCORES, LABELS = "samples.npy", "groups.npy", "shares.npy", "scores.npy", "labels.npy"
ANSWERS, DATASETS = "answers.npy", "datasets.npy"
CACHED = ("guide", "teacher", "base")
"""Models whose vectors of all texts may lie beside them, each in a directory of its own."""


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


class ContrastiveSet(NamedTuple):
    """Samples by index: which texts they are made of; texts by number: token ids and cached vectors."""

    tokens: npt.NDArray[np.int32]
    """All texts' token ids end to end."""
    offsets: npt.NDArray[np.int64]
    """(num_texts + 1,)."""
    samples: npt.NDArray[np.int64]
    """(num_samples, 2 + most negatives) query, positive and negatives, `NO_TEXT` where there are fewer."""
    groups: npt.NDArray[np.int64]
    """(num_samples,) which are not mixed in a batch."""
    shares: npt.NDArray[np.float64]
    """(groups,) how often an epoch goes through each group."""
    scores: npt.NDArray[np.float32] | None = None
    """(num_samples, 1 + most negatives) a teacher's; nan in a dataset without."""
    labels: npt.NDArray[np.float32] | None = None
    """(num_samples,) nan in a dataset without."""
    vectors: Mapping[str, npt.NDArray[np.float16]] = MappingProxyType({})
    """(num_texts, dim) of each of the models in `CACHED` that there are."""
    answers: npt.NDArray[np.int64] | None = None
    """(pairs, 2) query and positive of the queries that have several positives, ascending."""
    datasets: npt.NDArray[np.int64] | None = None
    """(groups,) number of the dataset that each group is of; none: there is one."""

    @classmethod
    def open(cls, directory: Path) -> "ContrastiveSet":
        """Map the arrays of `directory`, read-only."""

        def mapped(path: Path) -> npt.NDArray[Any] | None:
            return np.load(path, mmap_mode="r") if path.exists() else None

        vectors = {name: mapped(directory / name / VECTORS) for name in CACHED}
        return cls(
            tokens=np.load(directory / TOKENS, mmap_mode="r"),
            offsets=np.load(directory / OFFSETS, mmap_mode="r"),
            samples=np.load(directory / SAMPLES, mmap_mode="r"),
            groups=np.load(directory / GROUPS, mmap_mode="r"),
            shares=np.load(directory / SHARES),
            scores=mapped(directory / SCORES),
            labels=mapped(directory / LABELS),
            answers=mapped(directory / ANSWERS),
            datasets=np.load(directory / DATASETS),
            vectors={name: array for name, array in vectors.items() if array is not None},
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def num_datasets(self) -> int:
        """Number of datasets."""
        return 1 if self.datasets is None else int(self.datasets.max()) + 1

    @property
    def graded(self) -> npt.NDArray[np.bool_]:
        """(num_samples,) whether each sample has a label."""
        return np.zeros(len(self), np.bool_) if self.labels is None else np.isfinite(self.labels)

    def datasets_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of the dataset of each of the samples `rows`."""
        return np.zeros(len(rows), np.int64) if self.datasets is None else self.datasets[self.groups[rows]]

    def lengths(self, texts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each of the `texts`."""
        return self.offsets[texts + 1] - self.offsets[texts]

    def token_ids(self, texts: npt.NDArray[np.int64]) -> list[TokenIds]:
        """Token ids of each of the `texts`."""
        return [self.tokens[self.offsets[text] : self.offsets[text + 1]] for text in texts]

    def batch(self, rows: npt.NDArray[np.int64], device: torch.device) -> tuple[npt.NDArray[np.int64], Samples]:
        """The distinct texts of the samples `rows`, and those samples by their places among them."""
        numbers = np.asarray(self.samples[rows])
        there = numbers != NO_TEXT
        texts = np.unique(numbers[there])
        places = np.where(there, np.searchsorted(texts, numbers), NO_TEXT)
        local = torch.from_numpy(places).to(device)
        rated = None if self.scores is None else torch.from_numpy(np.asarray(self.scores[rows])).to(device)
        labels = None if self.labels is None else torch.from_numpy(np.asarray(self.labels[rows])).to(device)
        cached = {
            name: torch.from_numpy(vectors[texts].astype(np.float32)).to(device)
            for name, vectors in self.vectors.items()
        }
        queries, positives = local[:, :2].T.contiguous()
        answers = torch.from_numpy(self._answers_among(texts, np.unique(numbers[:, 0]))).to(device)
        return texts, Samples(queries, positives, local[:, 2:], rated, labels, answers, **cached)

    def _answers_among(self, texts: npt.NDArray[np.int64], queries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of the `texts`, which are ascending, are known to answer the `queries`: (pairs, 2) by their places."""
        if self.answers is None:
            return np.empty((0, 2), np.int64)
        begins, ends = (np.searchsorted(self.answers[:, 0], queries, side) for side in ("left", "right"))
        rows = np.concatenate([np.arange(0), *map(np.arange, begins, ends)])
        known = np.asarray(self.answers[rows])
        places: npt.NDArray[np.int64] = np.minimum(np.searchsorted(texts, known), len(texts) - 1)
        there: npt.NDArray[np.bool_] = (texts[places] == known).all(axis=1)
        return places[there]


def several_answers(samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Query and positive (pairs, 2) of the samples whose query has several positives, ascending, each pair once."""
    pairs = np.unique(samples[:, :2], axis=0)
    _, of_pair, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return pairs[counts[of_pair] > 1]


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
    wanted: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write teacher vectors that arrive as (ids, rows) in any order; DataError unless every id comes exactly once.

    `wanted`: those ids alone do; the others' vectors are zeros.
    """
    vectors = new_array(directory / VECTORS, np.float16, (num_samples, dim))
    seen = np.zeros(num_samples, dtype=np.int64)
    for ids, rows in batches:
        vectors[ids] = rows
        np.add.at(seen, ids, 1)
    seen = seen if wanted is None else seen[wanted]
    if (seen != 1).any():
        missing, repeated = int((seen == 0).sum()), int((seen > 1).sum())
        raise DataError(
            f"{directory}: teacher vectors of {num_samples} samples: {missing} missing, {repeated} repeated"
        )
