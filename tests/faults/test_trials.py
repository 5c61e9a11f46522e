"""Trials of the fault suite, and what decides them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.conftest import REPOSITORY
from tests.faults.draw import OF_ENDPOINT, OF_JOBS, Drawn, draw
from tests.faults.machines import Namespaces
from tests.faults.report import RESULTS, summary
from tests.faults.trial import FAULTS, Plan, seconds_to_recover
from tests.faults.work import JOBS, lost_rows, lost_vectors

TRIAL_S = 400


@pytest.fixture
def folder(drawn: Drawn, tmp_path: Path) -> Path:
    """Where a trial works; where a disk gets full, one of its own."""
    if drawn.fault == "disk":
        (tmp_path / "output").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path / "output")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small disk: a full disk is not tried")
    return tmp_path


@pytest.mark.timeout(TRIAL_S + 700)
def test_trial(drawn: Drawn, folder: Path, files: dict[str, str], undisturbed: Callable[[str], Path]) -> None:
    if drawn.fault == "gcs" and not shutil.which("redis-server"):
        pytest.skip("no redis-server: a killed GCS is not tried")
    if drawn.fault == "network" and not Namespaces.available():
        pytest.skip("no network namespaces for this user: a cut link is not tried")
    plan = Plan(*drawn, folder=str(folder), undisturbed=str(undisturbed(drawn.job)), files=files)
    (folder / "trial.json").write_text(json.dumps(plan._asdict()))
    command = [sys.executable, "-m", "tests.faults.trial", str(folder / "trial.json")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | RAY
    # A trial that hangs or breaks off has lost what it was to make.
    result = {"trial": drawn.number, "job": drawn.job, "fault": drawn.fault, "nodes": drawn.nodes, "runs": 1}
    result |= {"struck": "unknown", "faults": 1, "losses": 1, "recovery_s": None}
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TRIAL_S)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"trial"')]
        result = json.loads(lines[-1]) if lines else result | {"error": done.stderr[-3000:]}
    except subprocess.TimeoutExpired:
        result["error"] = f"not done after {TRIAL_S} s"
    finally:
        if drawn.fault == "disk":
            subprocess.run(["umount", "--lazy", folder / "output"], check=True)
    print(result)
    if not (result["faults"] or result["losses"]):
        pytest.skip(f"{result['struck']}: no fault, so no trial")
    RESULTS.append(result)
    assert result["losses"] == 0, result


RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    # A node that says nothing is given up after 6 s instead of 30.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
}


def test_a_seed_stands_for_its_trials_and_covers_all_pairs() -> None:
    pairs = len(JOBS) * len(OF_JOBS) + len(OF_ENDPOINT)
    plans = draw(2 * pairs, 7, set(), set())
    assert plans == draw(2 * pairs, 7, set(), set())
    assert plans != draw(2 * pairs, 8, set(), set())
    first = {(plan.job, plan.fault) for plan in plans[:pairs]}
    assert len(first) == pairs
    assert {fault for _, fault in first} == set(FAULTS)
    assert {plan.job for plan in draw(5, 0, {"mine"}, {"node"})} == {"mine"}
    with pytest.raises(ValueError, match="--faults: 'fire'"):
        draw(1, 0, set(), {"fire"})


def test_what_was_done_when_the_fault_had_its_effect_is_no_recovery(tmp_path: Path) -> None:
    """Between a decision to strike and its effect lie seconds, in which pieces are done as ever."""
    counted = iter([3, 4, 4, 5])
    work = JOBS["embed"]._replace(progress=lambda _: next(counted))
    assert seconds_to_recover(work, tmp_path, [(time.monotonic(), 4)]) > 0
    assert list(counted) == [], "a piece that was there already counted"


def test_distillations_are_struck_in_both_of_their_long_stages() -> None:
    moments = {plan.moment for plan in draw(60, 0, {"distill"}, set())}
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
    trial = {"trial": 0, "job": "embed", "fault": "node", "faults": 1, "losses": 0, "runs": 2, "recovery_s": 3.0}
    report = summary([trial, trial | {"fault": "slow", "recovery_s": None}, trial | {"losses": 4, "recovery_s": 9.0}])
    assert (report["trials"], report["faults"], report["losses"]) == (3, 3, 4)
    assert report["recovery_s"] == {"median": 6.0, "max": 9.0}
    assert report["by_fault"]["node"] == {
        "trials": 2,
        "faults": 2,
        "losses": 4,
        "reruns": 2,
        "recovery_s": {"median": 6.0, "max": 9.0},
    }
    assert report["by_fault"]["slow"]["recovery_s"] is None
