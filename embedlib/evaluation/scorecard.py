"""Scores of several models side by side: by group, language and task, against a baseline, with gates and a verdict."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import NamedTuple

import numpy as np
from pydantic import Field

from embedlib.config import Config
from embedlib.errors import ConfigError
from embedlib.evaluation.bootstrap import REPLICATES, Values, interval, p_value
from embedlib.evaluation.scoring import Score

# mteb's names of types, as the field says them in a sentence and in a gate.
GROUPS = {
    "STS": "sts",
    "BitextMining": "bitext",
    "Retrieval": "retrieval",
    "Reranking": "reranking",
    "Classification": "classification",
    "Clustering": "clustering",
    "PairClassification": "pair_classification",
}
MEAN = "mean"
SAFE, LOST = 0.95, 0.9
NAMED = 5
# Standard errors of a difference that is seen at the 5 % level with a power of 80 %.
DETECTABLE = 1.96 + 0.84
# A sign stands apart, since names of models may have one.
GATE = re.compile(r"\s*([\w./:-]+)\s*(>=|>)\s*([\d.]+)\s*(?:\*\s*([\w.-]+)(?:\s+([+-])\s*([\d.]+))?)?\s*")


class Failure(Config):
    """A task that a model has no score on, or something else that could not be told of it."""

    model: str
    """The model's name in the report."""
    task: str
    """The task's name."""
    reason: str
    """What went wrong."""


class Cell(Config):
    """What one model reaches in one row of the scorecard."""

    value: float
    """Mean score x 100."""
    low: float | None = None
    """Lower end of the 95 % interval over resampled items; none where no task gives any."""
    high: float | None = None
    """Upper end."""
    retention: float | None = None
    """Share of the baseline's value; none for the baseline itself, and where the baseline has no positive value."""
    difference: float | None = None
    """Value less the baseline's."""
    difference_low: float | None = None
    """Lower end of the paired difference's interval."""
    difference_high: float | None = None
    """Upper end."""
    p: float | None = None
    """Two-sided p-value of the paired difference, by the bootstrap."""
    detectable: float | None = None
    """The smallest true difference that so many items show four times out of five, at the 5 % level."""


class Row(Config):
    """One line of the scorecard: a group, a language or a task, and what each model reaches."""

    name: str
    """What was put together."""
    tasks: int
    """Over how many tasks the mean goes."""
    cells: dict[str, Cell]
    """By model; a model that has no score on one of the row's tasks is left out."""


class Scorecard(Config):
    """All scores, put together in the ways they are read."""

    baseline: str
    """The model the others are compared with."""
    models: list[str]
    """Their names in the order given."""
    groups: list[Row]
    """By type of task, then their mean."""
    languages: list[Row]
    """By language, over all tasks that have it."""
    tasks: list[Row]
    """By task, over its subsets."""

    def row(self, name: str) -> Row | None:
        """The row that a gate means: a group, a task, or `lang:` and a language."""
        rows = {f"lang:{row.name}": row for row in self.languages}
        rows |= {row.name.lower(): row for row in (*self.tasks, *self.groups)}
        return rows.get(name.lower())


class Gate(NamedTuple):
    """What is required of a row: `number`, or `number` times what `model` reaches there, and `points` more."""

    row: str
    operator: str
    number: float
    model: str | None
    points: float


class GateResult(Config):
    """What became of one requirement for one model."""

    require: str
    """The requirement as it was given."""
    model: str
    """The model it was asked of."""
    found: float | None
    """What the model reaches; none where it has no such score."""
    wanted: float
    """What it had to reach."""
    passed: bool
    """Whether it does, and no task of the row lacks a score."""
    lacking: list[str] = Field(default_factory=list)
    """Tasks of the row that this model, or the one it is measured by, has no score on."""

    @property
    def sentence(self) -> str:
        """The requirement and what was found."""
        found = "no score" if self.found is None else f"{self.found:.2f}"
        wanted = f"wanted {self.wanted:.2f}" if isfinite(self.wanted) else "nothing to measure it by"
        lacking = f"; no score on {', '.join(self.lacking)}" if self.lacking else ""
        return f"{self.require}: {'met' if self.passed else 'NOT MET'} by {self.model}: {found}; {wanted}{lacking}"


def make_scorecard(scores: Sequence[Score], models: Sequence[str], baseline: str) -> Scorecard:
    """Put scores together: subsets to tasks, tasks to groups, each a mean of means."""
    groups = {GROUPS.get(score.type, score.type.lower()) for score in scores}
    order = [name for name in GROUPS.values() if name in groups] + sorted(groups - set(GROUPS.values()))
    by_group = {
        group: [score for score in scores if GROUPS.get(score.type, score.type.lower()) == group] for group in order
    }
    by_language = grouped(scores, lambda score: score.language)
    by_task = grouped(scores, lambda score: score.task)
    rows = [make_row(name, each, models, baseline) for name, each in by_group.items()]
    return Scorecard(
        baseline=baseline,
        models=list(models),
        groups=[*rows, make_row(MEAN, scores, models, baseline, by_group)],
        languages=[make_row(name, by_language[name], models, baseline) for name in sorted(by_language)],
        tasks=[make_row(name, each, models, baseline) for name, each in by_task.items()],
    )


