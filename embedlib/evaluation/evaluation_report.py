"""What an evaluation found: one tree of numbers, told as JSON, Markdown, a page that stands alone and a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, computed_field
from rich.console import Console
from rich.table import Table

from embedlib.evaluation.comparison import describe_machine
from embedlib.evaluation.drift import Drift, Fertility
from embedlib.evaluation.footprint import Footprint
from embedlib.evaluation.official import OfficialRow, published_means
from embedlib.evaluation.report import ABSENT, Section, render_page
from embedlib.evaluation.scorecard import Cell, Failure, GateResult, Scorecard
from embedlib.evaluation.scoring import Score
from embedlib.metrics import Vectors

PLOTTED_TEXTS = 800
REPORT_NAME = "report.json"


class Evaluation(Section):
    """Several models on several tasks, on texts without labels, and on this machine."""

    fingerprint: str
    """What the scores belong to: the models and the tasks."""
    scorecard: Scorecard
    """Scores by group, language and task."""
    scores: list[Score]
    """Every score by subset; written without its replicates."""
    failures: list[Failure]
    """Tasks without a score."""
    official: list[OfficialRow]
    """Published scores beside ours."""
    drift: dict[str, Drift]
    """Each model against the baseline."""
    fertility: dict[str, Fertility]
    """Tokens a word by model."""
    footprints: dict[str, Footprint]
    """Size and speed by model; empty where not measured."""
    gates: list[GateResult]
    """What became of the requirements."""
    verdicts: dict[str, str]
    """By model: may it be shipped in the baseline's stead?"""
    dtype: Literal["float32", "fast"]
    """What vectors were computed in for the scores."""
    machine: dict[str, Any] = Field(default_factory=describe_machine)
    """Where speed was measured."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def retention(self) -> dict[str, dict[str, float]]:
        """By model, the share of the baseline's score that it keeps in each group."""
        found: dict[str, dict[str, float]] = {}
        for row in self.scorecard.groups:
            for model, cell in row.cells.items():
                if cell.retention is not None:
                    found.setdefault(model, {})[row.name] = round(cell.retention, 4)
        return found


def write_evaluation(evaluation: Evaluation, plots: Mapping[str, str], directory: Path) -> None:
    """report.json, report.md and report.html in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    values = evaluation.model_dump(mode="json", exclude={"scores": {"__all__": {"replicates"}}})
    told: dict[str, Any] = {"evaluation": evaluation, "card": evaluation.scorecard, "absent": ABSENT}
    told |= {"cell": cell_text, "difference": difference_text}
    directory.joinpath("report.html").write_text(render_page("evaluation.html.jinja", plots, **told), encoding="utf-8")
    directory.joinpath("report.md").write_text(render_page("evaluation.md.jinja", {}, **told), encoding="utf-8")
    # The last: where it is, nothing is missing.
    directory.joinpath(REPORT_NAME).write_text(to_json(values), encoding="utf-8")


def read_evaluation(directory: Path) -> Evaluation | None:
    """The evaluation in `directory`; None where there is none, or one of another form."""
    try:
        return Evaluation.model_validate_json((directory / REPORT_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def to_json(values: Any) -> str:
    """Indented JSON; what is not finite, as it is in no JSON, is null."""
    return json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n"


def finite(values: Any) -> Any:
    """The same with None for every float that is not finite."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not np.isfinite(values) else values


def cell_text(cell: Cell | None) -> str:
    """`83.6 [82.9, 84.4]`, a star after a difference to the baseline that chance does not explain."""
    if cell is None:
        return ABSENT
    span = f" [{cell.low:.1f}, {cell.high:.1f}]" if cell.low is not None and cell.high is not None else ""
    return f"{cell.value:.1f}{span}{'*' if cell.p is not None and cell.p < 0.05 else ''}"


def difference_text(cell: Cell | None) -> str:
    """`-1.2 [-1.9, -0.4], p 0.004`: the paired difference to the baseline."""
    if cell is None or cell.difference is None:
        return ABSENT
    if cell.difference_low is None or cell.difference_high is None or cell.p is None:
        return f"{cell.difference:+.1f}"
    return f"{cell.difference:+.1f} [{cell.difference_low:+.1f}, {cell.difference_high:+.1f}], p {cell.p:.3f}"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The scorecard by group, what it costs to run each model, gates, failures and verdicts."""
    card = evaluation.scorecard
    table = Table(title="Scores x 100, 95 % intervals; * differs from the baseline")
    table.add_column("")
    table.add_column("tasks", justify="right")
    for model in card.models:
        table.add_column(model, justify="right")
    for row in card.groups:
        cells = [cell_text(row.cells.get(model)) for model in card.models]
        table.add_row(row.name, str(row.tasks), *cells)
    for name, unit, value in (
        ("texts/s", ",.0f", "texts_per_s"),
        ("one text, ms", ".1f", "latency_ms"),
        ("MB", ",.1f", "megabytes"),
    ):
        if evaluation.footprints:
            table.add_row(
                name,
                "",
                *(
                    format(getattr(evaluation.footprints[model], value), unit)
                    if model in evaluation.footprints
                    else ABSENT
                    for model in card.models
                ),
            )
    console.print(table)
    for failure in evaluation.failures:
        console.print(f"no score: {failure.model} on {failure.task}: {failure.reason}", markup=False, style="red")
    for gate in evaluation.gates:
        console.print(gate.sentence, markup=False, style="green" if gate.passed else "red", soft_wrap=True)
    for sentence in evaluation.verdicts.values():
        console.print(sentence, markup=False, highlight=False)


def draw_evaluation(
    evaluation: Evaluation, vectors: Mapping[str, Vectors], langs: Sequence[str], groups: Sequence[int]
) -> dict[str, str]:
    """The report's plots as SVG by caption; needs the `demo` extra."""
    from embedlib.evaluation.plots import interval_bars, pareto, project, scatter

    card = evaluation.scorecard
    plots = {"Mean score of each group, with 95 % intervals.": interval_bars(card)}
    if evaluation.footprints:
        speeds = {name: footprint.texts_per_s for name, footprint in evaluation.footprints.items()}
        ours, others = published_means(evaluation.official)
        means = ours or {name: cell.value for name, cell in card.groups[-1].cells.items()}
        over = " Mean over the tasks with published scores, which are lines." if others else ""
        caption = f"Quality against speed on this machine; nearer to the upper right is better.{over}"
        plots[caption] = pareto(means, speeds, others)
    places = plotted_places(groups)
    if len(places) >= 3:
        for name, rows in vectors.items():
            points = project(rows[places])
            shown = [langs[place] for place in places]
            plots[f"Texts by language, {name}."] = scatter(points, shown, f"{name}, coloured by language", legend=True)
            if (marks := [groups[place] for place in places])[0] >= 0:
                plots[f"Translations share colour and marker, {name}."] = scatter(
                    points, marks, f"{name}, coloured by sentence", legend=False
                )
    return plots


def plotted_places(groups: Sequence[int]) -> list[int]:
    """The texts that are drawn: of the largest groups of translations as many as fit, or the first without any."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if group >= 0:
            members.setdefault(group, []).append(place)
    whole = sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)
    chosen = [place for group in whole for place in group][:PLOTTED_TEXTS]
    return chosen or list(range(len(groups)))[:PLOTTED_TEXTS]
