"""What a run tells of itself: Prometheus, TensorBoard, JSON lines, and the note that jobs/status.py reads."""

import json
import struct
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboardX.proto.event_pb2 import Event

from embedlib.artifact import new_artifact
from embedlib.errors import ArtifactError, DataError
from embedlib.storage import Store
from jobs import recipe, status
from jobs.metrics import COUNTERS, GAUGES, NOTE, RunReport
from jobs.status import StatusConfig, main, stages

MARK = "0123456789abcdef"


def read_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value by name, of the one event file of a run."""
    (file,) = directory.glob("events.*")
    content, place = file.read_bytes(), 0
    found: dict[str, list[tuple[int, float]]] = {}
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        place += 12 + length + 4  # each record has its length, a checksum, itself, and a checksum
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def exported() -> str:
    """The metrics page of this cluster's node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    address = ray.nodes()[0]["NodeManagerAddress"]
    with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10) as page:
        text: str = page.read().decode()
    return text


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_tells_of_itself_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDLIB_LOG", "json")
    monkeypatch.setenv("EMBEDLIB_TENSORBOARD", str(tmp_path / "board"))
    report = RunReport("train", MARK, Store.at(str(tmp_path / "run")), 100, "steps")
    report.update(20)  # an earlier run's
    report.update(60, "", {"loss": 0.5, "tokens_per_second": 1000.0, "validation": 0.8, "recall": 0.97})
    report.update(100, "", {"loss": 0.25})
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {key: line[key] for key in ("job", "run", "done", "total", "unit", "loss")} == {
        "job": "train",
        "run": MARK[:12],
        "done": 100,
        "total": 100,
        "unit": "steps",
        "loss": 0.25,
    }
    assert line["ray_job"] == ray.get_runtime_context().get_job_id()
    report.scalars.close()
    scalars = read_scalars(tmp_path / "board" / f"train-{MARK[:12]}")
    assert scalars["loss"] == [(60, 0.5), (100, 0.25)]
    assert scalars["progress"][0] == (20, pytest.approx(0.2))
    assert json.loads((tmp_path / "run" / NOTE).read_text())["done"] == 100

    deadline = time.monotonic() + 60
    names = [f"ray_embedlib_job_{name}" for name in GAUGES] + [f"ray_embedlib_job_{name}_total" for name in COUNTERS]
    while missing := [name for name in names if f"\n{name}{{" not in (page := exported())]:
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(1)
    samples = {line.split("{")[0]: line for line in page.splitlines() if MARK[:12] in line}
    assert samples["ray_embedlib_job_loss"].endswith(" 0.25")
    assert samples["ray_embedlib_job_steps_total"].endswith(" 80.0")
    assert samples["ray_embedlib_job_reused_total"].endswith(" 20.0")
    assert 'task="train"' in samples["ray_embedlib_job_loss"]


def test_no_note_is_worth_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: Store, content: bytes) -> None:
        raise ArtifactError(f"{store}: no space")

    monkeypatch.setattr(Store, "write", refuse)
    monkeypatch.setattr(RunReport, "record", lambda *_: {})
    report = RunReport("mine", MARK, Store.at(str(tmp_path)), 10, "blocks")
    report.write_note({})


def write_note(directory: Path, done: int, age_s: float, **values: Any) -> None:
    directory.mkdir(parents=True)
    when = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    note = {"time": when, "job": "embed", "run": "abc", "ray_job": "01", "done": done, "total": 200, "unit": "texts"}
    (directory / NOTE).write_text(json.dumps(note | {"progress": done / 200, "seconds_left": 100.0} | values))


def test_the_table_tells_finished_running_stopped_and_begun_runs_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_artifact(tmp_path / "demo" / "texts", "texts", MARK) as (_, measurements):
        measurements["texts"] = 1234
    write_note(tmp_path / "demo" / "vectors", 50, age_s=10, tokens_per_second=2000.0)
    write_note(tmp_path / "demo" / "training" / "abc", 150, age_s=1000)
    write_note(tmp_path / "demo" / "training" / "abc" / "log" / "not-a-stage", 1, age_s=0)
    (tmp_path / "claimed").mkdir()
    (tmp_path / "claimed" / ".fingerprint").write_text(MARK)
    found = {stage.path: stage for stage in main(StatusConfig(directory=tmp_path))}
    assert {path: stage.state for path, stage in found.items()} == {
        "demo/texts": "done",
        "demo/vectors": "running",
        "demo/training/abc": "stopped",
        "claimed": "begun",
    }
    running = found["demo/vectors"]
    assert running.share == 0.25
    assert running.seconds_left == pytest.approx(90, abs=5)
    assert running.note == "50/200 texts, 2,000 tokens/s"
    assert found["demo/texts"].note == "1,234 texts"
    assert found["demo/training/abc"].seconds_left is None
    assert "demo/vectors" in capsys.readouterr().out


def test_what_a_stage_of_a_recipe_took_is_told(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "recipe" / "merged" / "model", "model", MARK):
        pass
    with new_artifact(tmp_path / "recipe" / "mined", "negatives", MARK):
        pass
    (tmp_path / "recipe" / status.STATE).write_text(json.dumps({"mined": {"state": "made", "seconds": 75.2}}))
    assert recipe.STATE == status.STATE
    assert {stage.path: stage.note for stage in stages(StatusConfig(directory=tmp_path))} == {
        "recipe/merged/model": "",
        "recipe/mined": "1:15 the last time",
    }


def test_stages_of_a_recipe_are_told_though_nothing_of_theirs_is_finished(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "recipe" / "trained" / "model", "model", MARK):
        pass
    with new_artifact(tmp_path / "recipe" / "mined", "negatives", MARK):
        pass
    told = {"trained": "was there", "mined": "failed", "merged": "running", "scored": "waits"}
    (tmp_path / "recipe" / status.STATE).write_text(
        json.dumps({name: {"job": "job", "state": state, "seconds": 75.2} for name, state in told.items()})
    )
    found = {stage.path: (stage.kind, stage.state, stage.note) for stage in stages(StatusConfig(directory=tmp_path))}
    took = "1:15 the last time"
    assert found == {
        "recipe/trained": ("job", "done", took),
        "recipe/trained/model": ("model", "done", ""),
        "recipe/mined": ("job", "failed", took),
        "recipe/merged": ("job", "begun", took),
        "recipe/scored": ("job", "waits", took),
    }


def test_where_there_is_nothing_it_says_so(tmp_path: Path) -> None:
    assert stages(StatusConfig(directory=tmp_path)) == []
    with pytest.raises(DataError, match=r"directory: .*gone is no directory"):
        stages(StatusConfig(directory=tmp_path / "gone"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("not JSON")
    assert stages(StatusConfig(directory=tmp_path)) == []
