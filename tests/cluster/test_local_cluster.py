"""cluster/local.sh as the README has it: start, submit, stop, on 127.0.0.1 alone, with the token for its user alone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.cluster.conftest import CLUSTER, REPOSITORY, Started, pids_below
from tests.faults.machines import Namespaces, ip
from tests.faults.work import distil_values, vocabulary_of
from tests.jobs.processes import wait_for

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


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_readmes_words_in_a_clean_environment(tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Its block of start, submit and stop, with a tiny run file behind the job and this environment for `.venv`.

    In a network namespace of its own, where port 8265 is free, whoever else has a cluster on this machine.
    """
    if not Namespaces.available():
        pytest.skip("no network namespaces for this user: port 8265 may be another cluster's")
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "cluster/local.sh start" in block]
    output = tmp_path / "output"
    files = {
        "model": str(tiny_encoder),
        "many_sentences": str(tiny_corpus),
        "vocabulary": str(vocabulary_of(tiny_encoder)),
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(distil_values(files, output)))
    words = {
        "make .venv/.demo && source .venv/bin/activate": f"source {sys.prefix}/bin/activate",
        "python jobs/distill.py": f"python jobs/distill.py {tmp_path}/tiny.yaml",
    }
    for old, new in words.items():
        assert block.count(old) == 1
        block = block.replace(old, new)
    space, home = f"emb{os.getpid()}-readme", tmp_path / "home"
    home.mkdir()
    clean = ["ip", "netns", "exec", space, "env", "-i", f"HOME={home}", "PATH=/usr/bin:/bin"]
    ip("netns", "add", space)
    try:
        ip("-n", space, "link", "set", "lo", "up")
        run = subprocess.run(
            [*clean, "bash", "-euo", "pipefail", "-c", block],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert (output / "student" / "model.safetensors").exists()
        assert (output / "report.html").exists()
        assert not (home / ".ray" / "embedlib-local").exists()
        wait_for(lambda: not pids_below(str(home)), "the end of what `stop` stopped", 60)
    finally:
        for pid in pids_below(str(home)):
            os.kill(pid, signal.SIGKILL)
        ip("netns", "del", space)


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
