"""What a run tells of itself: Prometheus, TensorBoard, MLflow, JSON lines, and the note that jobs/status.py reads."""

import gc
import importlib
import json
import os
import shutil
import struct
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from tensorboardX.proto.event_pb2 import Event

from embedlib.artifact import new_artifact
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.storage import Store
from jobs import cli, metrics, recipe, status
from jobs.metrics import COUNTERS, GAUGES, NOTE, RunReport
from jobs.status import Stage, StatusConfig, main, stages
from jobs.tensorboard_run import TensorBoardRun

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
    report = RunReport("train", MARK, Store.at(str(tmp_path / "run")), {})
    report.begin("texts", 10, "files")
    report.update(10)
    report.begin("train", 100, "steps", 20)
    measured = {"loss": 0.5, "tokens_per_second": 1000.0, "validation": 0.8, "recall": 0.97}
    report.update(60, "", measured | {"padding_waste": 0.1, "cache_hits": 0.2})
    report.update(100, "", {"loss": 0.25})
    report.finish()
    told, line = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (told["stage"], told["done"]) == ("texts", 10)
    assert {key: line[key] for key in ("job", "stage", "run", "done", "total", "unit", "loss")} == {
        "job": "train",
        "stage": "train",
        "run": MARK[:12],
        "done": 100,
        "total": 100,
        "unit": "steps",
        "loss": 0.25,
    }
    assert line["ray_job"] == ray.get_runtime_context().get_job_id()
    scalars = read_scalars(tmp_path / "board" / f"train-{MARK[:12]}")
    assert scalars["loss"] == [(60, 0.5), (100, 0.25)]
    assert scalars["progress"][0] == (20, pytest.approx(0.2))
    assert scalars["texts/progress"] == [(0, 0.0), (10, 1.0)]

    deadline = time.monotonic() + 60
    names = [f"ray_embedlib_job_{name}" for name in GAUGES] + [f"ray_embedlib_job_{name}_total" for name in COUNTERS]
    while missing := [name for name in names if f"\n{name}{{" not in (page := exported())]:
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(1)
    samples = {line.split("{")[0]: line for line in page.splitlines() if MARK[:12] in line and 'stage="train"' in line}
    assert samples["ray_embedlib_job_loss"].endswith(" 0.25")
    assert samples["ray_embedlib_job_padding_waste"].endswith(" 0.1")
    assert samples["ray_embedlib_job_steps_total"].endswith(" 80.0")
    assert samples["ray_embedlib_job_reused_total"].endswith(" 20.0")
    assert 'task="train"' in samples["ray_embedlib_job_loss"]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No metrics are exported, so that there need be no cluster, and word is left at every turn."""
    monkeypatch.setattr(metrics, "Gauge", MagicMock())
    monkeypatch.setattr(metrics, "Counter", MagicMock())
    monkeypatch.setattr(metrics, "NOTE_EVERY_S", 0.05)
    metrics.instruments.cache_clear()
    yield
    metrics.instruments.cache_clear()


def read_note(directory: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((directory / NOTE).read_text())
    return note


@pytest.mark.usefixtures("silent")
def test_a_run_leaves_word_while_it_lives_though_it_does_nothing(tmp_path: Path) -> None:
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    report.update(5, values={"validation": 0.5})
    report.update(6, values={"loss": 0.25})
    written = []
    while len(set(written)) < 3:
        time.sleep(0.05)
        written += [read_note(tmp_path)["time"]] if (tmp_path / NOTE).exists() else []
    note = read_note(tmp_path)
    assert (note["done"], note["loss"], note["validation"], note["finished"]) == (6, 0.25, 0.5, False)
    report.measured["seconds_left"], report.updated = 100.0, report.updated - 40
    report.write()
    assert read_note(tmp_path)["seconds_left"] == pytest.approx(60, abs=10)
    report.finish()  # early: it had enough
    assert read_note(tmp_path)["finished"]
    (stage,) = stages(StatusConfig(directory=str(tmp_path)))
    assert (stage.path, stage.state, stage.share, stage.note) == (
        ".",
        "done",
        1.0,
        "6/10 steps, loss 0.2500, validation 0.5000",
    )


@pytest.mark.usefixtures("silent")
def test_gauges_are_set_again_while_a_run_says_nothing(tmp_path: Path) -> None:
    """Ray forgets those that are not within half a minute, and a stage may work for longer on one thing."""
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("texts", 10, "files")
    report.update(10)
    report.begin("train", 10, "steps")
    report.update(5, values={"loss": 0.25})
    tags = {"task": "train", "stage": "train", "run": MARK[:12]}
    told = metrics.instruments().gauges["loss"].set.call_args_list  # type: ignore[attr-defined] # one mock for all
    while told.count(((0.25, tags),)) < 4:
        time.sleep(0.05)
    report.finish()
    assert ((1.0, tags),) in told[-3:]
    assert read_note(tmp_path)["progress"] == 1.0


@pytest.mark.usefixtures("silent")
def test_a_report_that_nobody_holds_any_more_falls_silent(tmp_path: Path) -> None:
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    while not (tmp_path / NOTE).exists():
        time.sleep(0.05)
    writing = report.writing
    del report
    with writing:
        gc.collect()
    time.sleep(0.2)
    (tmp_path / NOTE).unlink()
    time.sleep(0.5)
    assert not (tmp_path / NOTE).exists()


@pytest.mark.usefixtures("silent")
def test_no_note_is_worth_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: Store, content: bytes) -> None:
        raise ArtifactError(f"{store}: no space")

    monkeypatch.setattr(Store, "write", refuse)
    report = RunReport("mine", MARK, Store.at(str(tmp_path)), {})
    report.begin("mine", 10, "blocks")
    report.update(10)
    report.finish()


@pytest.mark.usefixtures("silent")
def test_mlflow_has_configuration_and_metrics_in_one_run_though_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("EMBEDLIB_MLFLOW", str(tmp_path / "mlflow"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = {"training": {"epochs": 3, "layers": [1, 2]}, "input": "s3://user:secret@bucket/texts", "guide": None}
    first = RunReport("train", MARK, Store.at(str(tmp_path)), config)
    first.begin("train", 100, "steps")
    first.update(50, values={"loss": 0.5})
    first.write()
    client = MlflowClient(str(tmp_path / "mlflow"))
    experiment = client.get_experiment_by_name("embedlib")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "RUNNING"
    assert run.data.metrics["loss"] == 0.5
    again = RunReport("train", MARK, Store.at(str(tmp_path)), config | {"workers": 2})
    again.begin("train", 100, "steps", 50)
    again.update(100, values={"loss": 0.25})
    again.finish()
    RunReport("train", "f" * 16, Store.at(str(tmp_path)), {}).begin("train", 1, "steps")
    run, other = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)
    assert (run.info.run_name, run.info.status) == (f"train-{MARK[:12]}", "FINISHED")
    assert run.data.params == {
        "training.epochs": "3",
        "training.layers": "[1, 2]",
        "input": "s3://bucket/texts",
        "guide": "null",
        "fingerprint": MARK,
    }
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == [
        (50, 0.5),
        (100, 0.25),
    ]
    assert other.info.run_name == "train-" + "f" * 12


@pytest.mark.usefixtures("silent")
def test_a_tracking_server_is_needed_at_the_door_and_not_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("EMBEDLIB_MLFLOW", "http://user:secret@127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"EMBEDLIB_MLFLOW: http://127\.0\.0\.1:1: ") as refused:
        RunReport("train", MARK, Store.at(str(tmp_path)), {}).begin("train", 1, "steps")
    assert "secret" not in "".join(traceback.format_exception(refused.value))

    monkeypatch.setenv("EMBEDLIB_MLFLOW", str(tmp_path / "mlflow"))
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", MagicMock(side_effect=MlflowException("away")))
        report.update(5, values={"loss": 0.5})
        report.write()
        assert "EMBEDLIB_MLFLOW: metrics wait: away" in capsys.readouterr().out
    report.finish()
    client = MlflowClient(str(tmp_path / "mlflow"))
    (run,) = client.search_runs([client.get_experiment_by_name("embedlib").experiment_id])  # type: ignore[union-attr]
    assert run.data.metrics["loss"] == 0.5


@pytest.mark.usefixtures("silent")
def test_a_tolerant_report_waits_for_a_tracking_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("EMBEDLIB_MLFLOW", str(tmp_path / "mlflow"))
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {"epochs": 3}, tolerant=True)
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "get_experiment_by_name", MagicMock(side_effect=MlflowException("away")))
        with pytest.raises(ConfigError, match=r"EMBEDLIB_MLFLOW: .*: away"):
            metrics.require_mlflow()
        report.begin("train", 10, "steps")
        report.update(5, values={"loss": 0.5})
        report.write()
        assert "EMBEDLIB_MLFLOW: metrics wait: away" in capsys.readouterr().out
    metrics.require_mlflow()
    report.finish()
    client = MlflowClient(str(tmp_path / "mlflow"))
    (run,) = client.search_runs([client.get_experiment_by_name("embedlib").experiment_id])
    assert (run.data.metrics["loss"], run.data.params["epochs"], run.info.status) == (0.5, "3", "FINISHED")


@pytest.mark.usefixtures("silent")
def test_the_end_of_a_run_asks_a_server_that_is_away_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(metrics, "NOTE_EVERY_S", 60)
    monkeypatch.setenv("EMBEDLIB_MLFLOW", str(tmp_path / "mlflow"))
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    while not (tmp_path / NOTE).exists():  # the telling thread has had its turn
        time.sleep(0.05)
    report.write()
    report.update(5, values={"loss": 0.5})
    asked = MagicMock(side_effect=MlflowException("away"))
    monkeypatch.setattr(MlflowClient, "log_batch", asked)
    report.finish()
    assert asked.call_count == 1


def test_mlflow_is_not_tried_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what it was is put back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jobs.mlflow_run", raising=False)
    importlib.import_module("jobs.mlflow_run")
    assert [os.environ[name] for name in names] == ["1", "10"]


@pytest.mark.usefixtures("silent")
def test_tensorboard_shows_a_run_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDLIB_TENSORBOARD", str(tmp_path / "board"))
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    report.update(5, values={"loss": 0.5})
    report.write()
    board = tmp_path / "board" / f"train-{MARK[:12]}"
    assert read_scalars(board)["loss"] == [(5, 0.5)]
    report.update(10, values={"loss": 0.25})
    report.finish()
    scalars = read_scalars(board)
    assert scalars["loss"] == [(5, 0.5), (10, 0.25)]
    assert scalars["progress"] == [(0, 0.0), (5, 0.5), (10, 1.0)]


@pytest.mark.usefixtures("silent")
def test_a_full_disk_under_tensorboard_is_worth_a_line_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDLIB_TENSORBOARD", str(tmp_path / "board"))
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 100, "steps")
    (board,) = report.boards
    assert isinstance(board, TensorBoardRun)
    file = board.begin()
    with open("/dev/full", "wb", buffering=0) as full, report.writing:
        file._py_recordio_writer.close()
        file._py_recordio_writer._writer = full
        for step in range(1, 100):
            report.update(step, values={"loss": 0.5})
        report.tell_boards(lambda board: board.flush())
    assert report.boards == []
    written = []
    while len(set(written)) < 2:  # the telling thread lives
        time.sleep(0.05)
        written.append(read_note(tmp_path)["time"])
    report.finish()
    assert capsys.readouterr().out.count("TensorBoardRun: no longer told: [Errno 28] No space left on device") == 1


@pytest.mark.usefixtures("silent")
def test_a_board_that_cannot_close_is_worth_a_line_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RunReport("train", MARK, Store.at(str(tmp_path)), {})
    report.begin("train", 10, "steps")
    broken, whole = MagicMock(), MagicMock()
    broken.close.side_effect = OSError("http://user:secret@server is gone")
    report.boards = [broken, whole]
    report.finish()
    assert whole.close.call_count == 1
    assert "no longer told: http://server is gone" in capsys.readouterr().out
    assert read_note(tmp_path)["finished"]


@pytest.mark.usefixtures("silent")
def test_tensorboard_where_nothing_can_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDLIB_TENSORBOARD", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"EMBEDLIB_TENSORBOARD: .*/file/train-0123456789ab: cannot be written"):
        RunReport("train", MARK, Store.at(str(tmp_path)), {}).begin("train", 1, "steps")


def test_that_mlflow_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "jobs.mlflow_run", raising=False)
    monkeypatch.setenv("EMBEDLIB_MLFLOW", str(tmp_path))
    with pytest.raises(ConfigError, match=r"MLflow is not installed; expected: pip install 'embedlib\[mlflow\]'"):
        RunReport("train", MARK, Store.at(str(tmp_path)), {}).begin("train", 1, "steps")


def write_note(directory: Store, done: int, age_s: float, **values: Any) -> None:
    when = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    note = {"time": when, "job": "embed", "stage": "embed", "run": "abc", "ray_job": "01", "finished": False}
    note |= {"done": done, "total": 200, "unit": "texts", "progress": done / 200, "seconds_left": 100.0}
    (directory / NOTE).write_json(note | values)


def by_path(found: list[Stage]) -> dict[str, Stage]:
    return {stage.path: stage for stage in found}


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where runs lie."""
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket").format(tmp_path.name)


