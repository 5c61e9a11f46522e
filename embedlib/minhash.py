"""Near-duplicates by MinHash: texts whose sets of five-character pieces overlap much share a band of signatures."""

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from rensa import RMinHash

from embedlib.hashing import Words, loose_keys

PIECE = 5
SIGNATURE = 128


def bands_for(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows find most pairs that overlap (Jaccard) by `threshold` and few below it.

    >>> bands_for(0.8)
    (11, 11)
    """
    choices = [(SIGNATURE // rows, rows) for rows in range(1, SIGNATURE // 2 + 1)]
    return min(choices, key=lambda choice: abs(math.log(choice[0]) / choice[1] + math.log(threshold)))


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
    signature.update([key[start : start + PIECE] for start in range(max(1, len(key) - PIECE + 1))])
    found: list[int] = signature.digest()
    return found


def later_of_each(bands: Words, rows: Words) -> npt.NDArray[np.bool_]:
    """Which entries share their band with an entry of a lower row, (entries,): every near-duplicate but the lowest."""
    order = np.lexsort((rows, bands))
    same_band = np.append(False, bands[order][1:] == bands[order][:-1])[: len(order)]
    later = np.zeros(len(rows), np.bool_)
    later[order] = same_band
    return later
