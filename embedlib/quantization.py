"""Vectors in fewer bytes: narrower numbers and fewer dimensions. Arrays in, arrays out."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedlib.errors import ConfigError, DataError

OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
NEEDS_RANGES = ("int8", "uint8")

Vectors = npt.NDArray[np.floating[Any]]
Ranges = npt.NDArray[np.float32]
"""Lowest and highest value of each dimension, (2, dim); vectors that are compared must share them."""


def calibrate(vectors: Vectors) -> Ranges:
    """The ranges over a sample (texts, dim); DataError where a dimension never differs."""
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)
    if not (usable := np.isfinite(ranges).all(axis=0) & (ranges[1] > ranges[0])).all():
        dimension = int(np.argmin(usable))
        raise DataError(
            f"calibration: dimension {dimension} spans {ranges[0, dimension]} to {ranges[1, dimension]} over "
            f"{len(vectors)} vectors; expected finite values that differ. Give more texts to calibrate on."
        )
    return ranges


def quantise(vectors: Vectors, dtype: OutputDtype, ranges: Ranges | None = None) -> npt.NDArray[Any]:
    """`vectors` (texts, dim) as `dtype`: (texts, dim), for the binary forms (texts, dim / 8).

    int8 and uint8 are 255 even steps over `ranges`, cut off beyond; binary and ubinary are the signs of eight
    dimensions a byte: the numbers of sentence-transformers' `quantize_embeddings`, whose import brings in PyTorch and
    would hold up a replica that does without.
    """
    if dtype in ("float32", "float16"):
        return vectors.astype(dtype, copy=False)
    if dtype in ("binary", "ubinary") and vectors.shape[1] % 8:
        raise ConfigError(f"output_dtype: {dtype} of {vectors.shape[1]} dimensions; expected a multiple of 8")
    if dtype in NEEDS_RANGES and ranges is None:
        raise ConfigError(f"output_dtype: {dtype}; expected calibration ranges")
    if ranges is None or dtype in ("binary", "ubinary"):
        unsigned = np.packbits(vectors > 0, axis=1)
    else:
        unsigned = np.clip((vectors - ranges[0]) / ((ranges[1] - ranges[0]) / 255), 0, 255).astype(np.uint8)
    return (unsigned.astype(np.int16) - 128).astype(np.int8) if dtype in ("int8", "binary") else unsigned


def truncate(vectors: Vectors, dimensions: int) -> Vectors:
    """The first `dimensions` of each vector (texts, dim), unit vectors again."""
    if not 1 <= dimensions <= vectors.shape[1]:
        raise ConfigError(f"dimensions: {dimensions}; expected 1 to {vectors.shape[1]}, the model's")
    cut = vectors[:, :dimensions]
    return np.asarray(cut / np.linalg.norm(cut, axis=1, keepdims=True).clip(1e-12), vectors.dtype)
