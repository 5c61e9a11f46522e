from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from embedlib import metrics
from embedlib.errors import DataError
from embedlib.metrics import bitext_accuracy, mean_cosine, similarity_spearman, sts_spearman

Array = npt.NDArray[np.float64]
shapes = st.tuples(st.integers(3, 12), st.integers(2, 6), st.integers(0, 2**32 - 1))


def draw(shape: tuple[int, int, int], models: int = 2) -> Array:
    texts, dim, seed = shape
    return np.random.default_rng(seed).normal(size=(models, texts, dim))


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def slow_spearman(a: list[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


@given(shapes)
def test_mean_cosine_is_the_mean_of_cosines(shape: tuple[int, int, int]) -> None:
    a, b = draw(shape)
    slow = sum(cosine(x, y) for x, y in zip(a, b, strict=True)) / len(a)
    assert mean_cosine(a, b) == pytest.approx(slow, abs=1e-6)
    assert mean_cosine(a, 3 * a) == pytest.approx(1)
    assert mean_cosine(a, -a) == pytest.approx(-1)


@given(shapes)
def test_similarity_spearman_is_over_all_pairs(shape: tuple[int, int, int]) -> None:
    student, teacher = draw(shape)
    pairs = [(i, j) for i in range(len(student)) for j in range(i + 1, len(student))]
    a, b = ([cosine(model[i], model[j]) for i, j in pairs] for model in (student, teacher))
    if len(set(np.round(a + b, 5))) == 2 * len(pairs):  # float32 may swap near-equal cosines
        assert similarity_spearman(student, teacher) == pytest.approx(slow_spearman(a, b), abs=1e-6)


def test_similarity_spearman_ignores_rotation_and_width() -> None:
    teacher = draw((40, 6, 0), models=1)[0]
    rotation, _ = np.linalg.qr(draw((6, 6, 1), models=1)[0])
    student = np.pad(teacher @ rotation, ((0, 0), (0, 3)))
    assert similarity_spearman(student, teacher) == pytest.approx(1, abs=1e-4)


def test_similarity_spearman_draws_by_seed() -> None:
    student, teacher = draw((200, 8, 0))
    drawn = similarity_spearman(student, teacher, max_texts=30, seed=1)
    assert drawn == similarity_spearman(student, teacher, max_texts=30, seed=1)
    assert drawn != similarity_spearman(student, teacher, max_texts=30, seed=2)


@settings(deadline=None)
@given(shapes, st.integers(1, 5))
def test_bitext_accuracy_matches_a_loop_in_any_blocks(shape: tuple[int, int, int], block_rows: int) -> None:
    source, target = draw(shape)
    target += source
    hits = [
        max(range(len(source)), key=lambda column: cosine(a[row], b[column])) == row
        for a, b in ((source, target), (target, source))
        for row in range(len(source))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK_ROWS", block_rows)
        assert bitext_accuracy(source, target) == pytest.approx(sum(hits) / len(hits))


def test_bitext_accuracy_known_values() -> None:
    identity = np.eye(4)
    assert bitext_accuracy(identity, 2 * identity) == 1
    assert bitext_accuracy(identity, identity[::-1]) == 0
    # Row 0's neighbours tie; the first is taken, so rows 0 and 1 share one hit in each direction.
    assert bitext_accuracy(np.eye(4)[[0, 0, 2, 3]], np.eye(4)[[0, 0, 2, 3]]) == 0.75
    assert bitext_accuracy(np.ones((5, 3)), np.ones((5, 3))) == pytest.approx(1 / 5)


@given(shapes)
def test_sts_spearman_ranks_cosines(shape: tuple[int, int, int]) -> None:
    a, b = draw(shape)
    gold = [index // 2 for index in range(len(a))]  # with ties
    cosines = [cosine(x, y) for x, y in zip(a, b, strict=True)]
    if len(set(np.round(cosines, 5))) == len(cosines):
        assert sts_spearman(a, b, gold) == pytest.approx(slow_spearman(cosines, gold), abs=1e-6)


def test_half_precision_is_accepted() -> None:
    a = draw((5, 4, 0), models=1)[0].astype(np.float16)
    assert mean_cosine(a, a) == pytest.approx(1)


GOOD = np.eye(3)
NAN = np.where(np.arange(3)[:, None] == 1, np.nan, GOOD)
INFINITE = np.where(np.arange(3)[:, None] == 1, np.inf, GOOD)
ZERO = np.where(np.arange(3)[:, None] == 2, 0, GOOD)


@pytest.mark.parametrize("measure", [mean_cosine, bitext_accuracy, similarity_spearman])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (NAN, "row 1 has norm nan"),
        (INFINITE, "row 1 has norm inf"),
        (ZERO, "row 2 has norm 0.0"),
        (GOOD[:2], "expected"),
    ],
)
def test_bad_vectors_are_refused(measure, bad: Array, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=reason):
        measure(GOOD, bad)
    with pytest.raises(DataError, match=reason):
        measure(bad, GOOD)


def test_undefined_measures_are_refused() -> None:
    with pytest.raises(DataError, match="at least one text"):
        mean_cosine(np.empty((0, 3)), np.empty((0, 3)))
    with pytest.raises(DataError, match="at least one text"):
        mean_cosine(np.ones(3), np.ones(3))
    with pytest.raises(DataError, match="undefined"):
        similarity_spearman(GOOD, GOOD)
    with pytest.raises(DataError, match="undefined"):
        similarity_spearman(GOOD[:1], GOOD[:1])
    with pytest.raises(DataError, match="undefined"):
        sts_spearman(GOOD, GOOD[[0, 2, 1]], [1, 1, 1])
    with pytest.raises(DataError, match="gold scores: row 1"):
        sts_spearman(GOOD, GOOD, [1, np.nan, 2])
    with pytest.raises(DataError, match="gold scores"):
        sts_spearman(GOOD, GOOD, [1, 2])
