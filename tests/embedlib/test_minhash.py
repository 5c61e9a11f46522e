"""Near-duplicates found, and distinct texts left alone."""

import numpy as np
import pyarrow as pa

from embedlib.minhash import band_hashes, bands_for, later_of_each

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


def test_every_row_but_the_lowest_of_a_band_is_later() -> None:
    bands = np.array([5, 7, 5, 7, 9, 5], np.uint64)
    rows = np.array([30, 10, 20, 40, 50, 60], np.uint64)
    assert later_of_each(bands, rows).tolist() == [True, False, False, True, False, True]
    assert later_of_each(bands[:0], rows[:0]).tolist() == []
