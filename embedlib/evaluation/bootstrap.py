"""What a score is made of, one entry an item, and how much it would vary with other items of the same kind."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from embedlib.artifact import fingerprint

REPLICATES = 500
Values = npt.NDArray[np.float64]


class Items(NamedTuple):
    """The parts of one score."""

    statistic: Literal["mean", "spearman", "average_precision"]
    """How a score comes of them."""
    values: Values
    """(items,): a value an item, or what the model says of a pair."""
    gold: Values | None = None
    """(items,): what is true of a pair."""
    clusters: npt.NDArray[np.int64] | None = None
    """(items,): with a mean, which items are drawn together, numbered from 0; none: each by itself."""

    def score(self, rows: npt.NDArray[np.intp]) -> float:
        """The score of these items, some of them several times."""
        if self.statistic == "mean":
            return float(self.values[rows].mean())
        assert self.gold is not None  # noqa: S101 (narrows the type)
        if self.statistic == "spearman":
            return spearman(self.values[rows], self.gold[rows])
        return average_precision(self.values[rows], self.gold[rows])


class Interval(NamedTuple):
    """Where 95 of 100 resampled scores lie."""

    low: float
    high: float


def replicates(items: Items, name: str, number: int = REPLICATES) -> Values:
    """Scores (number,) of as many items, or clusters of them, drawn with replacement.

    The draws depend on `name` and the number of items alone, so those of two models on one set are paired.
    """
    seed = int(fingerprint(name=name)[:16], 16)
    drawn = len(items.values) if items.clusters is None else int(items.clusters.max()) + 1
    draws = np.random.default_rng(seed).integers(0, drawn, (number, drawn))
    if items.clusters is not None:
        sums, sizes = np.bincount(items.clusters, items.values), np.bincount(items.clusters)
        return np.asarray(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1))
    return np.array([items.score(rows) for rows in draws])


def interval(scores: Values) -> Interval:
    """The middle 95 % of the scores."""
    low, high = np.nanquantile(scores, [0.025, 0.975])
    return Interval(float(low), float(high))


def p_value(differences: Values) -> float:
    """Two-sided, in (0, 1]: how often a resampled difference lies on the other side of zero (percentile bootstrap)."""
    below, above = float(np.mean(differences <= 0)), float(np.mean(differences >= 0))
    return min(1.0, 2 * max(min(below, above), 0.5 / len(differences)))


def spearman(a: Values, b: Values) -> float:
    """Rank correlation; 0 where one side does not vary, as a few of many draws of a tiny set may not."""
    ranks = [rankdata(side) for side in (a, b)]
    a, b = (side - side.mean() for side in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def average_precision(scores: Values, gold: Values) -> float:
    """Mean precision at the places of the positives, best score first; 0 where there is none."""
    order = np.argsort(-scores, kind="stable")
    hits = gold[order] > 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else 0.0


def items_of(task_type: str, predictions: Any, gold: Mapping[str, Any]) -> Items | None:
    """The items behind what mteb says a task's predictions are; none for a type that has none.

    `gold` is the rows of an mteb data set by column, or its `relevant_docs`.
    """
    match task_type:
        case "STS":
            return Items("spearman", np.asarray(predictions["cosine_scores"], float), np.asarray(gold["score"], float))
        case "PairClassification":
            return Items(
                "average_precision", np.asarray(predictions["cosine_scores"], float), np.asarray(gold["labels"], float)
            )
        case "BitextMining":
            return Items("mean", bitext_f1(predictions))
        case "Classification":
            right = np.asarray(predictions) == np.asarray(gold["label"])  # (experiments, texts)
            return Items("mean", right.mean(axis=0))
        case "Retrieval":
            found = np.array([ndcg(predictions.get(query, {}), docs) for query, docs in gold.items()])
            return Items("mean", found, clusters=same_answers(gold))
        case "Reranking":
            found = np.array([query_precision(predictions.get(query, {}), docs) for query, docs in gold.items()])
            return Items("mean", found, clusters=same_answers(gold))
    return None


def same_answers(gold: Mapping[str, Mapping[str, int]]) -> npt.NDArray[np.int64]:
    """(queries,): queries with the same answers share a number; several questions on one paragraph say less than that
    many on as many."""
    numbers: dict[frozenset[str], int] = {}
    return np.array([numbers.setdefault(frozenset(answers), len(numbers)) for answers in gold.values()])


def bitext_f1(neighbours: Mapping[str, Sequence[Mapping[str, float]]]) -> Values:
    """(sentences,): what each adds to mteb's F1, which is weighted over the sentences as labels.

    A sentence that is found counts 1 where nothing else was matched with its translation, less where more was.
    """
    (found,) = neighbours.values()
    matched = np.array([int(neighbour["corpus_id"]) for neighbour in found])
    times = np.bincount(matched, minlength=len(matched))
    return np.where(matched == np.arange(len(matched)), 2 / (1 + np.maximum(times[: len(matched)], 1)), 0.0)


def ndcg(found: Mapping[str, float], relevant: Mapping[str, int], k: int = 10) -> float:
    """nDCG@k of one query, gains as they stand in `relevant`, ties by document id backwards, as trec_eval has it."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = sorted(found, key=lambda document: (found[document], document), reverse=True)[:k]
    gains = np.array([relevant.get(document, 0) for document in best], float)
    ideal = np.array(sorted(relevant.values(), reverse=True)[:k], float)
    top = float(ideal @ discounts[: len(ideal)])
    return float(gains @ discounts[: len(gains)]) / top if top else 0.0


def query_precision(found: Mapping[str, float], relevant: Mapping[str, int]) -> float:
    """Average precision of one query over the documents that were ranked."""
    documents = sorted(found, key=lambda document: (found[document], document), reverse=True)
    return average_precision(
        -np.arange(len(documents), dtype=float), np.array([relevant.get(document, 0) for document in documents], float)
    )
