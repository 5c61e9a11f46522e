import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from embedlib.errors import DataError
from embedlib.evaluation.plots import MAX_POINTS, bitext_bars, project, scatter, training_curves
from embedlib.evaluation.report import Report, print_table, render_html, write_json

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</title><script src='https://evil.example/x.js'>[bold]&"


def example(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "fingerprint": "0123abcd",
        "teacher": {
            "name": "large",
            "params": 117_500_000,
            "layers": 12,
            "vocabulary": 250_037,
            "embedding_dim": 384,
        },
        "student": {
            "name": "small",
            "params": 13_200_000,
            "layers": 4,
            "vocabulary": 15_424,
            "embedding_dim": 384,
            "unk_rate": 0.0007,
        },
        "fidelity": {"cosine": 0.951, "spearman": 0.902},
        "fidelity_initial": {"cosine": 0.712, "spearman": 0.433},
        "bitext": {
            "teacher": {"de": 0.96, "ja": 0.9},
            "student_initial": {"de": 0.3, "ja": 0.1},
            "student": {"de": 0.95, "ja": 0.775},
        },
        "speed": {
            "teacher_sentences_per_s": 212.0,
            "student_sentences_per_s": 530.0,
            "token_growth": 1.31,
            "bound": 2.29,
        },
        "size": {"teacher_params": 117_500_000, "student_params": 13_200_000, "teacher_mb": 470.1, "student_mb": 52.9},
        "training": {"steps": [1, 2], "loss": [0.5, 0.25], "validation_steps": [2], "validation_cosine": [0.9]},
        "timings": {"compress": 21.4, "distil": 240.7},
        "sts": {"teacher": {"STS12": 71.23}, "student": {"STS12": 69.31}},
        "compression": {"layers": [0, 3, 7, 11], "layer_scores": {"0": 0.1234}, "byte_rows": {"added": 256}},
        "machine": {"cores": 2, "dtype": "float32"},
    }
    return Report.model_validate(values | changes)


class Page(HTMLParser):
    """Collects what a page refers to and checks that its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def plots() -> dict[str, str]:
    points = np.random.default_rng(0).normal(size=(60, 2))
    return {
        "by language": scatter(points, ["ar", "de", "ja"] * 20, "By language", legend=True),
        "by sentence": scatter(points, [row // 3 for row in range(60)], "By sentence", legend=False),
        "training": training_curves(example().training),
        "bitext": bitext_bars(example().bitext),
    }


def test_json_reads_back_and_holds_the_computed_values(tmp_path: Path) -> None:
    report = example()
    write_json(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert Report.model_validate_json(text) == report
    tree = json.loads(text)
    assert tree["speed"]["ratio"] == pytest.approx(2.5)
    assert tree["size"]["ratio"] == pytest.approx(8.9015, abs=1e-4)
    assert tree["bitext"]["mean"] == pytest.approx({"teacher": 0.93, "student_initial": 0.2, "student": 0.8625})


def test_the_page_stands_alone_and_tells_every_number(plots: dict[str, str]) -> None:
    page = Page(render_html(example(), plots))
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == page.tags.count("figcaption") == len(plots)
    assert page.tags.count("table") == page.tags.count("caption") == 4
    words = (
        "large small 117.5 13.2 470.1 52.9 250,037 15,424 384 0.07 1.31 2.3 2.5× 8.9× 212 530 0.951 0.902 0.712 0.433"
    )
    words += " 93.0 20.0 86.2 96.0 77.5 de ja 71.2 69.3 21.4 240.7 262.1 0.1234 256 float32 0.90"
    for word in words.split():
        assert word in page.text
    assert "0, 3, 7, 11" in page.text


def test_names_are_escaped() -> None:
    report = example()
    hostile = report.model_copy(
        update={
            "student": report.student.model_copy(update={"name": HOSTILE}),
            "machine": {HOSTILE: HOSTILE},
            "compression": {"notes": [HOSTILE, {"deep": HOSTILE}]},
            "timings": {HOSTILE: 1.0},
            "sts": None,
        }
    )
    page = Page(render_html(hostile, {HOSTILE: "<svg></svg>"}))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 8


def test_the_verdict_names_the_worst_language() -> None:
    verdict = example().verdict
    for part in ("11.2 %", "2.5 times", "86.2 %", "93.0 %", "20.0 %", "ja, at −12.5 points"):
        assert part in verdict


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_fits_a_terminal_and_a_pipe(terminal: bool) -> None:
    output = io.StringIO()
    report = example(student=example().student.model_dump() | {"name": "[bold]small[/]"})
    print_table(report, Console(file=output, width=100, force_terminal=terminal, no_color=True))
    text = output.getvalue()
    assert ("\x1b" in text) == terminal
    for part in ("[bold]small[/]", "117.5 M", "52.9 MB", "86.2 %", "0.433", "0.951"):
        assert part in text
    if not terminal:
        assert max(map(len, text.splitlines())) <= 80


def test_bitext_of_different_languages_is_refused() -> None:
    with pytest.raises(ValidationError, match="different languages"):
        example(bitext={"teacher": {"de": 1.0}, "student_initial": {"de": 1.0}, "student": {"fr": 1.0}})


def test_plots_are_deterministic_text_in_the_colour_of_the_page(plots: dict[str, str]) -> None:
    for svg in plots.values():
        page = Page(svg)
        assert svg.startswith('<svg role="img" aria-label="')
        assert "<metadata" not in svg
        assert "currentColor" in svg or "By sentence" in svg
        assert all(reference.startswith("#") for reference in page.references)
    assert {"ar", "de", "ja"} <= set(Page(plots["by language"]).text.split())
    assert plots["bitext"] == bitext_bars(example().bitext)
    identifiers = [part.split('"')[0] for svg in plots.values() for part in svg.split(' id="')[1:]]
    assert len(identifiers) == len(set(identifiers))


def test_too_many_points_are_refused() -> None:
    with pytest.raises(DataError, match="draw fewer sentences"):
        project(np.zeros((MAX_POINTS + 1, 2), np.float32))


@pytest.mark.slow
def test_umap_keeps_clusters_apart_and_repeats() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16)).repeat(20, axis=0)
    vectors = (centres + 0.05 * rng.normal(size=centres.shape)).astype(np.float32)
    points = project(vectors)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    same = np.equal.outer(np.arange(60) // 20, np.arange(60) // 20)
    assert distances[same].max() < distances[~same].min()
    assert np.array_equal(points, project(vectors))
