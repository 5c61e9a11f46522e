"""Which rows of two corpora belong together, by how far their likeness stands out from that to other neighbours.

Margins are those of Artetxe & Schwenk (2019, arXiv:1811.01136), as LASER mines bitext: a cosine against the mean cosine
of both rows to their nearest neighbours.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embedlib.topk import NO_ROW

Margin = Literal["ratio", "distance", "absolute"]
Retrieval = Literal["forward", "intersect", "max", "all"]


class Neighbours(NamedTuple):
    """The nearest rows of another corpus for every row of one."""

    rows: npt.NDArray[np.int64]
    """(rows, k), -1 where there are fewer."""
    scores: npt.NDArray[np.float32]
    """(rows, k) cosines."""

    @property
    def means(self) -> npt.NDArray[np.float32]:
        """(rows,) mean cosine to the neighbours there are; 0 where there is none."""
        there = self.rows != NO_ROW
        sums = np.where(there, self.scores, 0).sum(axis=1)
        return np.asarray(sums / np.maximum(there.sum(axis=1), 1), np.float32)


class Pairs(NamedTuple):
    """Rows that belong together."""

    rows: npt.NDArray[np.int64]
    """(pairs, 2): row of the first corpus and of the second."""
    scores: npt.NDArray[np.float32]
    """(pairs,) margins, highest first."""


def best_partners(here: Neighbours, there_means: npt.NDArray[np.float32], margin: Margin) -> Pairs:
    """For each row its neighbour of the highest margin; `there_means` (rows of the other corpus,) are its means."""
    margins = margins_of(here, there_means, margin)
    first = margins.argmax(axis=1)
    rows = np.flatnonzero((here.rows != NO_ROW).any(axis=1))
    pairs = np.stack([rows, here.rows[rows, first[rows]]], axis=1)
    return by_score(Pairs(pairs, margins[rows, first[rows]]))


def all_partners(here: Neighbours, there_means: npt.NDArray[np.float32], margin: Margin) -> Pairs:
    """Every row with each of its neighbours, of one corpus, each pair once with the first row first."""
    rows, columns = np.nonzero(here.rows != NO_ROW)
    pairs = np.sort(np.stack([rows, here.rows[rows, columns]], axis=1), axis=1)
    pairs, firsts = np.unique(pairs, axis=0, return_index=True)
    return by_score(Pairs(pairs, margins_of(here, there_means, margin)[rows, columns][firsts]))


def margins_of(here: Neighbours, there_means: npt.NDArray[np.float32], margin: Margin) -> npt.NDArray[np.float32]:
    """The margin of each row and neighbour, (rows, k); -inf where there is none."""
    known = here.rows != NO_ROW
    around = (here.means[:, None] + there_means[np.where(known, here.rows, 0)]) / 2
    margins: npt.NDArray[np.floating] = here.scores
    if margin == "ratio":
        margins = here.scores / np.maximum(around, np.finfo(np.float32).tiny)
    elif margin == "distance":
        margins = here.scores - around
    return np.where(known, margins, -np.inf).astype(np.float32)


def matched(forward: Pairs, backward: Pairs, retrieval: Literal["forward", "intersect", "max"]) -> Pairs:
    """The pairs of both directions (`backward` has its own corpus first) that the retrieval keeps.

    forward: the best partner of every row of the first corpus; intersect: pairs that are best in both directions; max:
    the highest margins of both, each row in one pair at most.
    """
    if retrieval == "forward":
        return forward
    turned = Pairs(backward.rows[:, ::-1], backward.scores)
    if retrieval == "intersect":
        mutual = set(map(tuple, turned.rows.tolist()))
        kept = np.array([pair in mutual for pair in map(tuple, forward.rows.tolist())], np.bool_)
        return Pairs(forward.rows[kept], forward.scores[kept])
    both = by_score(Pairs(np.concatenate([forward.rows, turned.rows]), np.concatenate([forward.scores, turned.scores])))
    taken: tuple[set[int], set[int]] = set(), set()
    kept = np.zeros(len(both.rows), np.bool_)
    for number, (first, second) in enumerate(both.rows.tolist()):
        if first not in taken[0] and second not in taken[1]:
            kept[number] = True
            taken[0].add(first)
            taken[1].add(second)
    return Pairs(both.rows[kept], both.scores[kept])


def by_score(pairs: Pairs) -> Pairs:
    """Highest margin first, equal ones by their rows."""
    order = np.lexsort((pairs.rows[:, 1], pairs.rows[:, 0], -pairs.scores))
    return Pairs(pairs.rows[order], pairs.scores[order])


def first_of_group(pairs: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    """For each row the first row of its group: those that pairs (pairs, 2) link, directly or through others."""
    links = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(num_rows, num_rows))
    _, groups = connected_components(links, directed=False)
    _, firsts = np.unique(groups, return_index=True)
    return np.asarray(firsts[groups], np.int64)