def grouped(scores: Iterable[Score], key: Callable[[Score], str]) -> dict[str, list[Score]]:
    """Scores by what `key` says of them, in the order they come."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(key(score), []).append(score)
    return found


def make_row(
    name: str,
    scores: Sequence[Score],
    models: Sequence[str],
    baseline: str,
    groups: Mapping[str, Sequence[Score]] | None = None,
) -> Row:
    """A row over the scores of all models; with `groups` the mean over these instead of over tasks."""
    tasks = {score.task for score in scores}
    of_model = grouped(scores, lambda score: score.model)
    parts = list(groups.values()) if groups else None
    means = {model: mean for model in models if (mean := mean_of(of_model.get(model, []), tasks, parts))}
    base = means.get(baseline)
    return Row(
        name=name,
        tasks=len(tasks),
        cells={model: make_cell(mean, None if model == baseline else base) for model, mean in means.items()},
    )


class Mean(NamedTuple):
    """A mean over scores, and the same mean of each round of resampling."""

    value: float
    replicates: Values | None


def mean_of(scores: Sequence[Score], tasks: set[str], groups: Sequence[Sequence[Score]] | None = None) -> Mean | None:
    """Mean over tasks of their mean over subsets; none where one of `tasks` has no score."""
    if {score.task for score in scores} != tasks or not scores:
        return None
    if groups is None:
        return averaged([averaged(list(map(single, each))) for each in grouped(scores, lambda one: one.task).values()])
    model = scores[0].model
    parts = [[score for score in group if score.model == model] for group in groups]
    return averaged([mean for part in parts if (mean := mean_of(part, {score.task for score in part}))])


def single(score: Score) -> Mean:
    """One score as a mean."""
    return Mean(score.value, np.array(score.replicates) if score.replicates else None)


def averaged(means: Sequence[Mean]) -> Mean:
    """The mean of means, round by round; what was not resampled, such as clustering, counts in each as it is."""
    value = fmean(mean.value for mean in means)
    if all(mean.replicates is None for mean in means):
        return Mean(value, None)
    rounds = [np.full(REPLICATES, mean.value) if mean.replicates is None else mean.replicates for mean in means]
    return Mean(value, np.mean(rounds, axis=0))


def make_cell(mean: Mean, base: Mean | None) -> Cell:
    """A mean with its interval, and with its difference to the baseline's where there is one."""
    values = {"value": mean.value}
    if mean.replicates is not None:
        values |= interval(mean.replicates)._asdict()
    if base is not None:
        values["difference"] = mean.value - base.value
        if base.value > 0:
            values["retention"] = mean.value / base.value
        if mean.replicates is not None and base.replicates is not None:
            differences = mean.replicates - base.replicates
            low, high = interval(differences)
            values |= {"difference_low": low, "difference_high": high, "p": p_value(differences)}
            values["detectable"] = DETECTABLE * float(np.std(differences))
    return Cell(**values)


def check_gates(
    requirements: Sequence[str], card: Scorecard, models: Iterable[str], lacking: Iterable[tuple[str, str, str]] = ()
) -> list[GateResult]:
    """What `sts>=0.95*teacher` and the like come to for each of `models`; ConfigError where one means nothing.

    `lacking` are the tasks without a score: model, task and group.
    """
    return [result for text in requirements for result in check_gate(text, card, models, lacking)]


def check_requirements(requirements: Sequence[str], rows: Iterable[str], models: Iterable[str]) -> None:
    """ConfigError for a requirement that names none of the `rows` or `models` there will be; languages aside."""
    known = sorted({*(row.lower() for row in rows), MEAN})
    for text in requirements:
        gate = parse_gate(text)
        name, measure = gate.row, gate.model
        if not name.startswith("lang:") and name.lower() not in known:
            raise ConfigError(f"require: {text!r}: no row {name!r}; expected of {known}, or lang: and a language")
        if measure and measure not in models:
            raise ConfigError(f"require: {text!r}: no model {measure!r}; expected of {sorted(models)}")


