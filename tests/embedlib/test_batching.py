import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedlib.batching import pad, padded_size, token_budget_batches


@given(st.lists(st.integers(0, 70), max_size=60), st.integers(1, 200))
def test_every_index_once_within_the_budget_longest_first(lengths: list[int], budget: int) -> None:
    batches = list(token_budget_batches(np.array(lengths, dtype=np.int64), budget))
    order = [index for batch in batches for index in batch.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget


@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(70, 300))
def test_a_batch_is_as_large_as_the_budget_lets_it(lengths: list[int], budget: int) -> None:
    batches = list(token_budget_batches(np.array(lengths, dtype=np.int64), budget))
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_padding_is_counted() -> None:
    lengths = np.array([5, 2, 3, 3])
    batches = list(token_budget_batches(lengths, 9))
    assert [batch.tolist() for batch in batches] == [[0], [2, 3, 1]]
    assert padded_size(lengths, batches) == 5 + 3 * 3


def test_padding_is_on_the_right_and_masked() -> None:
    features = pad([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], pad_id=1)
    assert features["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert features["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
