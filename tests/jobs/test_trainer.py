"""The loop of a training process and what is asked before there is one, without Ray."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray.train
import torch

from embedlib.distillation import Step
from embedlib.errors import ConfigError
from embedlib.storage import Store
from embedlib.training import StepResult
from jobs import trainer
from jobs.trainer import JOB, Trained, WorkersConfig, fit, read_validations, run_worker


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that has nothing to go on from, and no cluster."""
    context = MagicMock()
    context.get_world_rank.return_value, context.get_world_size.return_value = 0, 1
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trainer, "save_checkpoint", MagicMock())
    monkeypatch.setattr(trainer, "num_gpus", lambda: 0)
    monkeypatch.setattr(trainer, "present_gpus", lambda: 0)


@pytest.mark.usefixtures("alone")
def test_every_validation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, Any] = {}
    report = MagicMock()
    report.return_value.update = lambda done, note, values: told.update({done: (note, dict(values))})
    monkeypatch.setattr(trainer, "RunReport", report)
    state = MagicMock(step=0, total_steps=12)
    state.optimizer.param_groups = [{"lr": 0.1}]
    steps = [Step(number, [number], StepResult(0.5, 100, 0, 1.0)) for number in range(1, 13)]
    trained = Trained(
        torch.nn.Linear(1, 1), start=lambda _: state, steps=lambda _: iter(steps), validate=lambda _: 0.8, metric="f1"
    )
    Store.at(str(tmp_path / JOB)).write(b"{}")
    log = tmp_path / "log"
    log.mkdir()
    run_worker(trained, WorkersConfig(validate_every=5, checkpoint_every=12), log, "train")
    assert report.call_args.kwargs == {"tolerant": True}
    assert [(step, values["validation"]) for step, (_, values) in told.items()] == [(5, 0.8), (10, 0.8), (12, 0.8)]
    assert told[5] == ("f1 0.8000", {"validation": 0.8})
    assert told[10][1]["loss"] == 0.5
    assert read_validations(log, "f1") == [0.8] * 3


@pytest.mark.usefixtures("alone")
def test_mlflow_is_asked_before_there_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("EMBEDLIB_MLFLOW", "http://127.0.0.1:1")
    monkeypatch.setattr(trainer, "TorchTrainer", MagicMock(side_effect=AssertionError("a worker is asked for")))
    with pytest.raises(ConfigError, match=r"EMBEDLIB_MLFLOW: http://127\.0\.0\.1:1: "):
        fit(MagicMock(), WorkersConfig(), WorkersConfig(), tmp_path, 1, "f1")
