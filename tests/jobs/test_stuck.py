"""Workers that say nothing lose their places, and are started anew."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import save_file

from embedlib.config import Config
from embedlib.storage import Store
from jobs import stuck
from jobs.metrics import NOTE
from jobs.stuck import places_of_this_job, stuck_workers_give_way
from jobs.trainer import STATE, WEIGHTS, WorkersConfig, fit
from tests.jobs.processes import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stuck, "LOOK_EVERY_S", 0.1)


def say(run: Path, **values: Any) -> None:
    (Store.at(str(run)) / NOTE).write_json(values)


def test_who_says_nothing_gives_way_and_who_does_or_is_done_stays(tmp_path: Path) -> None:
    group = placement_group([{"CPU": 0.5}])
    assert group.wait(30)
    with stuck_workers_give_way(Store.at(str(tmp_path)), 1):
        for number in range(20):
            say(tmp_path, done=number, finished=False)
            time.sleep(0.1)
        assert places_of_this_job()
        wait_for(lambda: not places_of_this_job(), "the place of who is silent", 30)
    group = placement_group([{"CPU": 0.5}])
    assert group.wait(30)
    with stuck_workers_give_way(Store.at(str(tmp_path)), 1):
        say(tmp_path, done=20, finished=True)
        time.sleep(3)
        assert places_of_this_job()
    remove_placement_group(group)


class Job(Config):
    """What the worker needs to know."""

    run: Path


@pytest.mark.slow
def test_ray_train_begins_anew(tmp_path: Path) -> None:
    def silent_at_first(values: dict[str, Any]) -> None:  # in here, so that it goes to the worker with its code
        run = Path(values["run"])
        if not (run / "tried").exists():
            (run / "tried").touch()
            time.sleep(600)
        made = run / "made"
        made.mkdir()
        save_file({"weight": torch.ones(1)}, made / WEIGHTS)
        torch.save({}, made / STATE)
        ray.train.report({"step": 1}, checkpoint=ray.train.Checkpoint.from_directory(made))

    weights, _ = fit(silent_at_first, Job(run=tmp_path), WorkersConfig(stuck_after_s=20), tmp_path, 1, "step")
    assert weights["weight"].tolist() == [1.0]
    assert (tmp_path / "tried").exists()
