from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from embedlib.negatives import NegativeRule, Queries, select
from embedlib.topk import NO_ROW, Hits

SCORES = [0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4]


def candidates(scores: list[float] = SCORES, **fields: list[int]) -> Hits:
    """One query's hits; row and key are the position, and 100 more."""
    rows = np.arange(len(scores))[None]
    unknown = np.zeros(rows.shape, np.uint64)
    attributes = {name: np.array([values], np.uint64) for name, values in fields.items()}
    hits = Hits(np.array([scores], np.float32), rows, (rows + 100).astype(np.uint64), unknown, unknown)
    return hits._replace(**attributes)


def query(positives: list[tuple[int, float]], documents: list[int] | None = None, lang: int = 0) -> Queries:
    keys = np.array([[key for key, _ in positives]], np.uint64)
    scores = np.array([[score for _, score in positives]], np.float32)
    owned = np.array([documents or [0] * len(positives)], np.uint64)
    return Queries(np.array([1], np.uint64), np.array([lang], np.uint64), keys, owned, scores)


def rows_of(rule: dict[str, Any], queries: Queries, hits: Hits | None = None) -> list[int]:
    chosen = select(hits or candidates(), queries, NegativeRule.model_validate({"relative_margin": None} | rule)).hits
    return [row for row in chosen.rows[0].tolist() if row != NO_ROW]


def test_the_best_that_are_no_positives_are_taken() -> None:
    assert rows_of({"max_negatives": 3}, query([(101, 0.9)])) == [0, 2, 3]


def test_a_relative_margin_keeps_its_distance_from_the_least_positive() -> None:
    # 0.9 - 5 % = 0.855; with the positive at 0.8: 0.76
    assert rows_of({"relative_margin": 0.05, "max_negatives": 2}, query([(101, 0.9)])) == [2, 3]
    assert rows_of({"relative_margin": 0.05, "max_negatives": 2}, query([(101, 0.9), (103, 0.8)])) == [4, 5]


def test_a_relative_margin_below_zero_lowers_the_limit() -> None:
    hits = candidates([-0.1, -0.19, -0.21, -0.4])
    # -0.2 - 4 % of 0.2 = -0.208, where -0.2 × 96 % would be -0.192
    assert rows_of({"relative_margin": 0.04, "max_negatives": 2}, query([(50, -0.2)]), hits) == [2, 3]


def test_absolute_margins_and_scores_are_limits() -> None:
    owner = query([(101, 0.9)])
    assert rows_of({"absolute_margin": 0.15, "max_negatives": 2}, owner) == [4, 5]
    assert rows_of({"max_score": 0.75, "max_negatives": 2}, owner) == [4, 5]
    assert rows_of({"min_score": 0.65, "max_negatives": 7}, owner) == [0, 2, 3, 4]


def test_a_range_is_counted_among_those_that_pass() -> None:
    assert rows_of({"range_min": 2, "max_negatives": 2}, query([(101, 0.9)])) == [3, 4]
    assert rows_of({"range_min": 2, "range_max": 4, "max_negatives": 2}, query([(101, 0.9)])) == [3, 4]


def test_languages_and_documents_of_candidates_count() -> None:
    hits = candidates(langs=[7, 8, 7, 8, 7, 8, 7, 8], documents=[0, 3, 3, 4, 5, 0, 0, 9])
    owner = query([(101, 0.9)], documents=[3], lang=7)
    assert rows_of({"language": "same", "max_negatives": 3}, owner, hits) == [0, 4, 6]
    assert rows_of({"language": "other", "max_negatives": 3}, owner, hits) == [3, 5, 7]
    assert rows_of({"max_negatives": 3}, owner, hits) == [0, 3, 4]


def test_a_query_is_no_negative_of_itself() -> None:
    hits = candidates(keys=[1, 101, 102, 103, 104, 105, 106, 107])
    selection = select(hits, query([(105, 0.6)]), NegativeRule(max_negatives=2, relative_margin=None))
    assert selection.hits.rows.tolist() == [[1, 2]]
    assert selection.rejected == {"the query itself": 1}


def test_what_is_drawn_depends_on_seed_and_texts_alone() -> None:
    rule = {"sampling": "random", "max_negatives": 3, "range_max": 8}
    drawn = {seed: rows_of(rule | {"seed": seed}, query([(101, 0.9)])) for seed in range(20)}
    assert drawn[3] == rows_of(rule | {"seed": 3}, query([(101, 0.9)]))
    assert len({tuple(rows) for rows in drawn.values()}) > 10
    assert {row for rows in drawn.values() for row in rows} == {0, 2, 3, 4, 5, 6, 7}
    assert all(rows == sorted(rows) for rows in drawn.values())


def test_depth_does_not_depend_on_other_queries() -> None:
    rule = NegativeRule(max_negatives=2, relative_margin=None)
    alone = select(candidates(), query([(101, 0.9)]), rule)
    deep = select(candidates([*SCORES, *np.linspace(0.39, 0, 90).tolist()]), query([(101, 0.9)]), rule)
    assert alone.hits.rows.tolist() == deep.hits.rows.tolist()


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30),
    st.floats(-1, 1, width=32),
    st.floats(0, 0.5),
    st.integers(1, 5),
)
@example(scores=[0.0] * 12 + [-1.0], positive=-0.5, margin=0.0, most=1)
def test_no_negative_is_above_its_limit(scores: list[float], positive: float, margin: float, most: int) -> None:
    scores = sorted(scores, reverse=True)
    rule = NegativeRule(max_negatives=most, relative_margin=margin)
    chosen = select(candidates(scores), query([(1000, positive)]), rule).hits
    limit = positive - margin * abs(positive) + 1e-6
    there = chosen.rows[0] != NO_ROW
    assert (chosen.scores[0][there] <= limit).all()
    seen = scores[: rule.depth(1)]  # candidates further down are not looked at
    assert there.sum() == min(most, sum(score <= limit - 2e-6 for score in seen)) or any(
        abs(score - limit) < 1e-5 for score in scores
    )


def test_a_range_without_room_is_refused() -> None:
    with pytest.raises(ValidationError, match="range_max: 5 leaves no room for 4 negatives"):
        NegativeRule(max_negatives=4, range_min=3, range_max=5)
