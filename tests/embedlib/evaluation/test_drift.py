"""How far a model has moved on texts without labels, and how finely it cuts words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedlib.encoder import Encoder
from embedlib.evaluation.drift import bucket, measure_drift, measure_fertility


def test_a_model_has_not_moved_from_itself() -> None:
    vectors = np.random.default_rng(0).standard_normal((120, 8)).astype(np.float32)
    drift = measure_drift(vectors, vectors, ["text"] * 120, ["de"] * 60 + ["bn"] * 60)
    assert drift.whole.spearman == pytest.approx(1)
    assert drift.whole.top_k_overlap == 1
    assert drift.whole.cosine == pytest.approx(1)
    assert list(drift.languages) == ["bn", "de"]


def test_the_language_that_moved_and_the_texts_that_did_are_named() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((200, 16)).astype(np.float32)
    moved = base.copy()
    moved[100:] = rng.standard_normal((100, 16))
    texts = [f"{number:03}" for number in range(200)]
    drift = measure_drift(moved, base, texts, ["de"] * 100 + ["bn"] * 100)
    assert drift.languages["de"].spearman == pytest.approx(1)
    assert abs(drift.languages["bn"].spearman) < 0.2
    assert {text.lang for text in drift.worst} == {"bn"}


def test_models_of_other_widths_have_no_cosine() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    assert measure_drift(vectors[:, :4], vectors, ["a"] * 50, ["de"] * 50).whole.cosine is None


def test_lengths_sort_by_their_size() -> None:
    assert [bucket("a" * length) for length in (1, 20, 21, 640, 641)] == [
        "1–20",
        "1–20",
        "21–40",
        "321–640",
        "over 640",
    ]


def test_tokens_a_word(tiny_encoder: Path) -> None:
    encoder = Encoder.load(tiny_encoder, torch.device("cpu"), torch.float32)
    found = measure_fertility(encoder, ["the cat is small", "猫"], ["en", "zh"])
    assert found.languages == {"en": 1.0, "zh": 2.0}  # the tiny vocabulary has no piece of a space and 猫
    assert found.unknown == 0
