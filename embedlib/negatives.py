"""Which of the passages that look like an answer are taken as hard negatives: rules over arrays.

Positive-aware margins are those of NV-Retriever (Moreira et al. 2024, arXiv:2407.15831), with |score| in the relative
one, so that a negative score of the positive moves the limit down and not up.
"""

from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from embedlib.config import Config
from embedlib.topk import NO_ROW, Hits, best

# Where filters may reject candidates, this many a negative are looked at.
CANDIDATES_A_NEGATIVE = 10


class NegativeRule(Config):
    """What makes a passage a hard negative of a query."""

    max_negatives: int = Field(default=7, ge=1)
    """Negatives a query."""
    range_min: int = Field(default=0, ge=0)
    """How many of the best candidates that pass are left out, since they may be answers nobody labelled."""
    range_max: int | None = Field(default=None, ge=1)
    """Up to which rank candidates are taken; none: ten times max_negatives where a filter may reject some, else just
    enough."""
    relative_margin: float | None = Field(default=0.05, ge=0)
    """A negative scores at most the positive's score less this share of its size (0.05: NV-Retriever's 95 %)."""
    absolute_margin: float | None = None
    """A negative scores at most the positive's score less this."""
    max_score: float | None = None
    """No negative scores more."""
    min_score: float | None = None
    """No negative scores less."""
    sampling: Literal["top", "random"] = "top"
    """The best of the range, or any of it, drawn by seed."""
    seed: int = Field(default=0, ge=0)
    """Of what is drawn."""
    language: Literal["any", "same", "other"] = "any"
    """Of negatives, seen from the query's."""
    short: Literal["keep", "drop", "random"] = "keep"
    """A query with fewer negatives than max_negatives: keep it so, drop it, or fill it with random passages, which the
    output marks."""

    @model_validator(mode="after")
    def _range_holds_something(self) -> Self:
        if self.range_max is not None and self.range_max < self.range_min + self.max_negatives:
            raise ValueError(
                f"range_max: {self.range_max} leaves no room for {self.max_negatives} negatives after range_min "
                f"{self.range_min}; expected at least {self.range_min + self.max_negatives}"
            )
        return self

    @property
    def filters(self) -> bool:
        """Whether a candidate may be rejected for anything but being a positive."""
        limits = (self.relative_margin, self.absolute_margin, self.max_score, self.min_score)
        return self.language != "any" or any(limit is not None for limit in limits)

    @property
    def last_rank(self) -> int:
        """Up to which rank of what passes candidates are taken."""
        enough = self.max_negatives * (CANDIDATES_A_NEGATIVE if self.filters else 1)
        return self.range_max or self.range_min + enough

    def depth(self, num_positives: int) -> int:
        """How many candidates to search for: a query's positives, and its own text, may be the best of them."""
        return self.last_rank + num_positives + 1


class Queries(NamedTuple):
    """What a rule must know of some queries."""

    keys: npt.NDArray[np.uint64]
    """(queries,): what tells the text of a query from others."""
    langs: npt.NDArray[np.uint64]
    """(queries,): 0 where unknown."""
    positive_keys: npt.NDArray[np.uint64]
    """(queries, most positives): the texts of its positives, 0 where there is no more."""
    positive_documents: npt.NDArray[np.uint64]
    """(queries, most positives): their documents, 0 where unknown or no more."""
    positive_scores: npt.NDArray[np.float32]
    """(queries, most positives): inf where there is no more."""


class Selection(NamedTuple):
    """The negatives chosen, and why the other candidates were not."""

    hits: Hits
    """(queries, max_negatives), best first."""
    rejected: dict[str, int]
    """Candidates by the first reason against them."""


def select(hits: Hits, queries: Queries, rule: NegativeRule) -> Selection:
    """Choose negatives among the candidates `hits`, which are in order of their scores."""
    rejected = {}
    # As deep as a query's own positives ask for, whatever other queries the search was made for.
    depth = rule.depth(0) + (queries.positive_keys != 0).sum(axis=1)
    passing = (hits.rows != NO_ROW) & (np.arange(hits.rows.shape[1]) < depth[:, None])
    for reason, gone in _reasons(hits, queries, rule):
        rejected[reason] = int((gone & passing).sum())
        passing &= ~gone
    passed = best(hits.masked(~passing), rule.last_rank)
    window = Hits._make(field[:, rule.range_min :] for field in passed)
    if rule.sampling == "random":
        drawn = in_drawn_order(window, queries, rule.seed)
        window = Hits._make(field[:, : rule.max_negatives] for field in drawn)
    chosen = best(window, rule.max_negatives)
    return Selection(chosen, {reason: count for reason, count in rejected.items() if count})


def _reasons(hits: Hits, queries: Queries, rule: NegativeRule) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """The rule's reasons against each candidate, as masks (queries, k)."""
    reasons = [
        ("positive", _among(hits.keys, queries.positive_keys)),
        ("the query itself", hits.keys == queries.keys[:, None]),
        ("same document", _among(hits.documents, queries.positive_documents)),
    ]
    lowest = queries.positive_scores.min(axis=1, initial=np.inf)[:, None]
    if rule.absolute_margin is not None:
        reasons.append(("absolute_margin", hits.scores + np.float32(rule.absolute_margin) > lowest))
    if rule.relative_margin is not None:
        limit = lowest - np.abs(lowest) * np.float32(rule.relative_margin)
        reasons.append(("relative_margin", hits.scores > np.where(np.isinf(lowest), np.inf, limit)))
    if rule.max_score is not None:
        reasons.append(("max_score", hits.scores > rule.max_score))
    if rule.min_score is not None:
        reasons.append(("min_score", hits.scores < rule.min_score))
    if rule.language != "any":
        reasons.append(("language", wrong_language(hits, queries, rule)))
    return reasons


def wrong_language(hits: Hits, queries: Queries, rule: NegativeRule) -> npt.NDArray[np.bool_]:
    """Which candidates (queries, k) are in a language that the rule does not want."""
    same: npt.NDArray[np.bool_] = hits.langs == queries.langs[:, None]
    if rule.language == "any":
        return np.zeros_like(same)
    return same if rule.language == "other" else ~same


def _among(found: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of (queries, k) are one of the same query's `known` (queries, n), where 0 is nothing."""
    there = np.zeros(found.shape, np.bool_)
    # One known at a time: all at once would take memory by their product.
    for column in known[:, (known != 0).any(axis=0)].T:
        there |= found == column[:, None]
    there &= found != 0
    return there


def in_drawn_order(hits: Hits, queries: Queries, seed: int) -> Hits:
    """The hits of each query as chance has them, those that are none at the end."""
    drawn = np.where(hits.rows == NO_ROW, np.inf, _priorities(hits, queries, seed))
    return hits.take(np.argsort(drawn, axis=1, kind="stable"))


def _priorities(hits: Hits, queries: Queries, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each query and candidate, the same wherever and whenever they meet."""
    mixed = mix(hits.keys ^ mix(queries.keys ^ mix(np.array([seed], np.uint64)))[:, None])
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers that look random, one for each value: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
