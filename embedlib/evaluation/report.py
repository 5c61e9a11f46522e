"""The report of a compression: one tree of numbers, told as JSON, as a page that stands alone and as a table."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, ValidationError, computed_field, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedlib.config import Config

ABSENT = "–"


class Section(Config):
    """A part of the report; computed values are written with it and, being computed, ignored when it is read back."""

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in cls.model_computed_fields} if isinstance(data, dict) else data


class Model(Section):
    """What one model is."""

    name: str
    """How the model is called in the report."""
    params: int
    """Parameters, embeddings included."""
    layers: int
    """Transformer layers."""
    vocabulary: int
    """Rows of the word embedding."""
    embedding_dim: int
    """Elements of a vector."""


class Student(Model):
    """What the student is."""

    unk_rate: float
    """Share of tokens that are `<unk>` on held-out text, 0 to 1."""


class Fidelity(Section):
    """How closely a student follows its teacher on held-out text."""

    cosine: float
    """Mean cosine between the two models' vectors of a text."""
    spearman: float
    """Spearman correlation of the two models' similarities over pairs of texts."""


class Bitext(Section):
    """Share of sentences whose nearest neighbour is their translation, 0 to 1, by language; the same in each model."""

    teacher: dict[str, float] = Field(min_length=1)
    """The teacher."""
    student_initial: dict[str, float]
    """The student before distillation."""
    student: dict[str, float]
    """The student after distillation."""

    @model_validator(mode="after")
    def _same_languages(self) -> "Bitext":
        if not self.teacher.keys() == self.student_initial.keys() == self.student.keys():
            raise ValueError("teacher, student_initial and student name different languages; expected the same in each")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean(self) -> dict[str, float]:
        """Mean over languages by model."""
        scores = {"teacher": self.teacher, "student_initial": self.student_initial, "student": self.student}
        return {model: fmean(by_language.values()) for model, by_language in scores.items()}


class Speed(Section):
    """Encoding speed of both models on the same texts and machine."""

    teacher_sentences_per_s: float
    """Texts the teacher encodes a second."""
    student_sentences_per_s: float
    """Texts the student encodes a second."""
    token_growth: float
    """Student tokens per text over teacher tokens per text: a smaller vocabulary cuts finer."""
    bound: float
    """Speed-up that the layers alone could give: teacher layers over student layers, over `token_growth`."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float:
        """Student speed over teacher speed."""
        return self.student_sentences_per_s / self.teacher_sentences_per_s


class Size(Section):
    """Size of both models."""

    teacher_params: int
    """Parameters of the teacher."""
    student_params: int
    """Parameters of the student."""
    teacher_mb: float
    """Weights of the teacher on disk, in 10^6 bytes."""
    student_mb: float
    """Weights of the student on disk, in 10^6 bytes."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float:
        """Teacher parameters over student parameters."""
        return self.teacher_params / self.student_params


class Training(Section):
    """The course of distillation."""

    steps: list[int]
    """Steps at which `loss` was noted."""
    loss: list[float]
    """Training loss."""
    validation_steps: list[int]
    """Steps at which `validation_cosine` was measured."""
    validation_cosine: list[float]
    """Mean cosine to the teacher on held-out text."""


