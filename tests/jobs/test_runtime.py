"""What a job takes a cluster to have."""

from typing import Any

import pytest
import ray
from ray._private.state import state

from jobs.runtime import num_gpus, present_gpus


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
