"""A second opinion: another model scores candidates and positives, and the rule compares its scores, not the search's.

A sentence-transformers model scores by its own vectors of the same texts, which lie in the shards beside those that are
searched; a cross-encoder reads query and passage together, and what it said once is kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from embedlib.errors import DataError
from embedlib.negatives import Queries, mix
from embedlib.schemas import vectors_of
from embedlib.shard import Shard, inner_products
from embedlib.storage import Store
from embedlib.topk import NO_ROW, Hits, best
from jobs.parts import part_name, write_parquet
from jobs.shards import ShardPlan, texts_of

Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Block(NamedTuple):
    """A block of queries, as a judge must know it."""

    number: int
    queries: pa.Table
    """`id` and `text` of each."""
    keys: npt.NDArray[np.uint64]
    """(queries,): what tells their texts from others."""

    def take(self, rows: Rows) -> "Block":
        """Some of its queries."""
        return self._replace(queries=self.queries.take(pa.array(rows)), keys=self.keys[rows])


class Judge(Protocol):
    """Whoever scores passages for queries."""

    def of_positives(self, block: Block, owned: Rows) -> Scores:
        """Scores (queries, n) of positives by their positions, -1 where there is none."""
        ...

    def of_rows(self, block: Block, hits: Hits) -> Scores:
        """Scores (queries, n) of what a search found."""
        ...


class VectorJudge:
    """A second model, whose vectors the shards hold beside the first one's."""

    def __init__(self, queries: Path, shards: Sequence[Any], positives: Shard) -> None:
        """`queries` is the directory of its vectors of the queries, a part a block."""
        self.queries, self.shards, self.positives = queries, shards, positives

    def of_positives(self, block: Block, owned: Rows) -> Scores:
        """Scores (queries, n) of positives by their positions."""
        assert self.positives.judge is not None  # noqa: S101 (narrows the type)
        return inner_products(self._vectors(block), self.positives.judge, owned).astype(np.float32)

    def of_rows(self, block: Block, hits: Hits) -> Scores:
        """Scores (queries, n) of what a search found; a row lies in one shard."""
        sent = ray.put(self._vectors(block))
        return np.asarray(np.maximum.reduce(ray.get([shard.judged.remote(sent, hits.rows) for shard in self.shards])))

    def _vectors(self, block: Block) -> npt.NDArray[np.float32]:
        table = pq.read_table(self.queries / part_name(block.number))
        found = table["id"].to_numpy()
        places = np.minimum(np.searchsorted(found, block.queries["id"].to_numpy()), len(found) - 1)
        if not np.array_equal(found[places], block.queries["id"].to_numpy()):
            raise DataError(f"judge: gave no vector to some queries of block {block.number}, which the model gave one")
        return np.asarray(vectors_of(table["vector"])[places], np.float32)


class CrossJudge:
    """A cross-encoder, asked once for each pair of texts."""

    def __init__(self, scorer: Any, kept: Path, plan: ShardPlan, shards: Sequence[Any], positives: Shard) -> None:
        """`scorer` scores pairs of texts; what it said is kept in the directory `kept`, a part a block."""
        self.scorer, self.notes = scorer, Store.at(str(kept))
        self.plan, self.shards, self.positives = plan, shards, positives
        self.asked = self.kept = 0
        """Pairs to score so far, and those whose score was there."""

    def of_positives(self, block: Block, owned: Rows) -> Scores:
        """Scores (queries, n) of positives by their positions."""
        there = owned != NO_ROW
        texts = self.positives.texts["text"].take(pa.array(owned[there])).to_pylist()
        return self._scores(block, self.positives.keys[owned], there, texts)

    def of_rows(self, block: Block, hits: Hits) -> Scores:
        """Scores (queries, n) of what a search found."""
        there = hits.rows != NO_ROW
        rows, places = np.unique(hits.rows[there], return_inverse=True)
        texts = texts_of(self.plan, self.shards, rows)["text"].to_pylist()
        return self._scores(block, hits.keys, there, [texts[place] for place in places])

    def _scores(
        self, block: Block, keys: npt.NDArray[np.uint64], there: npt.NDArray[np.bool_], passages: Sequence[str]
    ) -> Scores:
        """Scores (queries, n) of the passages of these `keys` that are `there`, whose texts are `passages`."""
        note = self.notes / part_name(block.number)
        scored: dict[int, float] = {}
        if note.exists():
            known = pq.read_table(note.path)
            scored = dict(zip(known["pair"].to_pylist(), known["score"].to_pylist(), strict=True))
        pairs = mix(keys ^ mix(block.keys)[:, None])[there].tolist()
        queries = block.queries["text"].take(pa.array(np.nonzero(there)[0])).to_pylist()
        texts = dict(zip(pairs, zip(queries, passages, strict=True), strict=True))
        missing = [pair for pair in texts if pair not in scored]
        self.asked, self.kept = self.asked + len(texts), self.kept + len(texts) - len(missing)
        if missing:
            scored |= zip(missing, self.scorer([texts[pair] for pair in missing]).tolist(), strict=True)
            columns = {"pair": pa.array(scored, pa.uint64()), "score": pa.array(scored.values(), pa.float32())}
            write_parquet(note, pa.table(columns))
        scores = np.full(there.shape, -np.inf, np.float32)
        scores[there] = [scored[pair] for pair in pairs]
        return scores


def judged(judge: Judge, block: Block, hits: Hits) -> Hits:
    """What a search found, in the judge's order and with its scores."""
    scores = np.where(hits.rows == NO_ROW, np.float32(-np.inf), judge.of_rows(block, hits))
    return best(hits._replace(scores=scores), scores.shape[1])


def judged_queries(judge: Judge, block: Block, queries: Queries, owned: Rows) -> Queries:
    """Queries with the judge's scores of their positives."""
    scores = np.where(owned == NO_ROW, np.float32(np.inf), judge.of_positives(block, owned))
    return queries._replace(positive_scores=scores)
