"""The process that mines: it takes blocks of queries through all shards and writes their negatives.

It is a module of its own so that its processes start without the libraries that embed.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from embedlib.negatives import NegativeRule, Queries, Selection, in_drawn_order, mix, select, wrong_language
from embedlib.schemas import negatives_schema, vectors_of
from embedlib.shard import Shard, inner_products, text_keys
from embedlib.storage import Store
from embedlib.topk import NO_ROW, Hits, merge
from jobs.judges import Block, CrossJudge, Judge, VectorJudge, judged, judged_queries
from jobs.parts import part_name, write_parquet
from jobs.shards import ShardPlan, search_shards, texts_of

STATISTICS = b"embedlib.mined"
# Of all queries that are searched for together: some 150 MB of what is known of them.
MOST_CANDIDATES = 1 << 22
DRAWN_A_NEGATIVE = 4
MOST_DRAWS = 32


class MinePlan(NamedTuple):
    """What the miners must know."""

    output: str
    rule: dict[str, Any]
    queries: str
    """Directory of the queries' vectors, a part a block."""
    shards: ShardPlan
    num_blocks: int
    judge: str | None
    """Directory of the second model's vectors of the queries, or of the cross-encoder."""
    judged: str | None
    """Where what the cross-encoder says is kept; none where the judge is none."""

    @property
    def work(self) -> Path:
        """Where shards, positives and links lie."""
        return Path(self.shards.work)


