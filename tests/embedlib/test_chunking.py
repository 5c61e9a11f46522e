import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedlib.chunking import pool_chunks, split_long


@pytest.mark.parametrize("overlap", [0, 4])
def test_chunks_cover_the_text_and_fit(tiny_tokenizer: Tokenizer, tiny_texts: list[str], overlap: int) -> None:
    text = " ".join(tiny_texts[:60])
    chunks = split_long(tiny_tokenizer, text, 40, overlap)
    assert len(chunks) > 5
    position = 0
    for chunk in chunks:
        assert len(tiny_tokenizer.encode(chunk, add_special_tokens=False).ids) <= 40
        start = text.index(chunk, max(0, position - 200))
        assert start <= position + 1  # nothing but a space is left out
        position = start + len(chunk)
    assert position == len(text)


def test_what_fits_is_one_chunk(tiny_tokenizer: Tokenizer) -> None:
    assert split_long(tiny_tokenizer, "the cat is small", 40, 4) == ["the cat is small"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_pooling_is_that_of_a_loop(counts: list[int]) -> None:
    vectors = np.random.default_rng(0).normal(size=(sum(counts), 3)).astype(np.float32)
    groups = np.split(vectors, np.cumsum(counts)[:-1])
    for how, function in (("mean", np.mean), ("max", np.max)):
        pooled = pool_chunks(vectors, np.array(counts), how)  # type: ignore[arg-type]
        np.testing.assert_allclose(pooled, [function(group, axis=0) for group in groups], atol=1e-6)