def check_gate(
    text: str, card: Scorecard, models: Iterable[str], lacking: Iterable[tuple[str, str, str]]
) -> list[GateResult]:
    """What one requirement comes to for each of `models`, but the one it names as its measure.

    A row that lost a task is the mean of easier ones, or harder ones, so it meets nothing; nor does a row that is not
    there. ConfigError where no model is left: a gate that asks nobody would be passed by anything.
    """
    name, operator, number, measure, points = parse_gate(text)
    row = card.row(name)
    cells = row.cells if row else {}
    if measure and measure not in card.models:
        raise ConfigError(f"require: {text!r}: no model {measure!r}; expected of {card.models}")
    asked = [model for model in models if model != measure]
    if not asked:
        raise ConfigError(f"require: {text!r}: no model to ask it of; expected one besides the baseline")
    wanted = number
    if measure:
        cell = cells.get(measure)
        wanted = number * cell.value + points if cell else float("inf")
    results = []
    for model in asked:
        found = cells[model].value if model in cells else None
        missing = sorted(
            {task for who, task, group in lacking if who in (model, measure) and of_row(name, task, group)}
        )
        reached = found is not None and (found > wanted if operator == ">" else found >= wanted)
        results.append(
            GateResult(
                require=text,
                model=model,
                found=found,
                wanted=wanted,
                passed=reached and not missing,
                lacking=missing,
            )
        )
    return results


def of_row(name: str, task: str, group: str) -> bool:
    """Whether a task may count in a row; any may have a language, and all are in the mean."""
    return name.startswith("lang:") or name.lower() in (MEAN, task.lower(), group.lower())


def parse_gate(text: str) -> Gate:
    """A requirement as it is written; ConfigError where it has not this form."""
    parts = GATE.fullmatch(text)
    if parts is None:
        raise ConfigError(
            f"require: {text!r}; expected ROW>=NUMBER, ROW>=NUMBER*MODEL or ROW>=NUMBER*MODEL - POINTS, as in "
            "'sts>=0.95*teacher' and 'bitext>=1*teacher - 0.5'"
        )
    name, operator, number, measure, sign, points = parts.groups()
    difference = _number(text, points or "0")
    return Gate(name, operator, _number(text, number), measure, -difference if sign == "-" else difference)


def _number(requirement: str, digits: str) -> float:
    try:
        return float(digits)
    except ValueError as error:
        raise ConfigError(f"require: {requirement!r}: {digits!r} is no number") from error


def verdict(card: Scorecard, model: str, speed_ratio: float | None, size_ratio: float | None) -> str:
    """May it be shipped in the baseline's stead, and where not: a few sentences out of the scorecard."""
    mean = card.groups[-1].cells.get(model)
    gains = [
        f"{speed_ratio:.1f} times as fast" if speed_ratio else "",
        f"{size_ratio:.1f} times smaller" if size_ratio else "",
    ]
    gain = " and ".join(filter(None, gains))
    if mean is None or mean.retention is None:
        return f"{model} lacks scores that {card.baseline} has, so there is no verdict on it."
    kept = f"{model} keeps {100 * mean.retention:.1f} % of {card.baseline}'s mean score"
    safe = [row.name for row in card.groups[:-1] if retains(row, model, card.baseline, SAFE)]
    unsure = [row.name for row in card.groups[:-1] if keeps(row, model, SAFE) and row.name not in safe]
    lost, langs = losses(card.groups[:-1], model), losses(card.languages, model)
    sentences = [f"{kept} and is {gain}." if gain else f"{kept}."]
    sentences += (
        [f"Safe to ship where the work is {listed(safe)}: it keeps {100 * SAFE:.0f} % or more there."] if safe else []
    )
    sentences += (
        [f"It keeps as much in {listed(unsure)}, but so few items, or none, show it that chance may have done it."]
        if unsure
        else []
    )
    sentences += [f"Not safe for {listed(lost)}."] if lost else []
    if langs:
        many = f"{len(langs)} of {len(card.languages)}, most of all " if len(langs) > NAMED else ""
        sentences.append(f"Weak languages: {many}{listed(langs[:NAMED])}.")
    if not safe and not unsure:
        sentences.append(
            f"It keeps {100 * SAFE:.0f} % in no group: train it longer, or measure it on your own documents first."
        )
    return " ".join(sentences)


def keeps(row: Row, model: str, share: float) -> bool:
    """Whether the model keeps that share of the baseline's value in a row."""
    cell = row.cells.get(model)
    return cell is not None and cell.retention is not None and cell.retention >= share


def retains(row: Row, model: str, baseline: str, share: float) -> bool:
    """Whether it does, and the paired difference's whole interval says so as well."""
    if not keeps(row, model, share):
        return False
    low = row.cells[model].difference_low
    return low is not None and low >= (share - 1) * row.cells[baseline].value


def losses(rows: Sequence[Row], model: str) -> list[str]:
    """The rows in which the model keeps too little of the baseline's value, the worst first, with how much that is."""
    kept = [(row.cells[model].retention, row.name) for row in rows if model in row.cells]
    lost = sorted((share, name) for share, name in kept if share is not None and share < LOST)
    return [f"{name} ({100 * share:.0f} %)" for share, name in lost]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