def test_the_table_tells_finished_running_stopped_and_begun_runs_apart(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Store.at(root)
    with new_artifact(tmp_path / "made" / "texts", "texts", MARK) as (_, measurements):
        measurements["texts"] = 1234
    (home / "demo" / "texts" / "manifest.json").put(tmp_path / "made" / "texts" / "manifest.json")
    shutil.rmtree(tmp_path / "made")
    write_note(home / "demo" / "vectors", 50, age_s=10, tokens_per_second=2000.0, padding_waste=0.125)
    write_note(home / "demo" / "training" / "abc", 150, age_s=1000)
    write_note(home / "demo" / "training" / "abc" / "log" / "not-a-stage", 1, age_s=0)
    write_note(home / "corpus", 200, age_s=1, job="corpus", stage="write", seconds_left=None)  # its manifest is missing
    (home / "claimed" / ".fingerprint").write(MARK.encode())
    (home / "claimed" / "part-000000.parquet").write(b"")
    found = by_path(main(StatusConfig(directory=root)))
    assert {path: (stage.kind, stage.state) for path, stage in found.items()} == {
        "demo/texts": ("texts", "done"),
        "demo/vectors": ("embed", "running"),
        "demo/training/abc": ("embed", "stopped"),
        "corpus": ("corpus: write", "running"),
        "claimed": ("?", "begun"),
    }
    running = found["demo/vectors"]
    assert running.share == 0.25
    assert running.seconds_left == pytest.approx(90, abs=5)
    assert running.note == "50/200 texts, 2,000 tokens/s, 12% padding"
    assert found["demo/texts"].note == "1,234 texts"
    assert found["demo/training/abc"].seconds_left is None
    assert found["claimed"].note == "1 parts"
    assert (datetime.now(UTC) - found["claimed"].changed).total_seconds() < 60
    assert "demo/vectors" in capsys.readouterr().out


def test_what_a_recipe_and_its_stages_took_is_told(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "recipe" / "merged" / "model", "model", MARK):
        pass
    with new_artifact(tmp_path / "recipe" / "mined", "negatives", MARK):
        pass
    state = tmp_path / "recipe" / status.STATE
    state.write_text(json.dumps({"mined": {"state": "made", "seconds": 75.2}}))
    assert recipe.STATE == status.STATE
    config = StatusConfig(directory=str(tmp_path))
    assert {path: (stage.state, stage.note) for path, stage in by_path(stages(config)).items()} == {
        "recipe": ("idle", "mined made in 1:15"),
        "recipe/merged/model": ("done", ""),
        "recipe/mined": ("done", "1:15 the last time"),
    }
    write_note(Store.at(str(tmp_path / "recipe" / "trained" / "training" / "abc")), 50, age_s=0)
    write_note(Store.at(str(tmp_path / "other")), 50, age_s=0, seconds_left=7.0)
    running = by_path(stages(config))["recipe"]
    assert running.state == "running"
    assert running.seconds_left == pytest.approx(100, abs=5)
    shutil.rmtree(tmp_path / "recipe" / "trained")
    state.write_text(json.dumps({"mined": {"state": "made", "seconds": 75.2}, "trained": {"state": "failed"}}))
    assert by_path(stages(config))["recipe"].state == "failed"
    # The recipe's directory itself may be the one that is asked for.
    within = by_path(stages(StatusConfig(directory=str(tmp_path / "recipe"))))
    assert (within["."].kind, within["mined"].note) == ("recipe", "1:15 the last time")


def test_stages_of_a_recipe_are_told_though_nothing_of_theirs_is_finished(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "recipe" / "trained" / "model", "model", MARK):
        pass
    with new_artifact(tmp_path / "recipe" / "mined", "negatives", MARK):
        pass
    told = {"trained": "was there", "mined": "failed", "merged": "running", "scored": "waits"}
    (tmp_path / "recipe" / status.STATE).write_text(
        json.dumps({name: {"job": "job", "state": state, "seconds": 75.2} for name, state in told.items()})
    )
    config = StatusConfig(directory=str(tmp_path))
    found = {stage.path: (stage.kind, stage.state, stage.note) for stage in stages(config) if stage.kind != "recipe"}
    took = "1:15 the last time"
    assert found == {
        "recipe/trained": ("job", "done", took),
        "recipe/trained/model": ("model", "done", ""),
        "recipe/mined": ("job", "failed", took),
        "recipe/merged": ("job", "begun", took),
        "recipe/scored": ("job", "waits", took),
    }


def test_where_there_is_nothing_it_says_so(tmp_path: Path) -> None:
    config = StatusConfig(directory=str(tmp_path))
    assert stages(config) == []
    with pytest.raises(DataError, match=r"directory: .*gone is no directory"):
        stages(StatusConfig(directory=str(tmp_path / "gone")))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("not JSON")
    (tmp_path / "odd" / NOTE).write_text("[]")
    assert stages(config) == []


def test_the_directory_is_the_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    read = partial(cli.read_config, StatusConfig, first="directory")
    assert read(["s3://bucket/artifacts", "--silent_s", "5"]) == StatusConfig(
        directory="s3://bucket/artifacts", silent_s=5
    )
    assert read(["--silent_s", "5"]).directory == StatusConfig().directory
    with pytest.raises(SystemExit):
        read(["--help"])
    assert "[DIRECTORY]" in capsys.readouterr().out
