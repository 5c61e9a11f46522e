"""cluster/local.sh as the README has it: start, submit, stop, on 127.0.0.1 alone, with the token for its user alone."""

import subprocess
import time
from pathlib import Path

import httpx2
import pytest

from tests.cluster.conftest import CLUSTER, REPOSITORY, Started, pids_below

pytestmark = pytest.mark.ray


def listening(home: str) -> dict[str, str]:
    """Process by address on which the cluster's processes wait for connections."""
    listing = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = {f"pid={pid}," for pid in pids_below(home)}
    rows = [line.split() for line in listing.splitlines() if any(pid in line for pid in ours)]
    return {row[3]: row[5] for row in rows}


def test_a_job_runs_as_the_readme_has_it(local_cluster: Started) -> None:
    done = local_cluster.run("ray", "job", "submit", "--", "python", "jobs/distill.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--distillation.epochs int" in done.stdout
    readme = (REPOSITORY / "README.md").read_text()
    assert "cluster/local.sh start && ray job submit -- python jobs/distill.py && cluster/local.sh stop" in readme


def test_all_of_it_listens_on_loopback(local_cluster: Started) -> None:
    found = listening(local_cluster.environment["HOME"])
    assert len(found) > 5
    assert any("gcs_server" in process for process in found.values())
    assert {address.rsplit(":", 1)[0] for address in found} <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}


def test_the_token_is_its_users_alone(local_cluster: Started) -> None:
    token = Path(local_cluster.environment["HOME"]) / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    jobs = f"{local_cluster.address}/api/jobs/"
    assert httpx2.get(jobs).status_code == 401
    answer = httpx2.get(jobs, headers={"Authorization": f"Bearer {token.read_text()}"})
    assert answer.status_code == 200
    assert isinstance(answer.json(), list)


def test_a_second_start_is_refused_and_harms_nothing(local_cluster: Started) -> None:
    refused = local_cluster.run(str(CLUSTER / "local.sh"), "start")
    assert refused.returncode == 1
    assert f"runs at {local_cluster.address} already" in refused.stderr
    assert local_cluster.run("ray", "job", "list").returncode == 0


def test_the_probes_of_pods_tell_the_well_from_the_dead(local_cluster: Started) -> None:
    probe = str(CLUSTER / "healthcheck")
    assert local_cluster.run(probe, f"{local_cluster.address}/api/gcs_healthz").returncode == 0
    dead = local_cluster.run(probe, "http://127.0.0.1:9/api/gcs_healthz")
    assert dead.returncode == 1
    assert "127.0.0.1:9" in dead.stderr


def test_stop_ends_its_own_cluster_and_no_other(local_cluster: Started, tmp_path: Path) -> None:
    other = local_cluster.environment | {"HOME": str(tmp_path)}
    nothing = subprocess.run([CLUSTER / "local.sh", "stop"], env=other, capture_output=True, text=True)
    assert nothing.returncode == 1
    assert "No cluster" in nothing.stderr
    # A note of a process that is none of ours, as after a restart of the machine.
    bystander = subprocess.Popen(["sleep", "60"])
    (tmp_path / ".ray" / "embedlib-local").mkdir(parents=True)
    (tmp_path / ".ray" / "embedlib-local" / "pid").write_text(str(bystander.pid))
    assert subprocess.run([CLUSTER / "local.sh", "stop"], env=other, capture_output=True).returncode == 1
    time.sleep(0.5)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert local_cluster.run("ray", "job", "list").returncode == 0


def test_the_script_is_clean() -> None:
    subprocess.run(["shellcheck", CLUSTER / "local.sh"], check=True)
