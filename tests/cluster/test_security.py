"""Who has no token and no key gets nothing, tried from another network namespace, where no loopback address helps.

The cluster listens on the address of a cable between two namespaces that this test makes, as one of several machines
would listen on its network: dashboard, job API, GCS and the endpoint. In the other namespace somebody tries each
without the token, with a wrong one, and with the right one, to show that it is the token that decides.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.faults.machines import Namespaces, ip
from tests.jobs.processes import kill_tree, wait_for

pytestmark = pytest.mark.ray
HOST, VISITOR = "10.99.1.1", "10.99.1.2"
GCS, DASHBOARD, ENDPOINT, METRICS = 6379, 8265, 8000, 8080
TOKEN = "a-token-of-this-test-alone-0123456789abcdef"  # noqa: S105
WRONG = "another-token-of-the-same-length-0123456789"


class Network(NamedTuple):
    """Two namespaces and a cable."""

    host: str
    visitor: str
    folder: Path

    def run(
        self, space: str, *command: str, timeout_s: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a namespace, with nothing of Ray in its environment but what is given."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"HOME": str(self.folder / space), "PYTHONPATH": str(REPOSITORY)} | variables
        return subprocess.run(
            ["ip", "netns", "exec", space, *command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if not Namespaces.available():
        pytest.skip("NO NETWORK NAMESPACES for this user: that strangers are refused is not tested")
    name = f"emb{os.getpid() % 100000}"
    made = Network(f"{name}-host", f"{name}-visitor", tmp_path_factory.mktemp("network"))
    for space in (made.host, made.visitor):
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        (made.folder / space).mkdir()
    ip("-n", made.host, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", made.visitor)
    for space, address in ((made.host, HOST), (made.visitor, VISITOR)):
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
    try:
        yield made
    finally:
        for space in (made.host, made.visitor):
            subprocess.run(["ip", "netns", "del", space], check=True)


@pytest.fixture(scope="module")
def cluster(network: Network, tiny_encoder: Path) -> Iterator[Network]:
    """Ray and the endpoint on the host's side, for the network to see."""
    keys = network.folder / "keys.json"
    made = network.run(network.host, sys.executable, "-m", "serve.auth", str(keys), "alice")
    assert made.returncode == 0, made.stderr
    (network.folder / "key").write_text(made.stdout.split()[-1])
    ray = str(Path(sys.executable).parent / "ray")
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(REPOSITORY)}
    environment |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_worker_niceness": "0"}
    environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serve.proxy:middlewares"
    environment.pop("RAY_ADDRESS", None)
    command = ["ip", "netns", "exec", network.host, ray, "start", "--head", "--block", "--num-cpus", "4"]
    command += ["--node-ip-address", HOST, "--port", str(GCS), "--dashboard-host", HOST]
    command += ["--metrics-export-port", str(METRICS)]
    head = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": f"http://{HOST}:{DASHBOARD}"}
        wait_for(lambda: network.run(network.host, ray, "job", "list", **token).returncode == 0, "the dashboard", 90)
        values = {"host": HOST, "port": ENDPOINT, "application": application(tiny_encoder, keys, network.folder)}
        (network.folder / "serve.json").write_text(json.dumps(values))
        token["RAY_ADDRESS"] = f"{HOST}:{GCS}"
        drive = [sys.executable, "-m", "tests.faults.drive", "serve", str(network.folder / "serve.json")]
        deployed = network.run(network.host, *drive, timeout_s=150, **token)
        assert deployed.returncode == 0, deployed.stderr
        yield network
    finally:
        kill_tree(head.pid)
        head.wait()
        time.sleep(1)


def application(model: Path, keys: Path, folder: Path) -> dict[str, Any]:
    replica = {"path": str(model), "backend": "torch-float32", "num_threads": 1}
    return {"keys": str(keys), "models": {"full": replica}, "gateways": 1, "batches": {"directory": str(folder / "b")}}


