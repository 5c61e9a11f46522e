"""The files of `ray up`: what Ray makes of them before it starts a machine, and what ours promise beyond that."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from botocore.client import BaseClient
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
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


@pytest.mark.parametrize("role", ["data", "gpu"])
@pytest.mark.parametrize("name", CLOUDS)
def test_on_demand_stands_in_for_spot(name: str, role: str) -> None:
    types = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["available_node_types"]
    spot, fallback = types[f"{role}-spot"], types[f"{role}-on-demand"]
    assert spot["priority"] > fallback["priority"]
    # The autoscaler takes one for the other only where both can hold the same work.
    assert spot["resources"] == fallback["resources"]
    market = ("InstanceMarketOptions", "scheduling")
    assert "spot" in str({key: spot["node_config"].get(key) for key in market}).lower()
    assert "spot" not in str({key: fallback["node_config"].get(key) for key in market}).lower()
    assert "RAY_enable_autoscaler_v2=1" in prepared(CLUSTER / "ray-up" / f"{name}.yaml")["head_start_ray_commands"][-1]


def test_aws_policy_has_what_the_autoscaler_calls_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own provider at work, on a cloud that moto pretends to be."""
    calls: set[str] = set()
    call = BaseClient._make_api_call

    def note(self: BaseClient, operation: str, values: dict[str, Any]) -> Any:
        calls.add(operation)
        return call(self, operation, values)

    for name, value in (("AWS_ACCESS_KEY_ID", "any"), ("AWS_SECRET_ACCESS_KEY", "any")):
        monkeypatch.setenv(name, value)
    config = yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text())
    node = config["available_node_types"]["gpu-on-demand"]["node_config"]
    with mock_aws():
        # What `ray up` fills in on the user's machine, with the user's rights.
        ec2 = boto3.client("ec2", config["provider"]["region"])
        subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        monkeypatch.setattr(BaseClient, "_make_api_call", note)
        wanted = {key: value for key, value in node.items() if key != "IamInstanceProfile"}
        for _ in range(2):
            provider.create_node(wanted | {"SubnetIds": [subnet], "ImageId": image}, {"ray-node-type": "worker"}, 1)
        (first, second) = provider.non_terminated_nodes({"ray-node-type": "worker"})
        provider.set_node_tags(first, {"ray-node-status": "up-to-date"})
        assert provider.internal_ip(first)
        provider.terminate_node(first)
        provider.terminate_nodes([second])
        assert provider.non_terminated_nodes({}) == []
    statements = json.loads((CLUSTER / "ray-up" / "aws-head-policy.json").read_text())["Statement"]
    allowed = {action for each in statements for action in listed(each["Action"])}
    assert {f"ec2:{operation}" for operation in calls} == allowed - {"iam:PassRole"}
    # What changes anything is bound to this cluster, or to what a node is made of.
    for statement in statements:
        if "*" in listed(statement["Resource"]):
            assert all(action.startswith("ec2:Describe") for action in listed(statement["Action"]))
        if any(resource.endswith(":instance/*") for resource in listed(statement["Resource"])):
            assert statement["Condition"]["StringEquals"]
    # The role that may be handed on is the one that workers are given.
    (passed,) = [each["Resource"] for each in statements if each["Action"] == "iam:PassRole"]
    assert node["IamInstanceProfile"]["Arn"].rpartition("/")[2] == passed.rpartition("/")[2]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_has_an_identity_and_workers_have_another_than_the_head(name: str) -> None:
    config = yaml.safe_load((CLUSTER / "ray-up" / f"{name}.yaml").read_text())
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[name]
    found = {kind: str(each["node_config"][key]) for kind, each in config["available_node_types"].items()}
    head = found.pop(config["head_node_type"])
    assert "embedlib-head" in head
    assert len(set(found.values())) == 1
    assert "embedlib-worker" in found["data-spot"]
    readme = (CLUSTER / "README.md").read_text()
    assert all(path.name in readme for path in (CLUSTER / "ray-up").glob(f"{name}-*.json"))


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_say_what_they_are_for(name: str) -> None:
    types = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["available_node_types"]
    for kind, each in types.items():
        role, _, market = kind.partition("-")
        assert each["labels"] == {"role": role} | ({"market": market} if market else {})


IMAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "aws": lambda node: str(node["ImageId"]),
    "gcp": lambda node: str(node["disks"][0]["initializeParams"]["sourceImage"]),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_names_the_image_of_its_host(name: str) -> None:
    """Left to itself Ray takes one of Ubuntu 18.04 on AWS. Those here have NVIDIA's driver in them."""
    types = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["available_node_types"]
    (image,) = {IMAGES[name](each["node_config"]) for each in types.values()}
    if name == "aws":
        assert image == "ami-of-your-region", "an id of one region, or of one week"
        assert image in (CLUSTER / "README.md").read_text()
    else:
        assert re.search(r"-nvidia-\d+$", image)


HOSTS = {
    "a GPU": ("NVIDIA L4", 0, "nvidia:{nvidia-container-runtime} runc:{runc}", True),
    "no GPU": ("a bridge", 127, "runc:{runc}", True),
    "no driver": ("NVIDIA L4", 127, "nvidia:{nvidia-container-runtime} runc:{runc}", False),
    "no runtime": ("NVIDIA L4", 0, "runc:{runc}", False),
}
"""What `lspci` says, what `nvidia-smi` exits with, what Docker has, and whether the host is taken."""


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", CLOUDS)
def test_a_host_whose_gpu_no_container_would_see_is_not_taken(name: str, host: str, tmp_path: Path) -> None:
    device, driver, runtimes, is_taken = HOSTS[host]
    programs = {
        "lspci": f"echo {device}",
        "nvidia-smi": f"exit {driver}",
        "sudo": 'exec "$@"',
        "docker": f"echo '{runtimes}'",
        "sleep": "kill $PPID",  # who would wait gives up
    }
    for program, line in programs.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / program).chmod(0o755)
    commands = prepared(CLUSTER / "ray-up" / f"{name}.yaml")["initialization_commands"]
    (check,) = [command for command in commands if "nvidia-smi" in command]
    done = subprocess.run(["bash", "-c", check], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True)
    assert (done.returncode == 0) is is_taken, done.stderr


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
