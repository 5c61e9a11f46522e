"""How many rows of each language are taken: bounds, sums and proportions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from embedlib.balancing import BalanceConfig, quotas, targets

AVAILABLE = st.dictionaries(st.sampled_from(["de", "en", "fr", "hi", "ja"]), st.integers(1, 100_000), min_size=1)


def test_nothing_asked_for_is_all() -> None:
    assert targets({"en": 5, "de": 3}, BalanceConfig()) == {"en": 5, "de": 3}
    assert targets({"en": 5, "de": 3}, BalanceConfig(cap=4)) == {"en": 4, "de": 3}


def test_temperature_is_between_equal_and_proportional() -> None:
    available = {"en": 8000, "de": 2000}
    assert targets(available, BalanceConfig(max_rows=1000)) == {"en": 800, "de": 200}
    assert targets(available, BalanceConfig(max_rows=1000, temperature=0)) == {"en": 500, "de": 500}
    assert targets(available, BalanceConfig(max_rows=1000, temperature=0.5)) == {"en": 667, "de": 333}


def test_what_a_small_language_lacks_the_others_get() -> None:
    found = targets({"en": 9000, "de": 9000, "bn": 10}, BalanceConfig(max_rows=3010, temperature=0))
    assert found == {"en": 1500, "de": 1500, "bn": 10}
    floored = targets({"en": 9900, "bn": 100}, BalanceConfig(max_rows=1000, floor=80))
    assert floored == {"en": 920, "bn": 80}


@given(AVAILABLE, st.integers(1, 200_000), st.floats(0, 1), st.integers(0, 500), st.integers(500, 50_000))
def test_targets_keep_their_bounds_and_sum(
    available: dict[str, int], max_rows: int, temperature: float, floor: int, cap: int
) -> None:
    config = BalanceConfig(max_rows=max_rows, temperature=temperature, floor=floor, cap=cap)
    found = targets(available, config)
    ceilings = {lang: min(count, cap) for lang, count in available.items()}
    assert found.keys() == available.keys()
    for lang, count in found.items():
        assert min(floor, ceilings[lang]) <= count <= ceilings[lang]
    floors = sum(min(floor, ceiling) for ceiling in ceilings.values())
    assert sum(found.values()) == max(floors, min(max_rows, sum(ceilings.values())))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(0, 10**9))
def test_quotas_are_exact_and_in_proportion(counts: list[int], target: int) -> None:
    cells = np.array(counts, np.int64)
    found = quotas(cells, target)
    assert found.sum() == min(target, cells.sum())
    assert (found <= cells).all()
    if 0 < target < cells.sum():
        assert (abs(found - cells * (target / cells.sum())) < 1 + 1e-3).all()


def test_unknown_and_impossible_values_are_refused() -> None:
    with pytest.raises(ValidationError, match="temperature"):
        BalanceConfig(temperature=1.5)