def asked(network: Network, *curl: str) -> int:
    """The status that the visitor's request gets."""
    done = network.run(network.visitor, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "20", *curl)
    assert done.returncode == 0, f"not even reached: {curl} {done.returncode}"
    return int(done.stdout)


JSON = "Content-Type: application/json"
BEARERS = {"nobody": [], "stranger": ["-H", f"Authorization: Bearer {WRONG}"]}


@pytest.mark.parametrize("bearer", BEARERS.values(), ids=BEARERS)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/jobs/", None),
        ("/api/jobs/", {"entrypoint": "touch /tmp/shadowray"}),
        ("/api/version", None),
        ("/nodes?view=summary", None),
        ("/logical/actors", None),
        ("/api/serve/applications/", None),
        ("/api/v0/logs/file?filename=raylet.out", None),
    ],
    ids=str,
)
def test_dashboard_and_job_api_refuse(
    cluster: Network, bearer: list[str], path: str, body: dict[str, str] | None
) -> None:
    send = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
    assert asked(cluster, *bearer, *send, f"http://{HOST}:{DASHBOARD}{path}") in (401, 403)
    right = ["-H", f"Authorization: Bearer {TOKEN}"]
    if not body:
        assert asked(cluster, *right, f"http://{HOST}:{DASHBOARD}{path}") not in (401, 403)


@pytest.mark.parametrize(
    ("variables", "gets_in"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, True),
    ],
    ids=["nobody", "stranger", "user"],
)
def test_gcs_refuses(cluster: Network, variables: dict[str, str], gets_in: bool) -> None:
    """Joining as a driver is what runs code; a list of the nodes is the least that it begins with."""
    program = (
        f"from ray._raylet import GcsClient; print('in:', len(GcsClient(address='{HOST}:{GCS}').get_all_node_info()))"
    )
    done = cluster.run(cluster.visitor, sys.executable, "-c", program, timeout_s=90, **variables)
    assert ("in: 1" in done.stdout) == gets_in, done.stdout + done.stderr[-500:]
    if not gets_in:
        assert "nauthenticated" in done.stderr or "uthenticat" in done.stderr, done.stderr[-1000:]


@pytest.mark.parametrize("bearer", BEARERS.values(), ids=BEARERS)
@pytest.mark.parametrize(
    ("path", "sent", "answer"),
    [
        ("/v1/embeddings", ["-H", JSON, "-d", '{"model": "full", "input": "a"}'], 200),
        ("/embed", ["-H", JSON, "-d", '{"inputs": "a"}'], 200),
        ("/v1/models", [], 200),
        ("/v1/batches", [], 200),
        ("/v1/files", ["-X", "POST"], 422),  # there is no file in it
    ],
)
def test_the_endpoint_refuses(cluster: Network, bearer: list[str], path: str, sent: list[str], answer: int) -> None:
    assert asked(cluster, *bearer, *sent, f"http://{HOST}:{ENDPOINT}{path}") == 401
    right = ["-H", f"Authorization: Bearer {(cluster.folder / 'key').read_text()}"]
    assert asked(cluster, *right, *sent, f"http://{HOST}:{ENDPOINT}{path}") == answer


def test_what_anybody_may_ask_says_nothing_of_texts(cluster: Network) -> None:
    """Probes and Prometheus have no token; their ports are the network policy's to close."""
    assert asked(cluster, f"http://{HOST}:{DASHBOARD}/api/gcs_healthz") == 200
    assert asked(cluster, f"http://{HOST}:{ENDPOINT}/health") == 200
    assert asked(cluster, f"http://{HOST}:{METRICS}/metrics") == 200
    page = cluster.run(cluster.visitor, "curl", "-s", f"http://{HOST}:{METRICS}/metrics").stdout
    assert TOKEN not in page
    assert not Path("/tmp/shadowray").exists()  # noqa: S108
