"""What a run tells of itself while it goes on: lines, Ray's Prometheus endpoint, TensorBoard, a note beside its output.

    EMBEDLIB_LOG=json            every line as JSON, with the ids of run and job
    EMBEDLIB_TENSORBOARD=DIR     scalars below DIR, a directory a run

These are variables of the environment and no options of a job, because they decide nothing of what is made.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge

from embedlib.errors import ArtifactError
from embedlib.storage import Store
from jobs.runtime import Progress

NOTE = ".run.json"
"""In the directory of what is made: how far its run is. `jobs/status.py` reads it."""
NOTE_EVERY_S = 5.0
MAX_RUN_ID = 12

GAUGES = {
    "progress": "Share of the run that is done.",
    "seconds_left": "Time that is left at the rate so far.",
    "loss": "Mean loss since the record before.",
    "validation": "The latest validation; higher is better.",
    "tokens_per_second": "Tokens of texts, padding excluded, that all processes of the run compute a second.",
    "recall": "Share of the true ten nearest rows that an approximate index finds.",
}
COUNTERS = {
    "steps": "Steps, texts or blocks done.",
    "reused": "Steps, texts or blocks that were found done by an earlier run.",
}
# Not `job`: Prometheus calls by that name where it has scraped them.
LABELS = ("task", "run")


class Instruments(NamedTuple):
    """What this process exports; Ray's endpoint calls them `ray_embedlib_job_<name>`."""

    gauges: dict[str, Gauge]
    counters: dict[str, Counter]


@lru_cache(maxsize=1)
def instruments() -> Instruments:
    """One of each in this process."""
    return Instruments(
        {name: Gauge(f"embedlib_job_{name}", text, LABELS) for name, text in GAUGES.items()},
        {name: Counter(f"embedlib_job_{name}", text, LABELS) for name, text in COUNTERS.items()},
    )


class RunReport:
    """How far one run of a job is, told in every way that was asked for."""

    def __init__(self, job: str, mark: str, directory: Store, total: int, unit: str) -> None:
        """`mark`: fingerprint of what is made, whose beginning is the run's id and stays when it is resumed."""
        self.job, self.run, self.directory = job, mark[:MAX_RUN_ID], directory
        self.total, self.unit = total, unit
        self.progress = Progress(job, total, unit)
        self.tags = {"task": job, "run": self.run}
        self.done: int | None = None
        self.noted = 0.0
        self.scalars = scalar_writer(job, self.run)

    def update(self, done: int, note: str = "", values: Mapping[str, float] | None = None) -> None:
        """Say that `done` of the total are done, and what was measured on the way, by names of GAUGES.

        The first call says what an earlier run had done.
        """
        gauges, counters = instruments()
        if done > (self.done or 0):
            counters["reused" if self.done is None else "steps"].inc(done - (self.done or 0), self.tags)
        self.done = done
        line = self.progress.line(done, note)
        measured = {"progress": done / max(self.total, 1), "seconds_left": self.progress.seconds_left(done)}
        measured |= values or {}
        for name, value in measured.items():
            if value is not None:
                gauges[name].set(value, self.tags)
                if self.scalars:
                    self.scalars.add_scalar(name, value, done)
        if line:
            print(json.dumps(self.record(measured)) if os.environ.get("EMBEDLIB_LOG") == "json" else line, flush=True)
        self.write_note(measured)

    def record(self, measured: Mapping[str, float | None]) -> dict[str, Any]:
        """A line of the log for machines."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "job": self.job,
            "run": self.run,
            "ray_job": ray.get_runtime_context().get_job_id(),
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            **measured,
        }

    def write_note(self, measured: Mapping[str, float | None]) -> None:
        """Leave word in the directory, now and then and at the end."""
        now = time.monotonic()
        if now - self.noted < NOTE_EVERY_S and self.done != self.total:
            return
        self.noted = now
        with suppress(ArtifactError):  # a full disk is for those to tell who write what matters
            (self.directory / NOTE).write_json(self.record(measured))


def scalar_writer(job: str, run: str) -> Any:
    """TensorBoard's writer of a run, where one was asked for."""
    if not (directory := os.environ.get("EMBEDLIB_TENSORBOARD")):
        return None
    from tensorboardX import SummaryWriter  # not above: few runs want it

    return SummaryWriter(str(Path(directory) / f"{job}-{run}"), flush_secs=10)
