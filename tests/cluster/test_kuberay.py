"""What kustomize makes of cluster/kuberay: known fields, references that lead somewhere, safe pods, jobs that parse."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from base64 import b64decode
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.serve.schema import ServeDeploySchema

from jobs import bitext, compress, corpus, distill, embed, evaluate, index, merge, mine, recipe, train
from jobs.cli import read_config
from serve.app import AppConfig
from serve.auth import hash_key
from serve.gateway import NAME
from serve.model import ModelConfig
from tests.cluster.conftest import CLUSTER, REPOSITORY
from tests.cluster.kuberay import SPECS, cluster_of, templates_of

KUBERAY = CLUSTER / "kuberay"
OVERLAYS = [KUBERAY / "overlays" / name for name in ("dev", "prod")]
DEV_JOB = KUBERAY / "overlays" / "dev-job"
JOBS = sorted((KUBERAY / "jobs").iterdir())
CONFIGS: dict[str, Any] = {
    "bitext": bitext.BitextConfig,
    "compress": compress.CompressJob,
    "corpus": corpus.BuildConfig,
    "distill": distill.DistillConfig,
    "embed": embed.EmbedConfig,
    "evaluate": evaluate.EvaluateConfig,
    "index": index.IndexConfig,
    "merge": merge.MergeConfig,
    "mine": mine.MineConfig,
    "recipe": recipe.RecipeConfig,
    "train": train.TrainConfig,
}
# What jobs/ holds besides jobs.
NO_JOBS = {
    "cli",
    "judges",
    "metrics",
    "miner",
    "mlflow_run",
    "parts",
    "runtime",
    "shards",
    "status",
    "stuck",
    "tensorboard_run",
    "trainer",
    "__init__",
}
# By their keys; embedlib-storage is optional and has what an object store asks for.
SECRETS = {
    "embedlib-token": {"auth_token"},
    "embedlib-redis": {"password"},
    "embedlib-keys": {"keys.json"},
    "embedlib-metrics": {"key"},
    "embedlib-storage": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
}
OPERATORS = {"PodMonitor", "PrometheusRule", "ServiceMonitor"}


@lru_cache
def built(directory: Path) -> list[dict[str, Any]]:
    """The resources that `kubectl apply -k` would send."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl (Debian 13 has a package): what kustomize makes of cluster/kuberay is not tested")
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(resources: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [resource for resource in resources if resource["kind"] == kind]


def pods(resources: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{resource['metadata']['name']} {name}", template)
        for resource in resources
        for name, template in templates_of(resource).items()
    ]


@pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS], ids=lambda path: path.name)
def test_every_resource_has_known_fields_alone(directory: Path) -> None:
    for resource in built(directory):
        if resource["kind"] in SPECS:
            assert resource["apiVersion"] == "ray.io/v1"
            jsonschema.validate(resource["spec"], SPECS[resource["kind"]])
            for template in templates_of(resource).values():
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"} | template.get("metadata", {})}
                kubernetes_validate.validate(pod | {"spec": template["spec"]}, "1.32", strict=True)
        elif resource["kind"] not in OPERATORS:
            kubernetes_validate.validate(resource, "1.32", strict=True)


@pytest.mark.parametrize(
    "change",
    [{"headGroupSpec": {}}, {"authOptions": {"mode": "basic"}}, {"autoscaling": True}, {"rayVersion": 2.6}],
    ids=str,
)
def test_a_slip_in_a_ray_resource_is_seen(change: dict[str, Any]) -> None:
    (cluster,) = of_kind(built(OVERLAYS[1]), "RayCluster")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster["spec"] | change, SPECS["RayCluster"])


@pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS], ids=lambda path: path.name)
def test_rays_autoscaler_takes_the_groups(directory: Path) -> None:
    for resource in built(directory):
        if resource["kind"] in SPECS:
            seen = {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster_of(resource)}
            config = _derive_autoscaling_config_from_ray_cr(seen)
            validate_config(config)
            head = config["available_node_types"][config["head_node_type"]]
            assert head["resources"]["CPU"] == 0, "nothing is scheduled on the head"


