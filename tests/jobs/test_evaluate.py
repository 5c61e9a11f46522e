"""Evaluation on a real cluster: several models, tasks that fail, gates, one's own documents, a page in a browser."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mteb.cache import ResultCache
from safetensors.numpy import load_file, save_file

from embedlib.encoder import Encoder
from embedlib.errors import ConfigError, DataError, GateError
from embedlib.evaluation.evaluation_report import PLOTTED_TEXTS, Evaluation, plotted_places, read_evaluation
from embedlib.evaluation.footprint import Footprint, middle_of
from embedlib.metrics import row_cosines
from embedlib.storage import Store
from jobs.evaluate import (
    SAMPLE_TEXTS,
    Asked,
    EvaluateConfig,
    Model,
    answered,
    evaluate,
    main,
    outcome,
    plan_units,
    read_sample,
)
from jobs.metrics import NOTE, RunReport
from serve.model import read_retention
from tests.conftest import corpus_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCREENSHOTS = Path(os.environ.get("EMBEDLIB_ARTIFACTS", "artifacts"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """STS whose gold is tiny_encoder's own opinion, a bitext, and texts without labels."""
    root = tmp_path_factory.mktemp("sets")
    rows = {lang: [row["text"] for row in corpus_rows() if row["lang"] == lang] for lang in ("de", "en", "ru")}
    english = rows["en"]
    vectors = Encoder.load(tiny_encoder, torch.device("cpu"), torch.float32).encode(english, "query")
    scores = row_cosines(vectors, np.roll(vectors, -1, axis=0)).tolist()
    pq.write_table(
        pa.table({"sentence1": english, "sentence2": english[1:] + english[:1], "score": scores}), root / "sts.parquet"
    )
    pq.write_table(pa.table(rows), root / "bitext.parquet")
    pq.write_table(pa.Table.from_pylist(corpus_rows()), root / "texts.parquet")
    return root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """tiny_encoder with one layer's weights out of order."""
    directory = shutil.copytree(tiny_encoder, tmp_path_factory.mktemp("models") / "damaged")
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if "layer.3" in name and weights[name].ndim == 2]:
        np.random.default_rng(0).shuffle(weights[name])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_directories(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("EMBEDLIB_ARTIFACTS", str(home / "artifacts"))
    monkeypatch.setenv("EMBEDLIB_CACHE", str(home / "cache"))


def config_of(sets: Path, models: dict[str, Path], **values: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "output": "evaluation",
            "models": {name: str(path) for name, path in models.items()},
            "root": str(sets),
            "texts": str(sets / "texts.parquet"),
            "tasks": {
                "Sts": {"type": "sts", "path": "sts.parquet", "language": "en"},
                "Bitext": {"type": "bitext", "path": "bitext.parquet", "pivot": "en"},
            },
        }
        | values
    )


