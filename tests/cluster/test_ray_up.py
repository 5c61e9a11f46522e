"""The files of `ray up`: what Ray makes of them before it starts a machine, and what ours promise beyond that."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.conftest import CLUSTER

FILES = sorted((CLUSTER / "ray-up").glob("*.yaml"))
CLOUDS = ["aws", "gcp"]


def prepared(path: Path) -> dict[str, Any]:
    """The configuration as `ray up` has it after its own checks, before it asks a cloud."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path) -> None:
    config = prepared(path)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["docker"]["image"].startswith("registry.example.com/embedlib:")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_node_starts_without_authentication(path: Path) -> None:
    config = prepared(path)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0] == 'test "$RAY_AUTH_MODE" = token && test -s ~/.ray/auth_token'
    assert any(target.endswith("/.ray/auth_token") for target in config["file_mounts"])
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "token=" not in path.read_text().lower()


@pytest.mark.parametrize("name", CLOUDS)
def test_on_demand_stands_in_for_spot(name: str) -> None:
    types = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["available_node_types"]
    spot, fallback = types["gpu-spot"], types["gpu-on-demand"]
    assert spot["priority"] > fallback["priority"]
    # The autoscaler takes one for the other only where both can hold the same work.
    assert spot["resources"] == fallback["resources"]
    market = ("InstanceMarketOptions", "scheduling")
    assert "spot" in str({key: spot["node_config"].get(key) for key in market}).lower()
    assert "spot" not in str({key: fallback["node_config"].get(key) for key in market}).lower()
    assert "RAY_enable_autoscaler_v2=1" in prepared(CLUSTER / "ray-up" / f"{name}.yaml")["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_is_scheduled_on_the_head(name: str) -> None:
    config = prepared(CLUSTER / "ray-up" / f"{name}.yaml")
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idle_minutes": 5}, "idle_minutes"),
        ({"head_node_type": "nobody"}, "must be one of"),
        ({"max_workers": "many"}, "many"),
    ],
)
def test_a_slip_is_seen(change: dict[str, Any], message: str) -> None:
    config = yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text()) | change
    with pytest.raises((jsonschema.ValidationError, ValueError), match=message):
        validate_config(prepare_config(config))