@pytest.mark.parametrize("directory", [OVERLAYS[1], *JOBS], ids=lambda path: path.name)
def test_on_demand_stands_in_for_spot(directory: Path) -> None:
    for resource in built(directory):
        if resource["kind"] in ("RayCluster", "RayJob"):
            groups = {group["groupName"]: group for group in cluster_of(resource)["workerGroupSpecs"]}
            spot, fallback = groups["gpu-spot"], groups["gpu-on-demand"]
            assert spot["priority"] > fallback["priority"]
            limits = [group["template"]["spec"]["containers"][0]["resources"] for group in (spot, fallback)]
            assert limits[0] == limits[1]
            assert limits[0]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS], ids=lambda path: path.name)
def test_pods_are_what_a_restricted_namespace_lets_in(directory: Path) -> None:
    for name, template in pods(built(directory)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), name
        # The head's autoscaler speaks to the API server; nobody else has a credential of it.
        assert spec.get("automountServiceAccountToken") is (None if name.endswith(" head") else False), name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert {"requests", "limits"} <= container["resources"].keys(), name
            image, _, tag = container["image"].rpartition(":")
            assert image, f"{name}: {container['image']} has no tag"
            assert tag != "latest", name


@pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS], ids=lambda path: path.name)
def test_every_cluster_asks_for_the_token(directory: Path) -> None:
    clusters = [cluster_of(resource) for resource in built(directory) if resource["kind"] in SPECS]
    assert clusters
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token", "secretName": "embedlib-token"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_references_lead_somewhere(overlay: Path) -> None:
    resources = built(overlay)
    known = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    namespaces = {resource["metadata"].get("namespace") for resource in resources if resource["kind"] != "Namespace"}
    assert {name for kind, name in known if kind == "Namespace"} == namespaces - {None}
    # Jobs are applied beside the overlay and live on what it brings.
    for name, template in pods([*resources, *(each for directory in JOBS for each in built(directory))]):
        spec = template["spec"]
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in known, name
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for volume in spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in known, name
            if secret := volume.get("secret"):
                assert secret["secretName"] in SECRETS, name
        for container in spec["containers"]:
            ours = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert ours <= volumes | ({"data"} if name.startswith("redis") else set()), name
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in known, name
                else:
                    assert source["secretRef"]["name"] in SECRETS, name