@pytest.fixture(scope="module")
def evaluated(ray_cluster: None, sets: Path, tiny_encoder: Path, damaged: Path, home: Path) -> Evaluation:
    """Two models on tasks of which one cannot be read, with a requirement that one of them misses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDLIB_ARTIFACTS", str(home / "artifacts"))
        patch.setenv("EMBEDLIB_CACHE", str(home / "cache"))
        patch.setattr("jobs.evaluate.SPEED_RUNS", 1)
        config = config_of(sets, {"teacher": tiny_encoder, "damaged": damaged}, card=True, price_per_hour=1.0)
        tasks = config.model_dump()["tasks"] | {"Broken": {"type": "sts", "path": "nowhere.parquet"}}
        with pytest.raises(GateError, match=r"sts>=0\.99\*teacher: NOT MET by damaged"):
            main(config.model_validate(config.model_dump() | {"tasks": tasks, "require": ["sts>=0.99*teacher"]}))
        found = read_evaluation(config.directory)
        assert json.loads((config.directory / NOTE).read_text())["finished"]
    assert found is not None
    return found


@pytest.mark.ray
def test_a_damaged_model_scores_lower_and_is_told_of(evaluated: Evaluation, damaged: Path) -> None:
    sts = evaluated.scorecard.row("sts")
    assert sts is not None
    assert sts.cells["teacher"].value == pytest.approx(100, abs=0.1)
    assert sts.cells["damaged"].value < 95
    assert evaluated.drift["damaged"].whole.spearman < 0.99
    assert "damaged keeps" in evaluated.verdicts["damaged"]
    assert read_retention(damaged) == evaluated.retention["damaged"]
    assert "| sts |" in (damaged / "README.md").read_text()


@pytest.mark.ray
def test_a_task_that_cannot_be_read_leaves_the_others(evaluated: Evaluation) -> None:
    assert {(failure.model, failure.task) for failure in evaluated.failures} == {
        ("teacher", "Broken"),
        ("damaged", "Broken"),
    }
    assert "nowhere.parquet: no Parquet file" in evaluated.failures[0].reason
    assert [row.name for row in evaluated.scorecard.tasks] == ["Sts", "Bitext"]
    assert evaluated.footprints["teacher"].cost_per_million is not None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_without_finite_vectors_is_told_of_and_the_others_finish(
    sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_encoder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {name: np.full_like(value, np.nan) for name, value in weights.items()},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = config_of(sets, {"teacher": tiny_encoder, "broken": broken}, output="broken", plots=False, speed=False)
    found = main(config)
    assert {(each.model, each.task) for each in found.failures} == {
        ("broken", task) for task in ("Sts", "Bitext", "texts without labels")
    }
    assert "not finite" in found.failures[0].reason
    assert found.scorecard.groups[0].cells.keys() == {"teacher"}
    assert "no verdict" in found.verdicts["broken"]


@pytest.mark.ray
def test_mtebs_own_tools_read_the_results(evaluated: Evaluation, home: Path) -> None:
    results = ResultCache(home / "artifacts" / "evaluation").load_results(validate_and_filter=False)
    found = {
        (model.model_name, result.task_name): result.get_score()
        for model in results.model_results
        for result in model.task_results
    }
    row = evaluated.scorecard.row("Sts")
    assert row is not None
    assert 100 * found[("embedlib/teacher", "Sts")] == pytest.approx(row.cells["teacher"].value, abs=1e-3)


@pytest.mark.ray
def test_the_report_in_a_browser(evaluated: Evaluation, home: Path, browser: "Browser") -> None:
    for name, width in (("desktop", 1280), ("phone", 390)):
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))  # noqa: B023 (one page at a time)
        page.goto((home / "artifacts" / "evaluation" / "report.html").as_uri())
        assert [url for url in asked if not url.startswith("file:")] == []
        assert page.locator("svg[role=img]:not([aria-label])").count() == 0
        assert page.locator("svg[role=img]").count() >= 2
        assert page.locator("h2").first.inner_text() == "Scores by group"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"test-evaluation-{name}.png", full_page=True)
        page.close()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_rerun_gives_what_is_there_and_a_rename_changes_nothing(
    evaluated: Evaluation, sets: Path, tiny_encoder: Path, damaged: Path, home: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(damaged, tmp_path / "renamed")
    scored = sorted((home / "cache" / "evaluation").rglob("scores.json"))
    again = main(
        config_of(sets, {"teacher": tiny_encoder, "renamed": renamed}, output="again", plots=False, speed=False)
    )
    assert sorted((home / "cache" / "evaluation").rglob("scores.json")) == scored
    assert [row.cells["renamed"].value for row in again.scorecard.groups] == [
        row.cells["damaged"].value for row in evaluated.scorecard.groups
    ]
    report = home / "artifacts" / "again" / "report.json"
    written = report.stat().st_mtime_ns
    main(config_of(sets, {"teacher": tiny_encoder, "renamed": renamed}, output="again", plots=False, speed=False))
    assert report.stat().st_mtime_ns == written
    assert json.loads(report.read_text())["retention"]["renamed"] == again.retention["renamed"]


def test_what_cannot_be_asked_is_refused_before_anything_runs(sets: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    models = {"teacher": tiny_encoder}
    with pytest.raises(ValueError, match="baseline: 'tutor'; expected of"):
        config_of(sets, models, baseline="tutor")
    with pytest.raises(ConfigError, match=r"benchmarks: mteb knows no 'Banking7Classification'; near it: .'Banking77"):
        plan_units(config_of(sets, models, benchmarks=["Banking7Classification"]))
    with pytest.raises(ConfigError, match="only: 'nought' is neither a task"):
        plan_units(config_of(sets, models, only=["nought"]))
    with pytest.raises(ConfigError, match="tasks: none to run"):
        plan_units(config_of(sets, models, tasks={}))
    with pytest.raises(DataError, match=r"docs: .* has no documents"):
        plan_units(config_of(sets, models, docs=str(tmp_path)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_costs_its_task_alone(tmp_path: Path) -> None:
    model = Model("student", tmp_path, "mark", tmp_path, None)
    found = outcome(ray.remote(max_retries=0)(lambda: os._exit(1)).remote(), model, "Huge")
    assert (found.model, found.task) == ("student", "Huge")
    assert found.reason.startswith("its process died: ")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(120)
def test_a_scorer_that_is_idle_makes_room_for_one_that_has_none(tmp_path: Path) -> None:
    class Cutter:
        def cut(self, model: Model, given: int) -> int:
            return given

    # Two that together want more than there is, as when a node was lost: one of them has no place.
    actors = [ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Cutter).remote() for _ in range(2)]
    model = Model("student", tmp_path, "mark", tmp_path, None)
    asked = [Asked(model, "tokens a word", "cut", number) for number in range(2)]
    report = RunReport("evaluate", "mark", Store.at(str(tmp_path)), {})
    assert sorted(found for _, found in answered(actors, asked, report)) == [0, 1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_card_that_others_wrote_is_not_lost(sets: Path, tiny_encoder: Path, damaged: Path, tmp_path: Path) -> None:
    other = shutil.copytree(damaged, tmp_path / "other")
    (other / "README.md").write_text("---\nlicense: mit\n---\n# Their model\n")
    with pytest.raises(ConfigError, match=r"README\.md is not of embedlib's making"):
        evaluate(config_of(sets, {"teacher": tiny_encoder, "other": other}, card=True))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_texts_that_cannot_be_used_are_refused_before_anything_runs(
    sets: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "group": ["p1", "p2"]}), path)
    with pytest.raises(ConfigError, match="`group` is string; expected whole numbers"):
        evaluate(config_of(sets, {"teacher": tiny_encoder}, texts=str(path)))
    hub = config_of(sets, {"teacher": tiny_encoder}, texts=None, tasks={}, benchmarks=["STS12"])
    with pytest.raises(ConfigError, match="texts: needed to measure speed"):
        evaluate(hub)


def test_translations_come_into_the_sample_together(sets: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{lang} {number}", "lang": lang, "group": number} for lang in "abcd" for number in range(900)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    sample = read_sample(config_of(sets, {"teacher": tmp_path}, texts=str(tmp_path / "texts.parquet")), [])
    assert len(sample.texts) == SAMPLE_TEXTS
    assert set(Counter(sample.groups).values()) == {4}
    assert len(plotted := plotted_places([*sample.groups, -1, -1])) == PLOTTED_TEXTS
    assert set(Counter(sample.groups[place] for place in plotted).values()) == {4}
    assert plotted_places([-1, 0, -1, 1]) == [0, 1, 2, 3]


def test_a_footprint_is_the_middle_of_its_runs() -> None:
    run = Footprint(
        fingerprint="", params=1, layers=1, vocabulary=1, embedding_dim=1, max_tokens=1, megabytes=1, texts_per_s=100,
        latency_ms=5, memory_mb=9, arithmetic="float32",
    )  # fmt: skip
    slow = run.model_copy(update={"texts_per_s": 10, "latency_ms": 50, "memory_mb": 8})
    middle = middle_of([run, slow, run], price_per_hour=0.36)
    assert (middle.texts_per_s, middle.latency_ms, middle.memory_mb) == (100, 5, 9)
    assert middle.cost_per_million == pytest.approx(1.0)


def test_benchmarks_are_known_without_a_hub(sets: Path, tiny_encoder: Path) -> None:
    units, _ = plan_units(config_of(sets, {"teacher": tiny_encoder}, tasks={}, benchmarks=["MTEB(Indic, v1)", "STS12"]))
    assert len(units) == len(mteb.get_benchmark("MTEB(Indic, v1)").tasks) + 1
    assert {unit.benchmark for unit in units} == {"MTEB(Indic, v1)", None}
    some, _ = plan_units(
        config_of(sets, {"teacher": tiny_encoder}, tasks={}, benchmarks=["MTEB(Indic, v1)", "STS12"], only=["sts"])
    )
    assert [unit.name for unit in some if unit.benchmark is None] == ["STS12"]
    assert {unit.type for unit in some} == {"STS"}
    twice, _ = plan_units(config_of(sets, {"teacher": tiny_encoder}, tasks={}, benchmarks=["STS12", "STS12"]))
    assert [unit.name for unit in twice] == ["STS12"]
    shared = config_of(
        sets, {"teacher": tiny_encoder}, tasks={}, benchmarks=["MTEB(eng, v1)", "MTEB(Multilingual, v1)"]
    )
    with pytest.raises(ConfigError, match="is there twice, of other data or languages"):
        plan_units(shared)
