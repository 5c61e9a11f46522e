"""Trials of the fault suite, and what decides them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.conftest import REPOSITORY
from tests.faults.draw import OF_ENDPOINT, OF_JOBS, Drawn, draw
from tests.faults.machines import Namespaces
from tests.faults.report import RESULTS, summary
from tests.faults.run import FAULTS, Driven, Effect, Plan
from tests.faults.work import JOBS, lost_rows, lost_vectors
from tests.jobs.processes import wait_for

RUN_S = 900


@pytest.fixture
def folder(drawn: Drawn, tmp_path: Path) -> Iterator[Path]:
    """Where a run works; where a disk gets full, one of its own."""
    output = tmp_path / "output"
    output.mkdir()
    full = "disk" in faults_of(drawn)
    if full:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(output)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small disk: a full disk is not tried")
    yield tmp_path
    if full:
        subprocess.run(["umount", "--lazy", output], check=True)


def faults_of(drawn: Drawn) -> list[str]:
    """What strikes a run."""
    return [strike.fault for strike in drawn.strikes]


@pytest.mark.timeout(RUN_S + 700)
def test_run(drawn: Drawn, folder: Path, files: dict[str, str], undisturbed: Callable[[str], Path]) -> None:
    if "gcs" in faults_of(drawn) and not shutil.which("redis-server"):
        pytest.skip("no redis-server: a killed GCS is not tried")
    if "network" in faults_of(drawn) and not Namespaces.available():
        pytest.skip("no network namespaces for this user: a cut link is not tried")
    plan = Plan(*drawn, folder=str(folder), undisturbed=str(undisturbed(drawn.job)), files=files)
    (folder / "run.json").write_text(json.dumps(plan._asdict()))
    command = [sys.executable, "-m", "tests.faults.run", str(folder / "run.json")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | RAY
    # A run that hangs or breaks off has lost what it was to make.
    unknown = {"struck": "unknown", "faults": 1, "recovery_s": None, "reruns": 0}
    result: dict[str, Any] = {"run": drawn.number, "job": drawn.job, "nodes": drawn.nodes, "losses": 1}
    result |= {"trials": [strike._asdict() | unknown for strike in drawn.strikes]}
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=RUN_S)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
        result = json.loads(lines[-1]) if lines else result | {"error": done.stderr[-3000:]}
    except subprocess.TimeoutExpired:
        result["error"] = f"not done after {RUN_S} s"
    print(result)
    RESULTS.append(result)
    assert result["losses"] == 0, result


RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node that says nothing is given up after 6 s instead of 30.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
}


def test_a_seed_stands_for_its_trials_and_covers_all_pairs() -> None:
    pairs = [(job, fault) for job in JOBS for fault in OF_JOBS] + [("serve", fault) for fault in OF_ENDPOINT]

    def drawn(runs: list[Drawn]) -> list[tuple[str, str]]:
        return [(run.job, fault) for run in runs for fault in faults_of(run)]

    runs = draw(2 * len(pairs), 7, set(), set())
    assert runs == draw(2 * len(pairs), 7, set(), set())
    assert runs != draw(2 * len(pairs), 8, set(), set())
    assert sorted(drawn(runs)) == sorted(2 * pairs)
    assert set(OF_JOBS) == set(FAULTS)
    assert not any({"gcs", "network"} <= set(faults_of(run)) for run in runs), "a cluster is of one kind"
    assert all(run.strikes == tuple(sorted(run.strikes, key=lambda strike: strike.moment)) for run in runs)
    assert drawn(draw(3, 0, {"mine"}, {"gcs"})) == [("mine", "gcs")] * 3
    assert len(drawn(draw(5, 0, set(), set()))) == 5
    with pytest.raises(ValueError, match="--faults: 'fire'"):
        draw(1, 0, set(), {"fire"})
    with pytest.raises(ValueError, match=r"\['driver'\] do not strike \['serve'\]"):
        draw(1, 0, {"serve"}, {"driver"})


def test_what_was_done_when_the_fault_had_its_effect_is_no_recovery() -> None:
    """Between a decision to strike and its effect lie seconds, in which pieces are done as ever."""
    counted = iter([4, 4, 4, 5])
    effect = Effect(lambda: next(counted))
    effect.landed()
    wait_for(lambda: effect.seconds is not None, "the fifth piece", 10)
    assert list(counted) == [], "a piece that was there already counted"


def test_a_driver_is_started_again_when_the_fault_is_over() -> None:
    ends = iter(["exit 1", "exit 0"])
    driven = Driven(lambda: subprocess.Popen(["sh", "-c", f"sleep 0.2; {next(ends)}"]))
    with driven.fault():
        driven.drivers[0].wait()
        time.sleep(0.2)
        assert len(driven.drivers) == 1
    driven.runner.join(10)
    assert driven.over
    assert [driver.returncode for driver in driven.drivers] == [1, 0]


def test_distillations_are_struck_in_both_of_their_long_stages() -> None:
    moments = {strike.moment for run in draw(60, 0, {"distill"}, set()) for strike in run.strikes}
    parts = 12
    assert min(moments) < parts < max(moments) <= JOBS["distill"].latest


def test_what_is_lost_doubled_or_changed_is_counted(tmp_path: Path) -> None:
    def write(name: str, ids: list[int], value: float = 1.0) -> Path:
        (tmp_path / name).mkdir()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array([value] * 2 * len(ids), pa.float32()), 2)
        pq.write_table(pa.table({"id": ids, "vector": vectors}), tmp_path / name / "part-000000.parquet")
        return tmp_path / name

    whole = write("whole", [1, 2, 3])
    assert lost_vectors(whole, write("turned", [3, 2, 1])) == 0
    assert lost_vectors(whole, write("short", [1, 2])) == 1
    assert lost_vectors(whole, write("twice", [1, 2, 2, 3, 3])) == 2
    assert lost_vectors(whole, write("other", [1, 2, 3], 2.0)) == 3
    assert lost_rows(whole, whole) == 0
    assert lost_rows(whole, tmp_path / "short") == 2  # one row less, and one that is missing
    assert lost_rows(whole, tmp_path / "other") == 3


def test_what_trials_add_is_what_the_session_reports(request: pytest.FixtureRequest) -> None:
    reporters = [each for each in request.config.pluginmanager.get_plugins() if hasattr(each, "pytest_addoption")]
    (faults,) = [each for each in reporters if (getattr(each, "__file__", "") or "").endswith("faults/conftest.py")]
    assert faults.RESULTS is RESULTS


def test_the_report_adds_up() -> None:
    def trial(fault: str, recovery_s: float | None, **values: object) -> dict[str, Any]:
        return {
            "fault": fault,
            "moment": 1,
            "struck": "it",
            "faults": 1,
            "recovery_s": recovery_s,
            "reruns": 0,
        } | values

    calm = {"run": 0, "job": "embed", "nodes": 2, "losses": 0}
    report = summary(
        [
            calm | {"trials": [trial("node", 3.0, reruns=1), trial("slow", None)]},
            calm | {"run": 1, "losses": 4, "trials": [trial("node", 9.0), trial("disk", None, faults=0)]},
        ]
    )
    assert (report["trials"], report["losses"]) == (3, 4)
    assert report["recovery_s"] == {"median": 6.0, "max": 9.0}
    assert report["by_job"]["embed"] == {
        "trials": 3,
        "losses": 4,
        "reruns": 1,
        "recovery_s": {"median": 6.0, "max": 9.0},
    }
    assert report["by_fault"]["node"] == report["by_job"]["embed"] | {"trials": 2}
    assert report["by_fault"]["slow"]["recovery_s"] is None
    assert "disk" not in report["by_fault"], "what struck nobody was no trial"
