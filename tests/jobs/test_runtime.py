"""What a job takes a cluster to have, and what workers of a local one are to keep to themselves."""

import logging
import os
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.train.v2._internal.execution.controller import placement_group_cleaner

from jobs.runtime import encoder_processes, num_gpus, present_gpus, quiet_cleaner


@pytest.mark.parametrize(
    ("there", "allowed", "present", "all_of_them"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, {"GPU": 24, "CPU": 99}, 2, 2),
        ({"CPU": 0.0}, {"GPU": 24, "CPU": 99}, 0, 24),  # a head alone, and an autoscaler that waits to be asked
        ({"CPU": 4.0}, {"CPU": 99}, 0, 0),
        ({"CPU": 4.0}, None, 0, 0),
    ],
)
def test_gpus_that_an_autoscaler_may_start_are_asked_for(
    there: dict[str, float],
    allowed: dict[str, int] | None,
    present: int,
    all_of_them: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resources() -> Any:
        return there

    monkeypatch.setattr(ray, "cluster_resources", resources)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: allowed)
    assert (present_gpus(), num_gpus()) == (present, all_of_them)


@pytest.mark.parametrize(("cores", "processes"), [(None, 1), (1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (128, 8)])
def test_four_cores_share_a_model(cores: int | None, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert encoder_processes() == processes


def test_the_cleaner_does_not_tell_once_a_second_that_there_is_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_group_cleaner.logger, "level", logging.NOTSET)
    quiet_cleaner()
    assert placement_group_cleaner.logger.level == logging.ERROR
