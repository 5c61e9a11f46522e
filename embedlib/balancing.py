"""How many rows of each language a corpus takes, and from where: temperature, caps and floors, exactly."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import Field

from embedlib.config import Config

Counts = npt.NDArray[np.int64]


class BalanceConfig(Config):
    """How many rows of each language stay. Nothing given: all of them."""

    max_rows: int | None = Field(default=None, ge=1)
    """Rows of all languages together, after caps and floors."""
    temperature: float = Field(default=1.0, ge=0, le=1)
    """With max_rows a language weighs (its share)^temperature: 1 keeps the shares, 0 makes them equal."""
    cap: int | None = Field(default=None, ge=1)
    """Most rows of one language."""
    floor: int = Field(default=0, ge=0)
    """Rows that a language keeps at least, if it has them, whatever its weight."""


def targets(available: Mapping[str, int], config: BalanceConfig) -> dict[str, int]:
    """Rows to take of each language, given those there are.

    With max_rows the sum is exactly that, unless there are fewer rows, or floors ask for more.
    """
    langs = sorted(available)
    have = np.array([available[lang] for lang in langs], np.int64)
    ceiling = have if config.cap is None else np.minimum(have, config.cap)
    if config.max_rows is None or config.max_rows >= ceiling.sum():
        return dict(zip(langs, ceiling.tolist(), strict=True))
    floor = np.minimum(ceiling, config.floor)
    weights = np.where(have > 0, (have / have.sum()) ** config.temperature, 0.0)
    return dict(zip(langs, _shared_out(config.max_rows, weights, floor, ceiling).tolist(), strict=True))


def _shared_out(total: int, weights: npt.NDArray[np.float64], floor: Counts, ceiling: Counts) -> Counts:
    """`total` by `weights`, with every share between its floor and its ceiling: what one cannot take the others get."""
    if floor.sum() >= total:
        return floor
    # The level at which bounded shares add up to the total, by bisection: they grow with it.
    low, high = 0.0, float((ceiling / np.where(weights > 0, weights, 1)).max() + 1)
    for _ in range(200):
        level = (low + high) / 2
        if np.clip(level * weights, floor, ceiling).sum() < total:
            low = level
        else:
            high = level
    shares = np.clip(high * weights, floor, ceiling)
    return rounded(shares, total, ceiling)


def rounded(shares: npt.NDArray[np.float64], total: int, ceiling: Counts) -> Counts:
    """Whole numbers near `shares` that add up to `total`, none above its ceiling: the largest remainders go up."""
    whole = np.minimum(np.floor(shares + 1e-9).astype(np.int64), ceiling)
    order = np.argsort(-(shares - whole), kind="stable")
    missing = total - int(whole.sum())
    for place in order[whole[order] < ceiling[order]][: max(missing, 0)]:
        whole[place] += 1
    return whole


def quotas(counts: Counts, target: int) -> Counts:
    """`target` rows shared out over cells that hold `counts`, in proportion and exactly.

    >>> quotas(np.array([50, 30, 20]), 10).tolist()
    [5, 3, 2]
    """
    total = int(counts.sum())
    if target >= total:
        return counts
    # Integers, because a product of floats could lose a row in a billion.
    whole, rest = np.divmod(counts * target, total)
    order = np.argsort(-rest, kind="stable")
    whole[order[: target - int(whole.sum())]] += 1
    return whole