def test_the_readmes_steps_make_the_secrets(tmp_path: Path) -> None:
    """Run as they stand there, but for the last word: no cluster is asked."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl (Debian 13 has a package): the README's steps are not run")
    steps = [
        line
        for block in re.findall(r"```bash\n(.*?)```", (CLUSTER / "README.md").read_text(), flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if "create secret" in line or "serve.auth" in line
    ]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "storage.env").write_text("AWS_ACCESS_KEY_ID=any\nAWS_SECRET_ACCESS_KEY=any\n")
    made: dict[str, dict[str, bytes]] = {}
    for step in steps:
        command = f"{step.split('#')[0].rstrip()} --dry-run=client -o yaml" if "create secret" in step else step
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (step, done.stderr)
        if "create secret" in step:
            secret = yaml.safe_load(done.stdout)
            made[secret["metadata"]["name"]] = {key: b64decode(value) for key, value in secret["data"].items()}
            assert secret["metadata"]["namespace"] == "embedlib"
    assert {name: secret.keys() for name, secret in made.items()} == SECRETS
    for name, key in (("embedlib-token", "auth_token"), ("embedlib-redis", "password")):
        assert re.fullmatch(rb"[0-9a-f]{64}", made[name][key]), "32 random bytes and nothing behind them"
    keys = json.loads(made["embedlib-keys"]["keys.json"])
    assert [key["name"] for key in keys] == ["alice", "prometheus"]
    assert keys[1]["sha256"] == hash_key(made["embedlib-metrics"]["key"].decode()), "Prometheus sends another key"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_endpoints_keys_are_a_secret_that_its_pods_read(overlay: Path) -> None:
    (service,) = of_kind(built(overlay), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    folder, _, name = application["args"]["keys"].rpartition("/")
    for group in cluster_of(service)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        (mount,) = [each for each in spec["containers"][0]["volumeMounts"] if each["mountPath"] == folder]
        assert mount["readOnly"] is True
        (volume,) = [each for each in spec["volumes"] if each["name"] == mount["name"]]
        assert name in SECRETS[volume["secret"]["secretName"]]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_policies_and_budgets_select_pods_that_exist(overlay: Path) -> None:
    resources = built(overlay)
    # KubeRay labels its pods by itself, and the pods of the endpoint while they answer.
    own = {"ray.io/serve": {"true"}, "ray.io/node-type": {"head", "worker"}}
    labels: dict[str, set[str]] = {key: set(values) for key, values in own.items()}
    for _, template in pods([*resources, *built(JOBS[0])]):
        for key, value in template["metadata"]["labels"].items():
            labels.setdefault(key, set()).add(value)
    selectors = [each["spec"]["selector"] for each in of_kind(resources, "PodDisruptionBudget")]
    for policy in of_kind(resources, "NetworkPolicy"):
        selectors.append(policy["spec"]["podSelector"])
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            peers = [*rule.get("from", []), *rule.get("to", [])]
            selectors += [peer["podSelector"] for peer in peers if "podSelector" in peer]
    wanted = [pair for selector in selectors for pair in selector.get("matchLabels", {}).items()]
    assert len(wanted) > 8
    assert all(value in labels.get(key, set()) for key, value in wanted), (wanted, labels)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_nothing_reaches_the_namespace_but_what_is_named(overlay: Path) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(built(overlay), "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{name} lets in everybody"
            outside = [peer for peer in rule["from"] if "namespaceSelector" in peer]
            assert not outside or rule.get("ports"), f"{name} opens all ports to another namespace"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_endpoint_is_what_ray_serve_and_its_builder_take(overlay: Path) -> None:
    (service,) = of_kind(built(overlay), "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.app:build_app"
    app = AppConfig.model_validate(application.args)
    assert app.keys, "an endpoint that others reach has keys"
    (group,) = cluster_of(service)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert config["http_options"]["port"] in [port["containerPort"] for port in container["ports"]]
    assert container["readinessProbe"]["exec"]["command"][1].endswith("/-/healthz")
    (head,) = cluster_of(service)["headGroupSpec"]["template"]["spec"]["containers"]
    # BuildServeService of KubeRay looks nowhere else, and makes no service where it finds none.
    assert {"name": "serve", "containerPort": config["http_options"]["port"]} in head["ports"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_replicas_fill_the_pods_that_are_kept_and_find_room_in_those_that_may_come(overlay: Path) -> None:
    (service,) = of_kind(built(overlay), "RayService")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    app = AppConfig.model_validate(application.args)
    (gateway,) = application.deployments
    assert gateway.name == NAME
    gateways = app.gateways * np.array([gateway.ray_actor_options.num_cpus, 0])
    assert gateways[0] > 0, "what needs no CPU may be put on the head, which has none"
    least, most = (
        gateways + sum(getattr(model, bound) * resources_of(model) for model in app.models.values())
        for bound in ("min_replicas", "max_replicas")
    )
    (group,) = cluster_of(service)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    pod = np.array([float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))])
    # The dearest that a pod has is used up by the replicas that stay: no pod is kept for nothing.
    scarce = 1 if pod[1] else 0
    assert group["replicas"] == group["minReplicas"]
    assert least[scarce] == group["minReplicas"] * pod[scarce]
    assert all(least <= group["minReplicas"] * pod)
    assert all(model.min_replicas >= group["minReplicas"] for model in app.models.values()), "a pod without this model"
    # With as many replicas as there may be, one of a new version still finds room, and then takes an old one's place.
    assert all(most + pod <= group["maxReplicas"] * pod)
    assert most[scarce] > (group["maxReplicas"] - 2) * pod[scarce], "pods that nobody can ask for"
    budgets = {each["metadata"]["name"]: each["spec"] for each in of_kind(built(overlay), "PodDisruptionBudget")}
    if endpoint := budgets.get("embedlib-endpoint"):
        assert endpoint["minAvailable"] < group["minReplicas"], "no node could ever be drained"


def resources_of(model: ModelConfig) -> Any:
    """(2,) CPUs and GPUs of a replica."""
    return np.array([model.num_cpus, model.num_gpus])


@pytest.mark.parametrize("directory", [*OVERLAYS, *JOBS], ids=lambda path: path.name)
def test_nodes_say_what_they_are_for(directory: Path) -> None:
    for resource in built(directory):
        if resource["kind"] in SPECS:
            cluster = cluster_of(resource)
            assert cluster["headGroupSpec"]["labels"] == {"role": "head"}
            for group in cluster["workerGroupSpecs"]:
                role, _, market = group["groupName"].partition("-")
                assert group["labels"] == {"role": role} | ({"market": market} if market else {})


@pytest.mark.parametrize("directory", JOBS, ids=lambda path: path.name)
def test_every_job_has_values_that_it_takes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = of_kind(built(directory), "RayJob")
    assert job["metadata"]["name"] == f"embedlib-{directory.name}"
    assert job["spec"]["backoffLimit"] > 0
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, script) == ("python", f"jobs/{directory.name}.py")
    monkeypatch.chdir(REPOSITORY)
    read_config(CONFIGS[directory.name], arguments)
    with pytest.raises((Exception, SystemExit)):
        read_config(CONFIGS[directory.name], [*arguments, "--no_such_key", "1"])


def test_a_job_runs_beside_the_dev_overlay_and_is_no_larger() -> None:
    (job,) = built(DEV_JOB)
    jsonschema.validate(job["spec"], SPECS["RayJob"])
    (cluster,) = of_kind(built(OVERLAYS[0]), "RayCluster")
    assert job["metadata"]["namespace"] == cluster["metadata"]["namespace"]
    mine, theirs = templates_of(job), templates_of(cluster)
    assert mine.keys() - theirs.keys() == {"submitter"}
    for name, template in theirs.items():
        (container,), (other,) = mine[name]["spec"]["containers"], template["spec"]["containers"]
        assert (container["resources"], container["image"]) == (other["resources"], other["image"]), name


def test_every_job_has_a_resource() -> None:
    jobs = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")} - NO_JOBS
    assert jobs == {path.name for path in JOBS} == set(CONFIGS)


METADATA = ("169.254.169.254/32", "169.254.169.252/32")


def test_components_apply(tmp_path: Path) -> None:
    """Those that no overlay here takes, too. Google's identity alone needs the metadata service."""
    for name in ("kuberay", "monitoring"):
        shutil.copytree(CLUSTER / name, tmp_path / name)
    for name, expected in (("nfs", "nfs.example.com"), ("gcs", "iam.gke.io/gcp-service-account"), ("s3", "role-arn")):
        directory = tmp_path / "kuberay" / "overlays" / f"test-{name}"
        directory.mkdir()
        (directory / "kustomization.yaml").write_text(
            f"namespace: embedlib\nresources: [../../base]\ncomponents: [../../components/{name}]\n"
        )
        resources = built(directory)
        assert expected in yaml.safe_dump(resources)
        opened = {
            (peer["ipBlock"]["cidr"], port["port"])
            for policy in of_kind(resources, "NetworkPolicy")
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
            for port in rule.get("ports", [])
            if "ipBlock" in peer
        }
        assert {each for each in opened if each[0] in METADATA} == (
            {("169.254.169.254/32", 80), ("169.254.169.252/32", 988)} if name == "gcs" else set()
        )
        for policy in of_kind(resources, "NetworkPolicy"):
            assert policy["metadata"]["namespace"] == "embedlib"
            kubernetes_validate.validate(policy, "1.32", strict=True)
