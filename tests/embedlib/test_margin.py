import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedlib.margin import Margin, Neighbours, Pairs, all_partners, best_partners, first_of_group, matched
from embedlib.topk import NO_ROW

HERE = Neighbours(np.array([[0, 1], [1, 2], [2, NO_ROW]]), np.array([[0.9, 0.8], [0.6, 0.5], [0.7, 0]], np.float32))
MEANS = np.array([0.9, 0.5, 0.7], np.float32)


@pytest.mark.parametrize(
    ("margin", "partners", "scores"),
    [
        # row 0: mean 0.85 → 0.9 / 0.875 < 0.8 / 0.675; row 1: mean 0.55 → 0.6 / 0.525 > 0.5 / 0.625
        ("ratio", {0: 1, 1: 1, 2: 2}, {0: 0.8 / 0.675, 1: 0.6 / 0.525, 2: 1.0}),
        ("distance", {0: 1, 1: 1, 2: 2}, {0: 0.125, 1: 0.075, 2: 0.0}),
        ("absolute", {0: 0, 1: 1, 2: 2}, {0: 0.9, 1: 0.6, 2: 0.7}),
    ],
)
def test_margins_are_against_the_mean_of_both_neighbourhoods(
    margin: Margin, partners: dict[int, int], scores: dict[int, float]
) -> None:
    pairs = best_partners(HERE, MEANS, margin)
    assert dict(pairs.rows.tolist()) == partners
    assert {row: score for (row, _), score in zip(pairs.rows.tolist(), pairs.scores, strict=True)} == pytest.approx(
        scores
    )
    assert pairs.scores.tolist() == sorted(pairs.scores.tolist(), reverse=True)


def pairs_of(rows: list[tuple[int, int]], scores: list[float]) -> Pairs:
    return Pairs(np.array(rows, np.int64).reshape(-1, 2), np.array(scores, np.float32))


def test_retrieval_keeps_one_direction_both_or_the_highest() -> None:
    forward = pairs_of([(0, 0), (1, 0), (2, 2)], [1.3, 1.2, 1.1])
    backward = pairs_of([(0, 0), (1, 1), (2, 1)], [1.3, 1.25, 1.0])
    assert matched(forward, backward, "forward") == forward
    assert matched(forward, backward, "intersect").rows.tolist() == [[0, 0]]
    assert matched(forward, backward, "max").rows.tolist() == [[0, 0], [1, 1], [2, 2]]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 2, width=32)), max_size=30))
def test_max_uses_each_row_once(found: list[tuple[int, int, float]]) -> None:
    forward = pairs_of([(a, b) for a, b, _ in found], [score for *_, score in found])
    kept = matched(forward, pairs_of([], []), "max")
    assert len(set(kept.rows[:, 0].tolist())) == len(kept.rows) == len(set(kept.rows[:, 1].tolist()))
    assert not found or kept.scores[0] == forward.scores.max()


def test_rows_that_are_linked_through_others_are_one_group() -> None:
    assert first_of_group(np.array([[3, 1], [5, 3], [4, 4]]), 6).tolist() == [0, 1, 2, 1, 4, 1]
    assert first_of_group(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]


def test_all_partners_are_told_once() -> None:
    own = Neighbours(np.array([[1, 2], [0, 2], [1, NO_ROW]]), np.array([[0.9, 0.5], [0.9, 0.7], [0.7, 0]], np.float32))
    pairs = all_partners(own, own.means, "absolute")
    assert pairs.rows.tolist() == [[0, 1], [1, 2], [0, 2]]
    assert pairs.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
