"""Plots as SVG text to stand inside a page: text stays text, and ink takes the page's own colour, light or dark."""

import html
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedlib.errors import DataError
from embedlib.evaluation.report import Bitext, Training
from embedlib.evaluation.scorecard import Scorecard
from embedlib.metrics import Vectors

MAX_POINTS = 1500
# Stands for the page's text colour while Matplotlib draws; no other colour here equals it.
INK = "#010203"
TEACHER, BEFORE, AFTER = "#7b8794", "#e8a33d", "#2f6fde"
# Neighbours in the list differ in hue and lightness; with three marker shapes a label also reads without colour.
PALETTE = [
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#d936c9", "#8fae10", "#9a6324", "#e08fa0"),
    *("#14746f", "#8f7be0", "#a83232", "#5fb892", "#7d7d00", "#d9a066", "#3f51b5", "#8a8f98", "#e3b505", "#5b8def"),
]
MARKERS = "osD"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def project(vectors: Vectors, seed: int = 0) -> npt.NDArray[np.float32]:
    """UMAP of `(points, embedding_dim)` by cosine to `(points, 2)`; the same seed gives the same picture.

    Raises DataError below 3 points, and beyond MAX_POINTS, where a picture of this size shows only a blot.
    """
    if not 3 <= len(vectors) <= MAX_POINTS:
        raise DataError(f"UMAP of {len(vectors)} points; expected 3 to {MAX_POINTS}: draw fewer sentences")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        from umap import UMAP  # compiles for some fifteen seconds, so only where a picture is wanted
    neighbours = min(15, len(vectors) - 1)
    # One thread because a seed makes UMAP serial anyway; the principal components are a start that cannot fail.
    # A wide min_dist keeps translations that coincide visible beside each other.
    umap = UMAP(n_neighbors=neighbours, min_dist=0.5, metric="cosine", init="pca", random_state=seed, n_jobs=1)
    return np.asarray(umap.fit_transform(vectors), np.float32)


def scatter(points: npt.NDArray[np.floating], labels: Sequence[str | int], title: str, *, legend: bool) -> str:
    """SVG of `(points, 2)`; points with the same label share colour and marker."""
    distinct = sorted(set(labels))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 5.5 if legend else 5))
        axes = figure.add_subplot(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        members = np.asarray(labels)
        for label, colour, marker in zip(distinct, cycle(PALETTE), cycle(MARKERS), strict=False):
            x, y = points[members == label].T
            axes.scatter(x, y, s=11, c=colour, marker=marker, linewidths=0, alpha=0.85, label=str(label))
        if legend:
            figure.legend(loc="outside lower center", ncols=9, handletextpad=0, columnspacing=0.8, markerscale=1.6)
        return _svg(figure, title)


def training_curves(training: Training) -> str:
    """SVG of the training loss and, below it, the validation cosine, both by step."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 5.5))
        above, below = figure.subplots(2, sharex=True)
        _curve(above, training.steps, training.loss, TEACHER, "Training loss")
        _curve(below, training.validation_steps, training.validation_cosine, AFTER, "Validation cosine to the teacher")
        below.set_xlabel("step")
        return _svg(figure, "Training loss and validation cosine by step")


def _curve(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, title: str) -> None:
    axes.plot(steps, values, color=colour, linewidth=1.4, marker="o" if len(steps) < 40 else "", markersize=3)
    axes.set_title(title, loc="left")
    axes.grid(axis="y")


def bitext_bars(bitext: Bitext) -> str:
    """SVG of each language's bitext accuracy: teacher, student before and student after distillation."""
    languages = sorted(bitext.teacher)
    position = np.arange(len(languages))
    series = (
        ("teacher", bitext.teacher, TEACHER),
        ("student before", bitext.student_initial, BEFORE),
        ("student after", bitext.student, AFTER),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 1.1 + 0.26 * len(languages)))
        axes = figure.add_subplot(xlim=(0, 100), xlabel="right translations found, %")
        for offset, (label, accuracy, colour) in zip((-0.27, 0, 0.27), series, strict=True):
            values = [100 * accuracy[lang] for lang in languages]
            axes.barh(position + offset, values, height=0.25, color=colour, label=label)
        _name_bars(axes, languages)
        return _svg(figure, "Bitext accuracy by language")


def _colours(models: Iterable[str]) -> dict[str, str]:
    """Each model's colour, the same in every plot of a report."""
    return dict(zip(models, cycle((TEACHER, AFTER, BEFORE, *PALETTE)), strict=False))


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    """A name at each group of horizontal bars, the first on top, and the legend above them."""
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1)


def interval_bars(card: Scorecard) -> str:
    """SVG of every group's mean score by model, with its 95 % interval where there is one."""
    position = np.arange(len(card.groups))
    height = 0.8 / len(card.models)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 1.1 + 0.3 * len(card.groups) * max(1, len(card.models) / 2)))
        axes = figure.add_subplot(xlabel="score x 100")
        for number, (model, colour) in enumerate(_colours(card.models).items()):
            cells = [row.cells.get(model) for row in card.groups]
            values = [cell.value if cell else np.nan for cell in cells]
            spans = [
                (cell.value - cell.low, cell.high - cell.value)
                if cell and cell.low is not None and cell.high is not None
                else (0, 0)
                for cell in cells
            ]
            offset = (number - (len(card.models) - 1) / 2) * height
            axes.barh(
                position + offset,
                values,
                height=0.9 * height,
                color=colour,
                label=model,
                xerr=np.clip(np.array(spans).T, 0, None),
                error_kw={"ecolor": INK, "elinewidth": 0.8},
            )
        _name_bars(axes, [row.name for row in card.groups])
        return _svg(figure, "Mean score by group and model")


def pareto(quality: Mapping[str, float], speed: Mapping[str, float], published: Mapping[str, float]) -> str:
    """SVG of models by speed, logarithmic, and quality; those that no other beats in both are joined by a line.

    Models of `published` quality, whose speed here nobody knows, are lines across.
    """
    names = [name for name in speed if name in quality]
    colours = _colours(speed)
    best = [
        name for name in names if all(quality[name] >= quality[other] for other in names if speed[other] >= speed[name])
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 4))
        axes = figure.add_subplot(xlabel="texts a second", ylabel="mean score x 100", xscale="log")
        best.sort(key=lambda name: speed[name])
        axes.plot([speed[name] for name in best], [quality[name] for name in best], color=TEACHER, linewidth=1)
        for name, value in published.items():
            axes.axhline(value, color=INK, linewidth=0.6, linestyle=":")
            axes.annotate(
                f"{name}, published",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 2),
                textcoords="offset points",
                ha="right",
                fontsize=6,
            )
        for name in names:
            axes.scatter([speed[name]], [quality[name]], s=36, c=colours[name], linewidths=0, zorder=3)
            axes.annotate(name, (speed[name], quality[name]), xytext=(4, 5), textcoords="offset points")
        axes.margins(0.2)
        axes.grid()
        return _svg(figure, "Quality against speed")


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    # The salt makes identifiers the same on every run and unlike those of the page's other plots.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace(INK, "currentColor")
    return re.sub(r' width="[^"]*" height="[^"]*"|$', "", svg, count=1).replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1
    )
