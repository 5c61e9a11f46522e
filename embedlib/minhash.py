"""Near-duplicates: texts whose sets of five-character pieces overlap much.

Most of them share a band of their MinHash signatures, and whatever shares one is looked at itself.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from rensa import RMinHash

from embedlib.hashing import Words, loose_keys, run_begins

PIECE = 5
SIGNATURE = 128
# Of the pairs that overlap just as much as is too much, how many are to share a band.
RECALL = 0.95


def bands_for(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows find 95 of 100 pairs that overlap (Jaccard) by `threshold`, with few below it.

    >>> bands_for(0.8)
    (18, 7)
    """
    choices = [(SIGNATURE // rows, rows) for rows in range(SIGNATURE // 2, 0, -1)]
    return next((few for few in choices if 1 - (1 - threshold ** few[1]) ** few[0] >= RECALL), choices[-1])


def band_hashes(texts: pa.Array, threshold: float, seed: int) -> npt.NDArray[np.uint64]:
    """One hash for each band of each text, (texts, bands); two texts are candidates if one of a band is equal."""
    num_bands, rows = bands_for(threshold)
    signatures = np.array([_signature(key, seed) for key in loose_keys(texts).to_pylist()], np.uint32)
    signatures = signatures.reshape(len(texts), SIGNATURE)
    hashes = np.empty((len(texts), num_bands), np.uint64)
    digest = xxhash.xxh3_64_intdigest
    for band in range(num_bands):
        some = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        hashes[:, band] = [digest(row.tobytes(), band) for row in some]
    return hashes


def _signature(key: str, seed: int) -> list[int]:
    signature = RMinHash(num_perm=SIGNATURE, seed=seed)
    signature.update(list(_pieces(key)))
    found: list[int] = signature.digest()
    return found


def _pieces(key: str) -> set[str]:
    return {key[start : start + PIECE] for start in range(max(1, len(key) - PIECE + 1))}


def overlap(left: str, right: str) -> float:
    """Share of the pieces of two loose keys that both have, of all that they have (Jaccard).

    >>> overlap("abcdef", "abcdeg")
    0.3333333333333333
    """
    lefts, rights = _pieces(left), _pieces(right)
    return len(lefts & rights) / len(lefts | rights)


def candidates(bands: Words, rows: Words) -> Words:
    """Pairs of rows that share a band, (pairs, 2): each with the lowest of its band and with the one right below it."""
    order = np.lexsort((rows, bands))
    bands, rows = bands[order], rows[order]
    begins = run_begins(bands)
    lowest = rows[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(rows) else rows
    pairs = [np.stack([rows, other], axis=1)[~begins] for other in (lowest, np.roll(rows, 1))]
    return np.unique(np.concatenate(pairs), axis=0)
