"""A cluster that cluster/local.sh started, as a newcomer has it: a fresh HOME and a plain path."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"


class Started(NamedTuple):
    """A running cluster."""

    environment: dict[str, str]
    """What `start` told its user to export, and nothing more than a newcomer has."""
    address: str

    def run(self, *command: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command as its user does."""
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )


@pytest.fixture(scope="session")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    home = tmp_path_factory.mktemp("home")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8"}
    command = [str(CLUSTER / "local.sh"), "start"]
    # Another process of the tests starts one, too, and both would find port 8265 free.
    with FileLock(Path(tempfile.gettempdir()) / "embedlib-local-start.lock"):
        started = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=200)
    assert started.returncode == 0, started.stderr
    told = started.stdout.split("export ")[1].split()
    exported = dict(word.split("=", 1) for word in told)
    try:
        yield Started(environment | exported, exported["RAY_API_SERVER_ADDRESS"])
    finally:
        command = [str(CLUSTER / "local.sh"), "stop"]
        subprocess.run(command, cwd=home, env=environment, check=True, timeout=60)
        assert not list((home / ".ray").glob("embedlib-local"))


def pids_below(home: str) -> list[int]:
    """Processes with this HOME: those of its cluster, its jobs and nobody else's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"HOME={home}".encode() in variables and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found
