"""128-bit hashes of texts: what finds equal ones, and what shuffles, splits and samples without a random generator.

With `n` texts two different ones share a hash with a probability of about n² / 2^129: 10^-23 for a billion.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Words = npt.NDArray[np.uint64]
# Letters, marks and digits tell texts apart; case, punctuation and spaces do not.
NOISE = r"[^\pL\pM\pN]+"


class Hashes(NamedTuple):
    """One hash a row, in two halves."""

    high: Words
    """(rows,): decides partition and order."""
    low: Words
    """(rows,): decides who is drawn where not all are."""

    def take(self, rows: npt.NDArray[np.int64]) -> "Hashes":
        """The hashes of some rows."""
        return Hashes(self.high[rows], self.low[rows])


def hash_texts(texts: pa.Array, seed: int) -> Hashes:
    """The hashes of `texts`, none of which is null; with another seed they are all others."""
    digest = xxhash.xxh3_128_digest
    digests = b"".join([digest(text, seed) for text in texts.cast(pa.large_binary()).to_pylist()])
    words = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    return Hashes(words[:, 0].copy(), words[:, 1].copy())


def hash_pairs(lefts: Hashes, rights: Hashes) -> Hashes:
    """One hash for each pair of hashes; a pair and its reverse differ."""
    digest = xxhash.xxh3_128_digest
    rows = np.stack([*lefts, *rights], axis=1).astype(">u8").tobytes()
    digests = b"".join([digest(rows[start : start + 32]) for start in range(0, len(rows), 32)])
    words = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    return Hashes(words[:, 0].copy(), words[:, 1].copy())


def loose_keys(texts: pa.Array) -> pa.Array:
    """Equal for texts that differ in case, punctuation and spaces alone.

    >>> loose_keys(pa.array(["Hello, World!", "hello world", "Hello World 2"])).to_pylist()
    ['helloworld', 'helloworld', 'helloworld2']
    """
    keys = pc.replace_substring_regex(pc.utf8_lower(texts), NOISE, "")
    # A text of signs alone would be equal to every other such text.
    return pc.if_else(pc.equal(keys, ""), texts, keys)


def run_begins(*columns: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows differ from the one before them in any of the columns, (rows,); the first row does."""
    differs = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.append(True, differs)[: len(columns[0])]


def partition_of(high: Words, num_partitions: int) -> npt.NDArray[np.int64]:
    """Which of `num_partitions` equal ranges of hashes each row is in, (rows,): order by partition is order by hash."""
    # Products of 32-bit numbers, because one of 64 bits would overflow.
    return ((high >> np.uint64(32)) * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


def split_of(high: Words, shares: Sequence[float]) -> npt.NDArray[np.int8]:
    """The split of each hash, (rows,): the number of the share it falls into, with the rest as split 0.

    The bits that decide are mixed anew, so that a split lies in all partitions alike.
    """
    mixed = (high ^ (high >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    edges = np.cumsum(shares)
    place = np.searchsorted(edges, mixed.astype(np.float64) / 2.0**64, side="right")
    return np.where(place == len(shares), 0, place + 1).astype(np.int8)