class Miner:
    """Ray actor: takes blocks of queries through all shards and writes their negatives."""

    def __init__(self, plan: MinePlan, shards: list[Any]) -> None:
        self.plan, self.shards = plan, shards
        self.rule = NegativeRule.model_validate(plan.rule)
        self.trained = plan.shards.trained_index()
        self.positives = Shard.open(plan.work / "positives")
        self.positive_ids = self.positives.texts["id"].to_numpy()
        self.links = np.load(plan.work / "links.npy", mmap_mode="r")
        self.judge = self.load_judge()

    def load_judge(self) -> Judge | None:
        """Who scores candidates in the search's stead, if anybody."""
        if self.plan.judge is None:
            return None
        if self.plan.judged is None:
            return VectorJudge(Path(self.plan.judge), self.shards, self.positives)
        # Not above: without a cross-encoder this process has no use for PyTorch.
        from embedlib.cross_encoder import PairScorer
        from embedlib.encoder import default_device

        scorer = PairScorer.load(Path(self.plan.judge), default_device())
        return CrossJudge(scorer, Path(self.plan.judged), self.plan.shards, self.shards, self.positives)

    def mine(self, number: int) -> dict[str, Any]:
        """Mine block `number` and put its part file in place; give back what it holds.

        `judged` are the pairs that a cross-encoder was to score for it, `kept` those whose score was there.
        """
        asked_before = self.scores_asked()
        block = read_queries(self.plan, number)
        vectors = vectors_of(block["vector"]).astype(np.float32)
        owned = self.owned(block["id"].to_numpy())
        queries = self.described(block, vectors, owned)
        asked = Block(number, block, queries.keys)
        if self.judge:
            queries = judged_queries(self.judge, asked, queries, owned)
        chosen, rejected = self.chosen(asked, queries, vectors)
        drawn = np.zeros(chosen.rows.shape, np.bool_)
        if self.rule.short == "random":
            chosen, drawn = self.filled(chosen, queries, vectors, asked)
        asked_for, kept = np.subtract(self.scores_asked(), asked_before).tolist()
        written = self.write(number, block, owned, queries, chosen, drawn, rejected)
        return written | {"judged": asked_for, "kept": kept}

    def scores_asked(self) -> tuple[int, int]:
        """Pairs that the cross-encoder was to score so far, and those of them whose score was there."""
        return (self.judge.asked, self.judge.kept) if isinstance(self.judge, CrossJudge) else (0, 0)

    def chosen(self, asked: Block, queries: Queries, vectors: npt.NDArray[np.float32]) -> Selection:
        """The negatives (queries, max_negatives) of a block; queries with many positives go few at a time."""
        depths = self.rule.depth(0) + (queries.positive_keys != 0).sum(axis=1)
        order = np.argsort(depths, kind="stable")
        found: list[Hits] = []
        rejected: Counter[str] = Counter()
        for run in runs(depths[order]):
            some = order[run]
            hits = search_shards(self.plan.shards, self.shards, vectors[some], int(depths[some].max()), self.trained)
            # The judge sees what a query asks for itself, however deep the others of its block do.
            hits = hits.masked(np.arange(hits.rows.shape[1]) >= depths[some][:, None])
            hits = judged(self.judge, asked.take(some), hits) if self.judge else hits
            selected = select(hits, Queries._make(field[some] for field in queries), self.rule)
            found.append(padded(selected.hits, self.rule.max_negatives))
            rejected.update(selected.rejected)
        back = np.argsort(order)
        return Selection(
            Hits._make(np.concatenate(fields)[back] for fields in zip(*found, strict=True)), dict(rejected)
        )

    def owned(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions (queries, most positives) of each query's positives, -1 where there is no more."""
        begins, ends = np.searchsorted(self.links[:, 0], ids), np.searchsorted(self.links[:, 0], ids, "right")
        columns = np.arange(max(1, int((ends - begins).max(initial=0))))
        links = np.minimum(begins[:, None] + columns, len(self.links) - 1)
        wanted = self.links[:, 1][links]
        positions = np.minimum(np.searchsorted(self.positive_ids, wanted), len(self.positive_ids) - 1)
        there = (columns < (ends - begins)[:, None]) & (self.positive_ids[positions] == wanted)
        return np.where(there, positions, NO_ROW)

    def described(self, block: pa.Table, vectors: npt.NDArray[np.float32], owned: npt.NDArray[np.int64]) -> Queries:
        """What the rule must know of a block of queries."""
        there = owned != NO_ROW
        langs = text_keys(block["lang"]) if "lang" in block.column_names else np.zeros(len(block), np.uint64)
        scores = inner_products(vectors, self.positives.vectors, owned).astype(np.float32)
        return Queries(
            keys=text_keys(block["text"]),
            langs=langs,
            positive_keys=np.where(there, self.positives.keys[owned], np.uint64(0)),
            positive_documents=np.where(there, self.positives.documents[owned], np.uint64(0)),
            positive_scores=np.where(there, scores, np.float32(np.inf)),
        )

    def filled(
        self, chosen: Hits, queries: Queries, vectors: npt.NDArray[np.float32], asked: Block
    ) -> tuple[Hits, npt.NDArray[np.bool_]]:
        """`chosen` with random passages where a query is short, and which they are.

        Few of those that are drawn may pass, so they are drawn several times; who is still short then stays so.
        """
        drawn = np.zeros(chosen.rows.shape, np.bool_)
        for number in range(MOST_DRAWS):
            short = np.flatnonzero((chosen.rows == NO_ROW).any(axis=1))
            if not len(short):
                break
            some = Queries._make(field[short] for field in queries)
            hits = self.draw(number, some, vectors[short])
            taken = (hits.keys[:, :, None] == chosen.keys[short][:, None, :]).any(axis=2)
            hits = hits.masked(taken | wrong_language(hits, some, self.rule))
            if self.judge:
                hits = judged(self.judge, asked.take(short), hits)
            everything = {"range_min": 0, "range_max": max(hits.rows.shape[1], self.rule.max_negatives)}
            rule = self.rule.model_copy(update=everything | {"sampling": "random"})
            fill = in_drawn_order(select(hits, some, rule).hits, some, rule.seed)
            for query, row in enumerate(short):
                places = np.flatnonzero(chosen.rows[row] == NO_ROW)
                new = np.flatnonzero(fill.rows[query] != NO_ROW)[: len(places)]
                for name in Hits._fields:
                    getattr(chosen, name)[row, places[: len(new)]] = getattr(fill, name)[query, new]
                drawn[row, places[: len(new)]] = True
        return chosen, drawn

    def draw(self, number: int, queries: Queries, vectors: npt.NDArray[np.float32]) -> Hits:
        """Passages drawn by the rule's seed, the same for a query whatever block it is in; other ones by `number`."""
        many = DRAWN_A_NEGATIVE * self.rule.max_negatives
        numbers = np.arange(many * number, many * (number + 1), dtype=np.uint64)
        seeded = numbers ^ mix(np.array([self.rule.seed], np.uint64))
        rows = (mix(queries.keys[:, None] ^ mix(seeded)) % np.uint64(self.plan.shards.num_rows)).astype(np.int64)
        sent = ray.put(vectors)
        return merge(ray.get([shard.at.remote(sent, rows) for shard in self.shards]), many)

    def write(
        self,
        number: int,
        block: pa.Table,
        owned: npt.NDArray[np.int64],
        queries: Queries,
        chosen: Hits,
        drawn: npt.NDArray[np.bool_],
        rejected: dict[str, int],
    ) -> dict[str, Any]:
        """Write one part file."""
        there = chosen.rows != NO_ROW
        found = there.sum(axis=1)
        kept = (owned != NO_ROW).any(axis=1) & ((found == self.rule.max_negatives) | (self.rule.short != "drop"))
        texts = texts_of(self.plan.shards, self.shards, np.unique(chosen.rows[kept][there[kept]]))
        places = np.searchsorted(texts["row"].to_numpy(), chosen.rows[kept][there[kept]])
        owned_there = owned[kept] != NO_ROW
        columns = {
            "id": block["id"].filter(kept),
            "query": block["text"].filter(kept),
            "positives": lists(self.positives.texts["text"].take(pa.array(owned[kept][owned_there])), owned_there),
            "positive_scores": lists(pa.array(queries.positive_scores[kept][owned_there]), owned_there),
            "negatives": lists(texts["text"].take(pa.array(places)), there[kept]),
            "negative_scores": lists(pa.array(chosen.scores[kept][there[kept]]), there[kept]),
            "negative_ids": lists(texts["id"].take(pa.array(places)), there[kept]),
            "is_random": lists(pa.array(drawn[kept][there[kept]]), there[kept]),
        }
        statistics = {
            "queries": int(kept.sum()),
            "short": int((found < self.rule.max_negatives).sum()),
            "dropped": int((~kept).sum()),
            "negatives": int(there[kept].sum()),
            "random": int(drawn[kept].sum()),
            "negative_score": float(chosen.scores[kept][there[kept]].sum()),
            "positive_score": float(queries.positive_scores[kept][owned_there].sum()),
            "positives": int(owned_there.sum()),
            "rejected": rejected,
        }
        schema = negatives_schema(texts.schema.field("id").type)
        table = pa.table(columns, schema).replace_schema_metadata({STATISTICS: json.dumps(statistics)})
        write_parquet(Store.at(self.plan.output) / part_name(number), table)
        return statistics


def lists(values: pa.Array | pa.ChunkedArray, there: npt.NDArray[np.bool_]) -> pa.Array:
    """`values` of all rows in one, as a list a row of as many as `there` (rows, n) says."""
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.ListArray.from_arrays(pa.array(np.append(0, there.sum(axis=1).cumsum()), pa.int32()), flat)


def read_queries(plan: MinePlan, number: int) -> pa.Table:
    """A block of queries: `id`, `text`, `vector` and, where known, `lang`."""
    return pq.read_table(Path(plan.queries) / part_name(number))


def runs(depths: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Queries that are searched for together, whose ascending depths bound what is found of them."""
    begin = 0
    while begin < len(depths):
        found = np.arange(1, len(depths) - begin + 1) * depths[begin:]
        end = begin + max(1, int(np.searchsorted(found, MOST_CANDIDATES, "right")))
        yield slice(begin, end)
        begin = end


def padded(hits: Hits, width: int) -> Hits:
    """Hits (queries, width), with nothing in the columns that are added."""
    missing = width - hits.rows.shape[1]
    wide = Hits._make(np.pad(field, ((0, 0), (0, missing))) for field in hits)
    return wide.masked(np.broadcast_to(np.arange(width) >= width - missing, wide.rows.shape))
