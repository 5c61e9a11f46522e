import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedlib.topk import NO_ROW, Hits, best, merge, recall


def hits_of(scores: list[list[float]], rows: list[list[int]], keys: list[list[int]]) -> Hits:
    unknown = np.zeros(np.shape(rows), np.uint64)
    return Hits(np.array(scores, np.float32), np.array(rows), np.array(keys, np.uint64), unknown, unknown)


def test_equal_scores_are_in_the_order_of_their_rows() -> None:
    found = best(hits_of([[0.5, 0.9, 0.5, 0.5]], [[7, 3, 1, 4]], [[7, 3, 1, 4]]), 3)
    assert found.rows.tolist() == [[3, 1, 4]]
    assert found.keys.tolist() == [[3, 1, 4]]


def test_of_equal_texts_in_several_shards_the_first_row_stays() -> None:
    one = hits_of([[0.9, 0.8]], [[10, 11]], [[1, 2]])
    two = hits_of([[0.9, 0.7]], [[4, 5]], [[1, 3]])
    assert merge([one, two], 4).rows.tolist() == [[4, 11, 5, NO_ROW]]


def test_rows_that_are_not_there_come_last_and_are_no_copies_of_each_other() -> None:
    short = hits_of([[0.1, -np.inf, -np.inf]], [[2, NO_ROW, NO_ROW]], [[5, 5, 5]])
    found = merge([short, short], 3)
    assert found.rows.tolist() == [[2, NO_ROW, NO_ROW]]
    assert found.scores.tolist() == [[np.float32(0.1), -np.inf, -np.inf]]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_shards_find_what_one_shard_finds(texts: list[tuple[int, int]], num_shards: int, data: st.DataObject) -> None:
    """A text is a score and a number; equal texts have equal scores, as equal vectors do."""
    k = data.draw(st.integers(1, len(texts)))
    scores = [[score / 10 for score, _ in texts]]
    keys = [[10 * score + number for score, number in texts]]
    whole = hits_of(scores, [[*range(len(texts))]], keys)
    edges = sorted(data.draw(st.lists(st.integers(0, len(texts)), min_size=num_shards, max_size=num_shards)))
    runs = [slice(a, b) for a, b in zip([0, *edges], [*edges, len(texts)], strict=True) if a < b]
    shards = [merge([Hits._make(field[:, run] for field in whole)], k) for run in runs]
    expected, found = merge([whole], k), merge(shards, k)
    assert found.rows[:, : expected.rows.shape[1]].tolist() == expected.rows[:, : found.rows.shape[1]].tolist()


def test_recall_counts_expected_rows_alone() -> None:
    assert recall(np.array([[1, 2, 9], [4, 5, 6]]), np.array([[1, 3], [5, NO_ROW]])) == 2 / 3
