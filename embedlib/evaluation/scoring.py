"""One model on one task: mteb's score, what it is made of, and what is kept of both on disk."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import mteb
import numpy as np
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from pydantic import Field

from embedlib.config import Config
from embedlib.evaluation.bootstrap import Items, bitext_f1, items_of, replicates
from embedlib.evaluation.languages import language_of
from embedlib.evaluation.mteb_encoder import CachedEncoder
from embedlib.model_directory import write_json

SCORES_NAME = "scores.json"
# Raised when the same task and model would be told otherwise.
SCORING_VERSION = 3
# mteb rounds some of its scores to five digits.
SAME_SCORE = 1e-3


class Score(Config):
    """A model's score on one subset of a task."""

    model: str
    """The model's name in the report."""
    task: str
    """The task's name."""
    type: str
    """mteb's type of the task: what scores are grouped by."""
    subset: str
    """The part of the task, usually a language or a pair of them."""
    language: str
    """ISO 639-1 where the language has such a code; that of the pair that is not English."""
    split: str
    """Which rows were scored."""
    metric: str
    """mteb's name of the main score."""
    value: float
    """The main score x 100."""
    replicates: list[float] = Field(default_factory=list)
    """Main scores x 100 of resampled items; none where the task gives no items."""

    @classmethod
    def of(cls, model: str, task: AbsTask, split: str, values: Mapping[str, Any], items: Items | None) -> Self:
        """The score of a row of mteb's results."""
        subset = values["hf_subset"]
        if items and abs(items.score(np.arange(len(items.values))) - values["main_score"]) > SAME_SCORE:
            items = None  # the task's main score is another one than these items make
        # Not by subset: where these are translations of the same items, they rise and fall together.
        name = f"{task.metadata.name}/{split}"
        resampled = (100 * replicates(items, name)).round(4).tolist() if items else []
        codes = values.get("languages") or ["und-Zyyy"]
        return cls(
            model=model,
            task=task.metadata.name,
            type=task.metadata.type,
            subset=subset,
            language=language_of("-".join(code.replace("-", "_") for code in codes)),
            split=split,
            metric=task.metadata.main_score,
            value=100 * values["main_score"],
            replicates=resampled,
        )


def evaluate_task(encoder: CachedEncoder, task: AbsTask, directory: Path) -> list[Score]:
    """The scores of all subsets; those that `directory` holds, of a run that was cut off, are not computed again.

    mteb's own result lies in `directory`, too.
    """
    finished = directory / SCORES_NAME
    if finished.exists():
        return [Score.model_validate(row | {"model": encoder.name}) for row in json.loads(finished.read_text())]
    items = ItemsOnDisk(task, directory / "items")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb and scikit-learn tell their own developers things
        result = mteb.evaluate(
            encoder,  # type: ignore[arg-type] # the protocol has a constructor of its own
            task,
            cache=ResultCache(directory),
            prediction_folder=items.directory,
            show_progress_bar=False,
            encode_kwargs={"show_progress_bar": False},
        )
    scores = [
        Score.of(encoder.name, task, split, values, items.read(split, values["hf_subset"]))
        for one in result.task_results
        for split, rows in one.scores.items()
        for values in rows
    ]
    write_json(finished, [score.model_dump(exclude={"model"}) for score in scores])
    return scores


class ItemsOnDisk:
    """Takes mteb's predictions of a task in place of its JSON files, and keeps the items they come to."""

    def __init__(self, task: AbsTask, directory: Path) -> None:
        self.task, self.directory = task, directory
        directory.mkdir(parents=True, exist_ok=True)
        task._save_task_predictions = self._keep  # type: ignore[method-assign]

    def read(self, split: str, subset: str) -> Items | None:
        """The items of a subset; none where its task gives none."""
        path = self._path(split, subset)
        if not path.exists():
            return None
        with np.load(path) as kept:
            values = {name: kept[name] for name in kept.files if name != "statistic"}
            return Items(str(kept["statistic"]), **values)  # type: ignore[arg-type] # as it was written

    def _keep(self, predictions: Any, model: Any, prediction_folder: Path, hf_split: str, hf_subset: str) -> None:
        if hf_subset == "parallel":  # all pairs of languages at once; each is a subset of the result
            for pair, found in predictions.items():
                self._write(hf_split, pair, Items("mean", bitext_f1({pair: found})))
        elif items := items_of(self.task.metadata.type, predictions, self._gold(hf_split, hf_subset)):
            self._write(hf_split, hf_subset, items)

    def _write(self, split: str, subset: str, items: Items) -> None:
        values = {name: value for name, value in items._asdict().items() if value is not None}
        np.savez(self._path(split, subset), **values)

    def _gold(self, split: str, subset: str) -> Mapping[str, Any]:
        data: Any = self.task.dataset
        data = data[subset][split] if subset in data else data[split]
        if self.task.metadata.type in ("Retrieval", "Reranking"):
            relevant: Mapping[str, Any] = data["relevant_docs"]
            return relevant
        column = {"Classification": "label_column_name", "PairClassification": "label_column_name"}
        ours = {"Classification": "label", "PairClassification": "labels"}
        kind = self.task.metadata.type
        if kind in column:
            return {ours[kind]: data[getattr(self.task, column[kind])]}
        return {"score": data["score"]} if kind == "STS" else {}

    def _path(self, split: str, subset: str) -> Path:
        return self.directory / f"{split}.{subset}.npz"
