from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from embedlib.compress.positions import extend_positions
from embedlib.encoder import Encoder
from embedlib.errors import ConfigError


@pytest.mark.parametrize("architecture", ["tiny_encoder", "tiny_xlmr"])
def test_short_texts_keep_their_vectors_and_long_ones_are_read(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(architecture)
    tokens = [np.array([0, *range(5, 5 + length), 2], np.int32) for length in (3, 20, 60)]
    before = Encoder.load(directory, dtype=torch.float32).encode_tokens(tokens)
    longer = Encoder.load(directory, dtype=torch.float32)
    extend_positions(longer.body, 200)
    np.testing.assert_array_equal(longer.encode_tokens(tokens), before)
    long = np.array([0, *([7, 9, 8] * 66), 2], np.int32)
    first, second = longer.encode_tokens([long, np.concatenate([long[:1], long[1:-1][::-1], long[-1:]])])
    assert np.isfinite(first).all()
    assert not np.allclose(first, second, atol=1e-4)  # the order of a long text counts


def test_the_new_positions_are_the_old_ones_stretched(tiny_encoder: Path) -> None:
    body = Encoder.load(tiny_encoder, dtype=torch.float32).body
    table = body.get_submodule("embeddings.position_embeddings")
    old = table.weight.detach().clone()  # type: ignore[operator, union-attr]
    extend_positions(body, 3 * len(old) - 1)
    new = body.get_submodule("embeddings.position_embeddings").weight.detach()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :: 2], old)
    assert body.config.max_position_embeddings == len(new)


@pytest.mark.parametrize("architecture", ["tiny_encoder", "tiny_xlmr"])
def test_a_body_with_enough_positions_is_left_alone(architecture: str, request: pytest.FixtureRequest) -> None:
    body = Encoder.load(request.getfixturevalue(architecture)).body
    table = body.get_submodule("embeddings.position_embeddings")
    rows = len(table.weight)  # type: ignore[arg-type]
    positions = rows if table.padding_idx is None else rows - 2
    for max_length in (10, positions):
        extend_positions(body, max_length)
        assert body.get_submodule("embeddings.position_embeddings") is table
    extend_positions(body, positions + 1)
    assert body.config.max_position_embeddings == rows + 1


def test_a_body_without_a_table_is_refused_when_it_is_too_short(tiny_encoder: Path) -> None:
    body = Encoder.load(tiny_encoder).body
    del body.get_submodule("embeddings").position_embeddings
    extend_positions(body, body.config.max_position_embeddings)
    with pytest.raises(ConfigError, match="max_length: 200; BertModel has no table of positions"):
        extend_positions(body, 200)


def test_a_body_that_does_not_tell_its_positions_is_refused() -> None:
    body = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="max_length: 20; T5EncoderModel has no table of positions"):
        extend_positions(body, 20)
