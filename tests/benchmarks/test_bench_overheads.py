"""The model of many GPUs reckons with what was measured, and is checked at points that it has not seen."""

from pathlib import Path

import pytest

from benchmarks.overheads import (
    BATCH,
    GPUS,
    Link,
    Scheduling,
    Step,
    checked,
    checked_parts,
    embed_efficiency,
    hardware_of,
    modelled,
    sent,
)
from benchmarks.sizing import Constants

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_a_gpu_has_the_rates_that_were_measured() -> None:
    given = Constants.read()
    h100, l4 = hardware_of(given)
    assert h100.texts_per_s == pytest.approx(63_216)
    # docs/benchmarks.md: "A step took 68 ms", in batches of 1,024.
    assert h100.step_s == pytest.approx(0.068, rel=0.01)
    assert f"distillation, MSE + Gram, batches of {BATCH:,}" in (DOCS / "benchmarks.md").read_text()
    slower = given.gpu(given.machines["L4"])
    assert l4.texts_per_s / h100.texts_per_s == pytest.approx(slower)
    assert h100.step_s / l4.step_s == pytest.approx(slower)


def test_a_driver_that_is_slower_than_all_gpus_is_what_is_waited_for() -> None:
    h100, _ = hardware_of(Constants.read())
    quickest_s = 32_768 / h100.texts_per_s / 64
    assert embed_efficiency(h100, 64, quickest_s) == pytest.approx(1.0)
    assert embed_efficiency(h100, 64, 4 * quickest_s) == pytest.approx(0.25)
    rows = modelled([Scheduling(1, 0.001, 4 * quickest_s, 100.0)])
    assert [row["gpus"] for row in rows] == [*GPUS, *GPUS]
    assert rows[1]["embed"] == pytest.approx(0.25)


def test_the_most_workers_time_for_a_part_is_told_from_the_fewer() -> None:
    measured = {8: 0.04, 1: 0.01, 4: 0.03, 2: 0.02}
    points = [Scheduling(workers, 0.001, part_s, 100.0) for workers, part_s in measured.items()]
    checks = checked_parts(points)
    assert [each.workers for each in checks] == [1, 2, 4, 8]
    assert [each.modelled_s for each in checks] == [0.03] * 4
    assert [each.is_predicted for each in checks] == [False, False, False, True]
    assert [each.is_predicted for each in checked_parts(points[:1])] == [False]


def test_the_most_workers_exchange_is_told_from_the_fewer() -> None:
    link = Link(bytes_per_s=1e9, latency_s=1e-3, is_shared=True)
    steps = [Step(workers, 0.1, 0.0, 4_000_000, 1_000) for workers in (1, 2, 4, 8)]
    steps = [step._replace(reduce_s=link.seconds(step.workers, sent(step))) for step in steps]
    found, checks = checked(steps)
    assert found.bytes_per_s == pytest.approx(1e9)
    assert [each.is_predicted for each in checks] == [False, False, True]
    assert all(each.modelled_s == pytest.approx(each.measured_s) for each in checks)
