"""Hashes decide equality, order, partition and split; what they must have in common for that."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from embedlib.hashing import hash_pairs, hash_texts, loose_keys, partition_of, split_of

TEXTS = pa.array([f"text {number}" for number in range(20_000)], pa.large_string())


def test_equal_texts_alone_have_equal_hashes_and_a_seed_changes_all() -> None:
    texts = pa.array(["a", "b", "a", ""], pa.string())
    hashes = hash_texts(texts, 1)
    assert hashes.high[0] == hashes.high[2]
    assert hashes.low[0] == hashes.low[2]
    assert len({*hashes.high.tolist()}) == 3
    assert not set(hashes.high.tolist()) & set(hash_texts(texts, 2).high.tolist())
    # On every machine and for ever, or an extended corpus would take texts twice.
    assert hashes.high[0] == 18291853121333178913


def test_a_pair_is_not_its_reverse() -> None:
    one, two = hash_texts(pa.array(["a"]), 0), hash_texts(pa.array(["b"]), 0)
    assert hash_pairs(one, two).high[0] != hash_pairs(two, one).high[0]
    assert hash_pairs(one, two).low[0] == hash_pairs(one, two).low[0]


def test_loose_keys_keep_what_tells_texts_apart() -> None:
    texts = ["Ärger!", "ärger", "Version 2", "version 3", "कि", "की", "?!", "!?"]
    keys = loose_keys(pa.array(texts)).to_pylist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 7


@given(st.integers(1, 500))
def test_partitions_are_consecutive_ranges_of_like_size(num_partitions: int) -> None:
    high = np.sort(hash_texts(TEXTS, 0).high)
    numbers = partition_of(high, num_partitions)
    assert (np.diff(numbers) >= 0).all()
    assert numbers.min() >= 0
    assert numbers.max() < num_partitions
    counts = np.bincount(numbers, minlength=num_partitions)
    expected = len(high) / num_partitions
    assert abs(counts - expected).max() < 6 * np.sqrt(expected) + 1


def test_splits_have_their_shares_in_every_partition() -> None:
    high = hash_texts(TEXTS, 0).high
    splits = split_of(high, (0.1, 0.2))
    for number in range(4):
        some = splits[partition_of(high, 4) == number]
        shares = np.bincount(some, minlength=3) / len(some)
        np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)
    assert split_of(high, (0.0, 0.0)).max() == 0
