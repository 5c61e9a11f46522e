"""Scores that others published, beside one's own on the same tasks and subsets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from embedlib.config import Config
from embedlib.errors import DataError
from embedlib.evaluation.scoring import Score

COLUMNS = ("model", "task", "split", "subset", "main_score")
Published = Mapping[tuple[str, str, str], Mapping[str, float]]


class OfficialRow(Config):
    """A task as others scored it: mean x 100 over the subsets that all of the row's models have."""

    task: str
    """The task's name."""
    subsets: list[str]
    """Which subsets the means are over."""
    ours: dict[str, float]
    """By model, measured here."""
    official: dict[str, float]
    """By model, as published."""


def read_published(path: Path) -> Published:
    """Published scores by task, split and subset, then by model; Parquet with the columns COLUMNS."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"reference: {path} is no readable Parquet file: {error}") from error
    for column in COLUMNS:
        if column not in table.column_names:
            raise DataError(f"reference: {path}: no column {column!r}; found {', '.join(table.column_names)}")
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in table.select(COLUMNS).to_pylist():
        found.setdefault((row["task"], row["split"], row["subset"]), {})[row["model"]] = 100 * row["main_score"]
    return found


def official_rows(scores: Sequence[Score], published: Published) -> list[OfficialRow]:
    """One row for each task and group of models that were scored on the same subsets of it."""
    ours: dict[tuple[str, str, str], dict[str, float]] = {}
    for score in scores:
        ours.setdefault((score.task, score.split, score.subset), {})[score.model] = score.value
    subsets: dict[str, list[tuple[str, str, str]]] = {}
    for key in ours:
        if key in published:
            subsets.setdefault(key[0], []).append(key)
    rows = []
    for task, keys in subsets.items():
        by_coverage: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for model in sorted({model for key in keys for model in published[key]}):
            by_coverage.setdefault(tuple(key for key in keys if model in published[key]), []).append(model)
        for covered, models in by_coverage.items():
            rows.append(
                OfficialRow(
                    task=task,
                    subsets=[subset for _, _, subset in covered],
                    ours=means({key: ours[key] for key in covered}),
                    official={model: fmean(published[key][model] for key in covered) for model in models},
                )
            )
    return rows


def published_means(rows: Sequence[OfficialRow], shown: int = 5) -> tuple[dict[str, float], dict[str, float]]:
    """Our models' and others' means over the tasks that both have, subsets and all; a few of the others, best to worst.

    Only models with a score in the fullest row of every task are compared, so that all means go over the same.
    """
    fullest: dict[str, OfficialRow] = {}
    for row in rows:
        if row.task not in fullest or len(row.subsets) > len(fullest[row.task].subsets):
            fullest[row.task] = row
    if not fullest:
        return {}, {}
    ours, others = (
        {model: fmean(each[model] for each in sides) for model in set.intersection(*(set(each) for each in sides))}
        for sides in ([row.ours for row in fullest.values()], [row.official for row in fullest.values()])
    )
    ranked = sorted(others, key=lambda model: others[model], reverse=True)
    step = max(1, -(-len(ranked) // shown))
    return ours, {model: others[model] for model in ranked[::step]}


def means(scores: Mapping[tuple[str, str, str], Mapping[str, float]]) -> dict[str, float]:
    """Mean by model of those that have all the scores."""
    models = set.intersection(*(set(each) for each in scores.values()))
    return {model: fmean(each[model] for each in scores.values()) for model in sorted(models)}
