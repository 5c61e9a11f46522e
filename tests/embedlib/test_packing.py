"""Packed sequences give the vectors of padded ones, for every pooling and family that is packed at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from embedlib import packing
from embedlib.batching import TokenIds, pad
from embedlib.packing import attention_group, collator, grouped_lengths, pack, packed_architecture
from embedlib.torch_model import SentenceVectors, body_of, sentence_vectors

LENGTHS = (14, 9, 9, 9, 5, 5, 2, 1)
PACKED_MODELS = ["tiny_encoder", "tiny_xlmr"]


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[TokenIds]:
    random = np.random.default_rng(0)
    return [random.integers(4, 50, length).astype(np.int32) for length in lengths]


def load(directory: Path) -> SentenceTransformer:
    return SentenceTransformer(str(directory), device="cpu", local_files_only=True).eval()


@pytest.mark.parametrize("name", PACKED_MODELS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("order", [1, -1], ids=["longest first", "shortest first"])
def test_packed_is_padded(name: str, pooling: str, order: int, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(name))
    modules = list(model.children())
    model = SentenceTransformer(modules=[modules[0], Pooling(32, pooling), Dense(32, 8)], device="cpu").eval()
    tokens = sequences()[::order]
    with torch.inference_mode():
        expected = sentence_vectors(model, pad(tokens, int(model.tokenizer.pad_token_id)))
        features = collator(model)(tokens)
        assert features["input_ids"].shape == (1, sum(LENGTHS))
        torch.testing.assert_close(sentence_vectors(model, features), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PACKED_MODELS)
def test_a_model_that_packs_takes_padded_input_as_before(
    name: str, tiny_texts: list[str], request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(name)
    model = load(directory)
    collator(model)
    np.testing.assert_allclose(model.encode(tiny_texts[:40]), load(directory).encode(tiny_texts[:40]), atol=1e-6)


@pytest.mark.parametrize("name", PACKED_MODELS)
def test_gradients_are_those_of_padded_input(name: str, request: pytest.FixtureRequest) -> None:
    directory, tokens = request.getfixturevalue(name), sequences()
    gradients = []
    for packed in (True, False):
        model = SentenceVectors(load(directory))
        features = model.collate(tokens) if packed else pad(tokens, 1)
        model(**features).square().sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], value, atol=5e-5, rtol=1e-4)


def test_positions_follow_the_paddings_in_xlmr() -> None:
    assert pack(sequences((3, 2)))["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    tokens = [np.array([5, 1, 6], np.int32), np.array([7, 8], np.int32)]
    assert pack(tokens, padding=1)["position_ids"].tolist() == [[2, 1, 3, 2, 3]]


def test_what_is_not_known_to_pack_is_padded(tiny_encoder: Path) -> None:
    unknown, without_prompt = load(tiny_encoder), load(tiny_encoder)
    body_of(unknown).config.model_type = "mpnet"
    next(m for m in without_prompt.children() if isinstance(m, Pooling)).include_prompt = False
    for model in (unknown, without_prompt):
        assert packed_architecture(model) is None
        assert set(collator(model)(sequences())) == {"input_ids", "attention_mask"}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.booleans())
def test_groups_hold_every_sequence_in_order(lengths: list[int], ordered: bool) -> None:
    lengths = sorted(lengths, reverse=True) if ordered else lengths
    groups = grouped_lengths(lengths)
    assert [length for group in groups for length in group] == lengths
    for group in groups:
        assert group[0] == max(group)
        assert min(group) >= 0.75 * group[0]


@given(st.lists(st.integers(6, 8), min_size=1, max_size=10))
def test_a_group_is_padded_and_packed_again(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    group = attention_group(lengths, "cpu")
    assert (group.num_sequences, group.longest, group.num_tokens) == (len(lengths), lengths[0], sum(lengths))
    if group.unpack is None or group.repack is None or group.mask is None:
        assert len(set(lengths)) == 1
        return
    assert group.unpack[group.repack].tolist() == list(range(sum(lengths)))
    assert group.mask.sum(dim=-1).flatten().tolist() == lengths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: variable-length attention is not tested")
@pytest.mark.parametrize("name", PACKED_MODELS)
def test_variable_length_attention_on_cuda(name: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(name))
    expected = sentence_vectors(model, collator(model)(sequences()))
    half = load(request.getfixturevalue(name)).to("cuda", torch.bfloat16)
    vectors = sentence_vectors(half, packing.collator(half)(sequences())).float().cpu()
    assert torch.nn.functional.cosine_similarity(vectors, expected, dim=-1).min() > 0.99
