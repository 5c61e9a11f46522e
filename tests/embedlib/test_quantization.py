from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from embedlib.errors import ConfigError, DataError
from embedlib.quantization import calibrate, quantise, truncate

VECTORS = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)


def test_integers_are_even_steps_that_do_not_wrap() -> None:
    ranges = calibrate(VECTORS)
    outside = np.concatenate([VECTORS, VECTORS * 10])
    for dtype, lowest in (("int8", -128), ("uint8", 0)):
        found = quantise(outside, dtype, ranges)  # type: ignore[arg-type]
        assert found.dtype == dtype
        restored = ranges[0] + (found.astype(np.float32) - lowest + 0.5) * (ranges[1] - ranges[0]) / 255
        expected = np.clip(outside, ranges[0], ranges[1])
        assert np.abs(restored - expected).max() <= ((ranges[1] - ranges[0]) / 255).max()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_the_numbers_are_sentence_transformers(dtype: Any) -> None:
    ranges = calibrate(VECTORS)
    expected = quantize_embeddings(VECTORS, dtype, ranges=ranges)
    found = quantise(VECTORS, dtype, ranges)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=int(dtype in ("int8", "uint8")))
    assert (found == expected).mean() > 0.99


def test_signs_are_packed_eight_to_a_byte() -> None:
    bits = np.unpackbits(quantise(VECTORS, "ubinary"), axis=1)
    assert (bits == (VECTORS > 0)).all()
    assert ((quantise(VECTORS, "binary").astype(int) + 128) == quantise(VECTORS, "ubinary")).all()


def test_floats_are_floats() -> None:
    assert quantise(VECTORS, "float16").dtype == np.float16
    assert (quantise(VECTORS, "float32") == VECTORS).all()


def test_truncated_vectors_are_unit_vectors() -> None:
    cut = truncate(VECTORS, 4)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, VECTORS[:, :4] / np.linalg.norm(VECTORS[:, :4], axis=1, keepdims=True), atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="dimensions: 17; expected 1 to 16"):
        truncate(VECTORS, 17)
    with pytest.raises(ConfigError, match="ubinary of 12 dimensions; expected a multiple of 8"):
        quantise(VECTORS[:, :12], "ubinary")
    with pytest.raises(ConfigError, match="int8; expected calibration ranges"):
        quantise(VECTORS, "int8")
    with pytest.raises(DataError, match=r"dimension 2 spans 1\.0 to 1\.0 over 3 vectors"):
        calibrate(np.array([[0, 1, 1], [1, 2, 1], [2, 3, 1]], np.float32))