class Report(Section):
    """What a student gained and lost against its teacher, and how it was made."""

    fingerprint: str
    """What the measurements belong to: the student's fingerprint and the sets it was scored on."""
    teacher: Model
    """The model compressed."""
    student: Student
    """What came of it."""
    fidelity: Fidelity
    """The student against its teacher."""
    fidelity_initial: Fidelity
    """The same before distillation."""
    bitext: Bitext | None
    """Translations found; none where the corpus has no translations."""
    speed: Speed
    """Texts a second."""
    size: Size
    """Parameters and bytes."""
    training: Training
    """Loss and validation by step."""
    timings: dict[str, float]
    """Seconds by stage, in the order they ran."""
    sts: dict[str, dict[str, float]] | None = None
    """Spearman correlation x 100 by model (`teacher`, `student_initial`, `student`), then by set."""
    compression: dict[str, Any] = Field(default_factory=dict)
    """What the compression chose and why: layers kept, their scores, the vocabulary."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """Where the numbers were measured: cores, cpu, torch, python, dtype."""

    @property
    def verdict(self) -> str:
        """What was gained and lost, in one sentence."""
        gain = (
            f"With {_percent(1 / self.size.ratio)} of the teacher's parameters the student runs at "
            f"{self.speed.ratio:.1f} times its speed"
        )
        if self.bitext is None:
            before, after = self.fidelity_initial.spearman, self.fidelity.spearman
            return f"{gain} and ranks pairs of texts as the teacher does to {after:.2f} (before: {before:.2f})."
        change = {lang: self.bitext.student[lang] - score for lang, score in self.bitext.teacher.items()}
        worst = min(change, key=lambda lang: change[lang])
        mean = self.bitext.mean
        loss = (
            f" and finds the right translation for {_percent(mean['student'])} of sentences, where the teacher finds "
            f"{_percent(mean['teacher'])} and the student before distillation found "
            f"{_percent(mean['student_initial'])}; its least favourable language is {worst}, at "
            f"{100 * change[worst]:+.1f} points against the teacher."
        )
        return gain + loss.replace("-", "−")

    @property
    def headline(self) -> list["HeadlineRow"]:
        """The rows that compare teacher, student before and student after distillation."""
        teacher, student = self.teacher, self.student
        before, after = self.fidelity_initial, self.fidelity
        rows = [
            HeadlineRow("Parameters", *_once(f"{teacher.params / 1e6:.1f} M", f"{student.params / 1e6:.1f} M")),
            HeadlineRow("Size on disk", *_once(f"{self.size.teacher_mb:.1f} MB", f"{self.size.student_mb:.1f} MB")),
            HeadlineRow("Layers", *_once(str(teacher.layers), str(student.layers))),
            HeadlineRow("Vocabulary", *_once(f"{teacher.vocabulary:,}", f"{student.vocabulary:,}")),
            HeadlineRow("Embedding dimension", *_once(str(teacher.embedding_dim), str(student.embedding_dim))),
            HeadlineRow("Unknown tokens", *_once(ABSENT, f"{100 * student.unk_rate:.2f} %")),
            HeadlineRow("Tokens per text, relative", *_once("1.00", f"{self.speed.token_growth:.2f}")),
            HeadlineRow(
                "Sentences per second",
                *_once(f"{self.speed.teacher_sentences_per_s:,.0f}", f"{self.speed.student_sentences_per_s:,.0f}"),
            ),
            HeadlineRow("Cosine to the teacher", ABSENT, f"{before.cosine:.3f}", f"{after.cosine:.3f}"),
            HeadlineRow("Similarities, Spearman", ABSENT, f"{before.spearman:.3f}", f"{after.spearman:.3f}"),
        ]
        if self.bitext:
            mean = self.bitext.mean
            found = (_percent(mean[model]) for model in ("teacher", "student_initial", "student"))
            rows.append(HeadlineRow("Translations found, mean", *found))
        return rows


class HeadlineRow(NamedTuple):
    """One measure of the three models, as text with its unit."""

    measure: str
    teacher: str
    student_initial: str
    student: str


def write_json(report: Report, path: Path) -> None:
    """Write the report, computed values included, as indented JSON that `Report.model_validate_json` reads back."""
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report | None:
    """The report in `path`; None where there is none, or one of another form."""
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def render_html(report: Report, plots: Mapping[str, str]) -> str:
    """A page without external resources; `plots` gives our own SVG text by caption, in the order to be shown.

    Everything from the report is escaped, the SVG is not.
    """
    return render_page("report.html.jinja", plots, report=report, absent=ABSENT)


def render_page(template: str, plots: Mapping[str, str], **values: Any) -> str:
    """A template of this directory with everything escaped but `plots`, our own SVG text by caption."""
    environment = Environment(
        loader=PackageLoader("embedlib.evaluation", "."),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    figures = {caption: Markup(svg) for caption, svg in plots.items()}  # noqa: S704 (drawn by embedlib.evaluation.plots)
    return environment.get_template(template).render(plots=figures, **values)


def print_table(report: Report, console: Console) -> None:
    """Print the headline and the verdict, at most 80 columns wide."""
    table = Table(title=Text(f"{report.teacher.name} → {report.student.name}"))
    table.add_column("")
    for model in ("teacher", "student before", "student after"):
        table.add_column(model, justify="right")
    for row in report.headline:
        table.add_row(*row)
    console.print(table, width=80)
    console.print(report.verdict, width=80, markup=False, highlight=False)


def _once(teacher: str, student: str) -> tuple[str, str, str]:
    """What distillation does not change stands the same before and after it."""
    return teacher, student, student


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
