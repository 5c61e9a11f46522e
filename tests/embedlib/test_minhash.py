"""Near-duplicates found, and distinct texts left alone."""

import numpy as np
import pyarrow as pa
import pytest

from embedlib.minhash import SIGNATURE, band_hashes, bands_for, candidates, overlap

TEXTS = [
    "The municipal library will be closed on the first Monday of every month for maintenance.",
    "The municipal library will be closed on the first Monday of each month for maintenance!",
    "Tomatoes should be planted in a sunny place once the last frost of spring has passed.",
    "hi",
]


def test_texts_that_overlap_share_a_band_and_others_none() -> None:
    bands = band_hashes(pa.array(TEXTS, pa.large_string()), 0.7, seed=3)
    assert bands.shape == (4, bands_for(0.7)[0])
    assert (bands[0] == bands[1]).any()
    assert not (bands[0] == bands[2]).any()
    assert not (bands[0] == bands[3]).any()
    again = band_hashes(pa.array(TEXTS[1:], pa.large_string()), 0.7, seed=3)
    assert np.array_equal(again, bands[1:])
    assert band_hashes(pa.array([], pa.large_string()), 0.7, seed=3).shape == (0, bands_for(0.7)[0])


def test_rows_of_a_band_are_paired_with_the_lowest_and_the_one_below() -> None:
    bands = np.array([5, 7, 5, 7, 9, 5, 5], np.uint64)
    rows = np.array([30, 10, 20, 40, 50, 60, 40], np.uint64)
    assert candidates(bands, rows).tolist() == [[30, 20], [40, 10], [40, 20], [40, 30], [60, 20], [60, 40]]
    assert candidates(bands[:0], rows[:0]).tolist() == []


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_95_of_100_pairs_at_the_threshold_share_a_band(threshold: float) -> None:
    num_bands, rows = bands_for(threshold)
    assert num_bands * rows <= SIGNATURE
    assert 1 - (1 - threshold**rows) ** num_bands >= 0.95
    # One more row a band would find too few.
    assert 1 - (1 - threshold ** (rows + 1)) ** (SIGNATURE // (rows + 1)) < 0.95


def test_overlap_counts_pieces_that_both_have() -> None:
    assert overlap("abcdefgh", "abcdefgh") == 1
    assert overlap("abcdefg", "bcdefgh") == pytest.approx(2 / 4)
    assert overlap("ab", "ab") == 1
    assert overlap("ab", "abc") == 0
