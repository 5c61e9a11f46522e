"""Which samples of several datasets make each batch: all of one group, twins apart, every sample once an epoch.

A group is what may be contrasted with each other: a dataset, or one language pair of it. Batches that mix them give
negatives that are told apart by language or style alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedlib.batching import NO_TEXT

# Where many samples share a text a batch may stay short: it is not worth looking through all of them.
MOST_PASSED_OVER = 8
READ_SAMPLES = 65536


class BatchPlan(NamedTuple):
    """The batches of every epoch, as a function of the seed alone: neither processes nor resuming change them."""

    groups: npt.NDArray[np.int64]
    """(samples,) which group each sample is of."""
    texts: npt.NDArray[np.int64]
    """(samples, texts) what makes two samples twins that cannot share a batch, by number; `NO_TEXT`: nothing."""
    shares: npt.NDArray[np.float64]
    """(groups,) how often an epoch goes through each group's samples; 1: once."""
    batch_size: int
    seed: int

    def epoch(self, number: int) -> list[npt.NDArray[np.int64]]:
        """Sample numbers of each batch of an epoch, groups in an order of chance."""
        batches: list[npt.NDArray[np.int64]] = []
        for group, share in enumerate(self.shares):
            samples = self._drawn(np.flatnonzero(self.groups == group), share, number)
            batches += self._without_twins(samples)
        order = np.random.default_rng([self.seed, number]).permutation(len(batches))
        return [batches[place] for place in order]

    def _drawn(self, samples: npt.NDArray[np.int64], share: float, epoch: int) -> npt.NDArray[np.int64]:
        """`share` times the group's samples, from an endless run of shuffles that each epoch goes on with."""
        size = len(samples)
        if not size:
            return samples
        first, last = round(epoch * share * size), round((epoch + 1) * share * size)
        rounds = range(first // size, -(-last // size))
        shuffled = [np.random.default_rng([self.seed, int(samples[0]), turn]).permutation(samples) for turn in rounds]
        return np.concatenate([*shuffled, samples[:0]])[first - rounds.start * size : last - rounds.start * size]

    def _without_twins(self, samples: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """The samples in batches; one that shares a text with its batch waits for a later one.

        Those that are left when all batches are full share batches of their own, twins or not: the loss knows them.
        """
        # A group that is gone through several times in an epoch fills a batch with its samples once at most.
        full = min(self.batch_size, len(np.unique(samples)))
        num_batches = max(1, round(len(samples) / max(1, full)))
        waiting: list[tuple[int, list[int]]] = []
        ahead = self._with_texts(samples)
        for size in (len(part) for part in np.array_split(samples, num_batches) if len(part)):
            batch: list[tuple[int, list[int]]] = []
            seen: set[int] = set()
            left: list[tuple[int, list[int]]] = []
            candidates = iter(waiting)
            while len(batch) < size and len(left) < MOST_PASSED_OVER * size:
                found = next(candidates, None) or next(ahead, None)
                if found is None:
                    break
                if any(text in seen and text != NO_TEXT for text in found[1]):
                    left.append(found)
                else:
                    batch.append(found)
                    seen.update(found[1])
            waiting = [*left, *candidates]
            if 2 * len(batch) < size:
                waiting = [*batch, *waiting]
                break
            yield np.array([sample for sample, _ in batch])
        rest = np.array([sample for sample, _ in (*waiting, *ahead)], np.int64)
        # The same sample again is nothing to be told apart from, so it goes into another batch.
        for turn in turns_of(rest):
            yield from np.array_split(turn, -(-len(turn) // self.batch_size))

    def _with_texts(self, samples: npt.NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
        """Each sample with its texts, read many at a time."""
        for start in range(0, len(samples), READ_SAMPLES):
            some = samples[start : start + READ_SAMPLES]
            yield from zip(some.tolist(), self.texts[some].tolist(), strict=True)


def turns_of(samples: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The samples, each once in the first turn, those that are there again in the second, and so on."""
    while len(samples):
        first = np.zeros(len(samples), np.bool_)
        first[np.unique(samples, return_index=True)[1]] = True
        yield samples[first]
        samples = samples[~first]


def temperature_shares(
    sizes: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], temperature: float
) -> npt.NDArray[np.float64]:
    """How often an epoch goes through each group, so that it is drawn by weight · size**temperature, (groups,).

    An epoch has as many samples as all groups together. At temperature 1 and equal weights every sample comes once.
    """
    drawn = weights * sizes.astype(np.float64) ** temperature
    return np.asarray(drawn / drawn.sum() * sizes.sum() / sizes)
