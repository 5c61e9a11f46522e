import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedlib.batching import NO_TEXT
from embedlib.sampling import BatchPlan, temperature_shares


def plan_of(groups: list[int], texts: list[list[int]], batch_size: int, seed: int = 0) -> BatchPlan:
    return BatchPlan(np.array(groups), np.array(texts), np.ones(max(groups) + 1), batch_size, seed)


samples = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(20, 32), st.integers(-1, 3)), min_size=1, max_size=60
)


@given(samples, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_once_one_group_a_batch_none_too_large(
    rows: list[tuple[int, int, int, int]], batch_size: int, epoch: int
) -> None:
    plan = plan_of([group for group, *_ in rows], [list(texts) for _, *texts in rows], batch_size)
    batches = plan.epoch(epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(rows)))
    for batch in batches:
        assert len(set(plan.groups[batch].tolist())) == 1
        assert len(batch) < 2 * batch_size


def test_twins_are_apart_but_for_those_left_over() -> None:
    plan = plan_of([0] * 200, [[row // 2, NO_TEXT] for row in range(200)], 10)
    for epoch in range(10):  # one cut without a look may be lucky, ten are not
        batches = plan.epoch(epoch)
        assert len(batches) <= 21
        assert sum(len(np.unique(plan.texts[batch, 0])) < len(batch) for batch in batches) <= 1


def test_batches_are_full_where_texts_allow_it() -> None:
    plan = plan_of([0] * 1000, [[row, 1000 + row] for row in range(1000)], 64)
    sizes = [len(batch) for batch in plan.epoch(0)]
    assert len(sizes) == 16
    assert min(sizes) >= 62


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plan = plan_of([0] * 50, [[row] for row in range(50)], 10)
    first, again, second = (np.concatenate(plan.epoch(number)).tolist() for number in (0, 0, 1))
    other = np.concatenate(plan._replace(seed=1).epoch(0)).tolist()
    assert first == again
    assert first != second
    assert first != other


def test_shares_draw_more_of_small_groups_and_lose_none_over_epochs() -> None:
    sizes = np.array([900, 100])
    np.testing.assert_allclose(temperature_shares(sizes, np.ones(2), 1.0), [1, 1])
    shares = temperature_shares(sizes, np.ones(2), 0.0)
    np.testing.assert_allclose(shares * sizes, [500, 500])
    plan = BatchPlan(np.repeat([0, 1], sizes), np.arange(1000)[:, None], shares, 100, 0)
    two_epochs = np.bincount(np.concatenate([*plan.epoch(0), *plan.epoch(1)]), minlength=1000)
    # Shuffles are gone through to their end before the next: nothing comes a second time before all came once.
    assert set(two_epochs[:900].tolist()) == {1, 2}
    assert set(two_epochs[900:].tolist()) == {10}


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(2, 50))
def test_a_sample_is_in_a_batch_once_however_often_an_epoch_has_it(
    large: int, small: int, temperature: float, batch_size: int
) -> None:
    sizes = np.array([large, small])
    shares = temperature_shares(sizes, np.ones(2), temperature)
    plan = BatchPlan(np.repeat([0, 1], sizes), np.arange(large + small)[:, None], shares, batch_size, 0)
    batches = plan.epoch(0)
    assert all(len(batch) == len(set(batch.tolist())) for batch in batches)
    drawn = np.bincount(plan.groups[np.concatenate(batches)], minlength=2)
    assert drawn.tolist() == np.round(shares * sizes).astype(int).tolist()


def test_a_small_group_gets_its_share_of_steps() -> None:
    sizes = np.array([10_000, 100])
    plan = BatchPlan(
        np.repeat([0, 1], sizes), np.arange(10_100)[:, None], temperature_shares(sizes, np.ones(2), 0.5), 256, 0
    )
    of_small = [len(batch) for batch in plan.epoch(0) if plan.groups[batch[0]] == 1]
    assert sorted(of_small) == [18, *[100] * 9]


def test_a_text_that_is_everywhere_costs_no_batches_of_one() -> None:
    texts = [[row if row % 10 else 0, 5000 + row] for row in range(2000)]
    sizes = [len(batch) for batch in plan_of([0] * 2000, texts, 64).epoch(0)]
    assert sum(sizes) == 2000
    assert len(sizes) <= 2000 / 64 + 5
    assert min(sizes) > 10
