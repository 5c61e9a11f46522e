"""Texts as vectors in every form: what sentence-transformers gives, cut, pooled from chunks and quantised."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedlib.batching import TokenIds
from embedlib.embedding import EmbeddingConfig, Prepared, TextEmbedder, prepare
from embedlib.encoder import Encoder, Vectors
from embedlib.errors import ConfigError

CPU = torch.device("cpu")


def embedder(directory: Path, **values: object) -> TextEmbedder:
    config = EmbeddingConfig.model_validate({"backend": "torch-float32", "vectors": {"dtype": "float32"}} | values)
    return TextEmbedder(Encoder.load(directory, CPU, torch.float32), config, None)


def test_vectors_are_sentence_transformers_with_prompts_in_turn(tiny_encoder: Path, tiny_texts: list[str]) -> None:
    texts = [*tiny_texts[:20], *tiny_texts[:7]]
    reference = SentenceTransformer(str(tiny_encoder), device="cpu", local_files_only=True)
    embedded = embedder(tiny_encoder, prompts=["query", "passage"]).embed(texts, range(3, 30))
    for first, prompt in ((0, "passage"), (1, "query")):
        expected = reference.encode(texts[first::2], prompt_name=prompt)
        np.testing.assert_allclose(embedded.vectors[first::2], expected, atol=1e-5)
    assert embedded.finite.all()


def test_equal_texts_are_computed_once(
    tiny_encoder: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedder(tiny_encoder)
    seen: list[int] = []
    tokenise = made.encoder.tokenise
    monkeypatch.setattr(made.encoder, "tokenise", lambda texts: seen.append(len(texts)) or tokenise(texts))
    embedded = made.embed([*tiny_texts[:5], *tiny_texts[:5]], range(10))
    assert seen == [5]
    assert (embedded.vectors[:5] == embedded.vectors[5:]).all()
    assert (embedded.num_tokens[:5] == embedded.num_tokens[5:]).all()
    assert embedded.computed.texts == 5
    assert embedded.computed.tokens == embedded.num_tokens[:5].sum()


def test_padding_is_told_where_there_is_any(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = embedder(tiny_encoder)
    texts = ["cat", "the cat is small, and the house is here"]
    lengths = [len(tokens) for tokens in made.encoder.tokenise(texts)]
    assert lengths[0] < lengths[1]
    packed = made.embed(texts, range(2)).computed
    assert packed.padded_tokens == packed.tokens == sum(lengths)
    monkeypatch.setattr(made.encoder.backend, "pads", True)
    assert made.embed(texts, range(2)).computed.padded_tokens == 2 * max(lengths)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_long_texts_are_pooled_from_chunks(tiny_encoder: Path, tiny_texts: list[str], pooling: str) -> None:
    long = " ".join(tiny_texts[:40])
    made = embedder(tiny_encoder, long_texts=pooling, chunk_overlap=4, prompts=["query"])
    embedded = made.embed([long, tiny_texts[0]], range(2))
    alone = embedder(tiny_encoder, prompts=["query"]).embed([long, tiny_texts[0]], range(2))
    np.testing.assert_allclose(embedded.vectors[1], alone.vectors[1], atol=1e-6)
    assert np.linalg.norm(embedded.vectors[0]) == pytest.approx(1, abs=1e-5)
    assert embedded.num_tokens[0] > alone.num_tokens[0] == 64
    assert not np.allclose(embedded.vectors[0], alone.vectors[0], atol=1e-3)


def test_chunks_need_room(tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="chunk_overlap: 60; expected less than half of the"):
        embedder(tiny_encoder, long_texts="mean", chunk_overlap=60).embed(["a"], [0])


def test_dimensions_are_cut_only_where_trained_or_forced(
    tiny_encoder: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    def cut(directory: Path, **values: object) -> Prepared:
        config = EmbeddingConfig.model_validate({"vectors": {"dimensions": 8} | values})
        return prepare(directory, config, tiny_texts, CPU, tmp_path)

    with pytest.raises(
        ConfigError, match=r"vectors\.dimensions: 8; this model was trained for its whole vectors alone"
    ):
        cut(tiny_encoder)
    assert cut(tiny_encoder, force_dimensions=True).backend.startswith("torch-")
    trained = Path(shutil.copytree(tiny_encoder, tmp_path / "trained"))
    values = json.loads((trained / "config_sentence_transformers.json").read_text())
    (trained / "config_sentence_transformers.json").write_text(json.dumps(values | {"matryoshka_dims": [16, 8]}))
    assert cut(trained).ranges is None
    vectors = embedder(trained, vectors={"dtype": "float32", "dimensions": 8}).embed(tiny_texts[:3], range(3)).vectors
    assert vectors.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_integers_are_calibrated_on_the_sample(tiny_encoder: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    config = EmbeddingConfig.model_validate({"backend": "torch-float32", "vectors": {"dtype": "int8"}})
    prepared = prepare(tiny_encoder, config, tiny_texts[:100], CPU, tmp_path)
    assert np.array(prepared.ranges).shape == (2, 32)
    vectors = (
        TextEmbedder.load(tiny_encoder, config, prepared, CPU, tmp_path).embed(tiny_texts[:100], range(100)).vectors
    )
    assert vectors.dtype == np.int8
    assert (vectors.min(axis=0) == -128).all()
    assert (vectors.max(axis=0) >= 126).all()


def test_a_vector_that_is_none_is_told(
    tiny_encoder: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedder(tiny_encoder)
    compute = made.encoder.backend.pooled

    def broken(batches: Sequence[Sequence[TokenIds]]) -> Vectors:
        vectors = compute(batches)
        vectors[0] = np.nan
        return vectors

    monkeypatch.setattr(made.encoder.backend, "pooled", broken)
    embedded = made.embed(tiny_texts[:5], range(5))
    assert embedded.finite.sum() == 4
    assert np.isfinite(embedded.vectors).all()
