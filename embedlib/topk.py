"""The best of what several searches found: merged, in one order whatever the number of shards, no text twice."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NO_ROW = -1


class Hits(NamedTuple):
    """What a search found for each query, best first; every field is (queries, k)."""

    scores: npt.NDArray[np.float32]
    """-inf where there is no more."""
    rows: npt.NDArray[np.int64]
    """Number of the row in the corpus, -1 where there is no more."""
    keys: npt.NDArray[np.uint64]
    """What tells one text from another."""
    documents: npt.NDArray[np.uint64]
    """What tells the document of a row from others; 0: unknown."""
    langs: npt.NDArray[np.uint64]
    """What tells the language of a row from others; 0: unknown."""

    def take(self, columns: npt.NDArray[np.int64]) -> "Hits":
        """The hits at `columns` (queries, n) of each query."""
        return Hits._make(np.take_along_axis(field, columns, axis=1) for field in self)

    def masked(self, gone: npt.NDArray[np.bool_]) -> "Hits":
        """Without the hits where `gone` (queries, k) is true, which leave a score of -inf, no row and no text."""
        return self._replace(
            scores=np.where(gone, np.float32(-np.inf), self.scores),
            rows=np.where(gone, NO_ROW, self.rows),
            keys=np.where(gone, np.uint64(0), self.keys),
        )


def merge(found: Sequence[Hits], k: int) -> Hits:
    """The best `k` over all shards: by score, equal scores by row, of equal texts the first row alone.

    If every shard gives its best `k` distinct texts, these are the best `k` distinct texts of all. Fields are
    (queries, at most k).
    """
    joined = Hits._make(np.concatenate(fields, axis=1) for fields in zip(*found, strict=True))
    return best(without_copies(joined), k)


def best(hits: Hits, k: int) -> Hits:
    """The best `k` in order: by score, equal scores by row; at most as many as there are."""
    rows = np.where(hits.rows == NO_ROW, np.iinfo(np.int64).max, hits.rows)
    order = np.lexsort((rows, -hits.scores), axis=1)
    return hits.take(order[:, :k])


def without_copies(hits: Hits) -> Hits:
    """`hits` with one row, the first of the corpus, for each text a query found."""
    rows = np.where(hits.rows == NO_ROW, np.iinfo(np.int64).max, hits.rows)
    order = np.lexsort((rows, hits.keys), axis=1)
    keys = np.take_along_axis(hits.keys, order, axis=1)
    there = np.take_along_axis(hits.rows, order, axis=1) != NO_ROW
    repeated = np.zeros(keys.shape, np.bool_)
    repeated[:, 1:] = (keys[:, 1:] == keys[:, :-1]) & there[:, 1:] & there[:, :-1]
    gone = np.empty_like(repeated)
    np.put_along_axis(gone, order, repeated, axis=1)
    return hits.masked(gone)


def recall(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Share of the `expected` rows (queries, k) that are among the `found` ones (queries, any k)."""
    there = expected != NO_ROW
    hit = (expected[:, :, None] == found[:, None, :]).any(axis=2)
    return float((hit & there).sum() / max(there.sum(), 1))
