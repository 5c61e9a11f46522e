"""How closely a student follows its teacher, and how well vectors find their translations: arrays in, numbers out.

Vectors are `(texts, embedding_dim)` of any floating type and need not be normalised: every measure here is of cosines.
All functions raise DataError where shapes differ, a value is not finite, a vector is zero, or a measure is undefined.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from embedlib.errors import DataError

Vectors: TypeAlias = npt.NDArray[np.floating[Any]]
BLOCK_ROWS = 2048


def mean_cosine(a: Vectors, b: Vectors) -> float:
    """Mean cosine between row i of `a` and row i of `b`, in [-1, 1]."""
    return float(row_cosines(a, b).mean())


def row_cosines(a: Vectors, b: Vectors) -> Vectors:
    """Cosine between row i of `a` and row i of `b`, (texts,), each in [-1, 1]."""
    a, b = _unit_pair(a, b)
    return np.asarray(np.sum(a * b, axis=1), np.float64)


def top_k_overlap(a: Vectors, b: Vectors, k: int) -> float:
    """Mean share, in [0, 1], of a text's `k` nearest other texts in `a` that are among its `k` nearest in `b`."""
    return float(k_nearest_shared(a, b, k).mean())


def k_nearest_shared(a: Vectors, b: Vectors, k: int) -> npt.NDArray[np.float64]:
    """The same by text, (texts,)."""
    _require_equal(len(a), len(b), "first vectors' rows", "second vectors' rows")
    if len(a) <= k:
        raise DataError(f"top-{k} overlap of {len(a)} texts: undefined; expected more than {k}")
    near_a, near_b = (_k_nearest(_unit_rows(vectors, "vectors"), k) for vectors in (a, b))
    return np.array([len(np.intersect1d(x, y)) / k for x, y in zip(near_a, near_b, strict=True)])


def similarity_spearman(student: Vectors, teacher: Vectors, max_texts: int = 2000, seed: int = 0) -> float:
    """Spearman correlation, in [-1, 1], of the two models' cosines over all pairs i < j of texts.

    The models may differ in embedding_dim. Of more than `max_texts` texts, `max_texts` are drawn with `seed`.
    """
    _require_equal(len(student), len(teacher), "student rows", "teacher rows")
    if len(student) > max_texts:
        drawn = np.random.default_rng(seed).choice(len(student), max_texts, replace=False)
        student, teacher = student[drawn], teacher[drawn]
    pairs = np.triu_indices(len(student), k=1)
    student, teacher = _unit_rows(student, "student"), _unit_rows(teacher, "teacher")
    return spearman((student @ student.T)[pairs], (teacher @ teacher.T)[pairs])


def bitext_accuracy(source: Vectors, target: Vectors) -> float:
    """Share of rows, in [0, 1], whose nearest row on the other side is their own translation, averaged over both ways.

    Row i of `source` translates row i of `target`. Of equally near rows the first counts as nearest, so a model that
    gives every text the same vector scores 1 / texts.
    """
    source, target = _unit_pair(source, target)
    expected = np.arange(len(source))
    hits = [np.mean(_nearest(a, b) == expected) for a, b in ((source, target), (target, source))]
    return float(np.mean(hits))


def sts_spearman(a: Vectors, b: Vectors, gold: npt.ArrayLike) -> float:
    """Spearman correlation, in [-1, 1], of the cosine of row i of `a` and `b` with the human score `gold[i]`."""
    cosines, scores = row_cosines(a, b), np.asarray(gold, np.float64)
    _require_equal(scores.shape, cosines.shape, "gold scores", "pairs")
    if not np.isfinite(scores).all():
        raise DataError(f"gold scores: row {int(np.argmin(np.isfinite(scores)))} is not finite")
    return spearman(cosines, scores)


def _k_nearest(vectors: Vectors, k: int) -> npt.NDArray[np.intp]:
    nearest = []
    for start in range(0, len(vectors), BLOCK_ROWS):
        similarities = vectors[start : start + BLOCK_ROWS] @ vectors.T
        rows = np.arange(len(similarities))
        similarities[rows, start + rows] = -np.inf
        nearest.append(np.argpartition(-similarities, k, axis=1)[:, :k])
    return np.concatenate(nearest)


def _nearest(queries: Vectors, candidates: Vectors) -> npt.NDArray[np.intp]:
    blocks = range(0, len(queries), BLOCK_ROWS)
    return np.concatenate([(queries[row : row + BLOCK_ROWS] @ candidates.T).argmax(axis=1) for row in blocks])


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Spearman correlation, in [-1, 1], of two series of values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise DataError(f"Spearman correlation of {len(a)} values: undefined; expected at least two that differ")
    from scipy.stats import spearmanr  # two seconds of every replica's start

    return float(spearmanr(a, b).statistic)


def _unit_pair(a: Vectors, b: Vectors) -> tuple[Vectors, Vectors]:
    _require_equal(np.shape(a), np.shape(b), "first vectors", "second vectors")
    return _unit_rows(a, "first vectors"), _unit_rows(b, "second vectors")


def _unit_rows(vectors: Vectors, name: str) -> Vectors:
    if np.ndim(vectors) != 2 or not len(vectors):
        raise DataError(f"{name}: shape {np.shape(vectors)}; expected (texts, embedding_dim) with at least one text")
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not (usable := np.isfinite(norms) & (norms > 0)).all():
        row = int(np.argmin(usable))
        raise DataError(f"{name}: row {row} has norm {norms[row, 0]}; expected a finite, non-zero vector")
    return np.asarray(vectors / norms, np.float32)


def _require_equal(found: object, expected: object, name: str, other: str) -> None:
    if found != expected:
        raise DataError(f"{name}: {found}; expected {expected}, as in {other}")
