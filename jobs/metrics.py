"""What a run tells of itself while it goes on: lines, Ray's Prometheus endpoint, TensorBoard, MLflow, a note beside its
output.

    EMBEDLIB_LOG=json            every line as JSON, with the ids of run and job
    EMBEDLIB_TENSORBOARD=DIR     scalars below DIR, a directory a run
    EMBEDLIB_MLFLOW=URI          configuration and metrics to an MLflow tracking server, or into a directory

These are variables of the environment and no options of a job, because they decide nothing of what is made.
"""

import json
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, Protocol

import ray
from ray.util.metrics import Counter, Gauge

from embedlib.errors import ArtifactError
from embedlib.storage import Store, user_path
from jobs.runtime import format_seconds

NOTE = ".run.json"
"""In the directory of what is made: how far its run is. `jobs/status.py` reads it."""
NOTE_EVERY_S = 10.0
LINE_EVERY_S = 10.0
MAX_RUN_ID = 12
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
"""Of a URI."""

GAUGES = {
    "progress": "Share of the stage that is done.",
    "seconds_left": "Time that is left of the stage at the rate so far.",
    "loss": "Mean loss since the record before.",
    "validation": "The latest validation; higher is better.",
    "tokens_per_second": "Tokens of texts, padding excluded, that all processes of the run compute a second.",
    "padding_waste": "Share of padding in the tokens that models compute; batches laid end to end have none.",
    "cache_hits": "Share of the texts, or of a judge's pairs, not computed: an equal one was, or they were kept.",
    "recall": "Share of the true ten nearest rows that an approximate index finds.",
}
COUNTERS = {
    "steps": "Steps, texts or blocks done.",
    "reused": "Steps, texts or blocks that were found done by an earlier run.",
}
# Not `job`: Prometheus calls by that name where it has scraped them.
LABELS = ("task", "stage", "run")


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


class Board(Protocol):
    """Who keeps scalars of a run."""

    def open(self) -> object:
        """Begin; ConfigError where that is refused. Without it, the first flush begins."""
        ...

    def add_scalar(self, name: str, value: float, step: int) -> object:
        """Take one."""
        ...

    def flush(self) -> object:
        """Put what was taken where others see it."""
        ...

    def close(self) -> object:
        """The run has ended."""
        ...


class RunReport:
    """How far one run of a job is, told in every way that was asked for.

    A run has one stage or several, one after another. While its process lives, it leaves word of it now and then: an
    old note is one of a run that has died.
    """

    def __init__(
        self, job: str, mark: str, directory: Store, config: Mapping[str, Any], tolerant: bool = False
    ) -> None:
        """`mark`: fingerprint of what is made, whose beginning is the run's id and stays when it is resumed.

        `config` is what MLflow is told of it. Nothing is told before the first stage begins. An MLflow or a directory
        for TensorBoard that is away then raises ConfigError; a `tolerant` report takes it as one that goes away later.
        """
        self.job, self.mark, self.directory, self.config, self.tolerant = job, mark, directory, config, tolerant
        self.run = mark[:MAX_RUN_ID]
        self.stage, self.done, self.updated, self.finished = "", 0, 0.0, False
        self.measured: dict[str, float] = {}
        self.boards: list[Board] = []
        self.writing, self.over = Lock(), Event()

    def begin(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """A stage begins, `done` of whose total are done already."""
        is_first = not self.stage
        if is_first:
            self.boards = boards_of(self)
            for board in [] if self.tolerant else self.boards:
                board.open()
        self.stage, self.total, self.unit, self.done, self.measured = stage, total, unit, done, {}
        self.tags = {"task": self.job, "stage": stage, "run": self.run}
        self.progress = Progress(stage, total, unit, done)
        if done:
            instruments().counters["reused"].inc(done, self.tags)
        self.update(done)
        if is_first:
            Thread(target=keep_telling, args=(weakref.ref(self), self.over), daemon=True).start()

    def update(self, done: int, note: str = "", values: Mapping[str, float] | None = None) -> None:
        """Say that `done` of the stage's total are done, and what was measured on the way, by names of GAUGES."""
        if done > self.done:
            instruments().counters["steps"].inc(done - self.done, self.tags)
        line, left = self.progress.line(done, note), self.progress.seconds_left(done)
        self.done, self.updated = done, time.monotonic()
        told = {"progress": done / max(self.total, 1)} | ({} if left is None else {"seconds_left": left})
        told |= values or {}
        self.measure(told)
        if line:
            print(json.dumps(self.record(told)) if os.environ.get("EMBEDLIB_LOG") == "json" else line, flush=True)

    def measure(self, values: Mapping[str, float]) -> None:
        """Say what was measured, by names of GAUGES."""
        self.measured = {**self.measured, **values}
        prefix = "" if self.stage == self.job else f"{self.stage}/"
        for name, value in values.items():
            instruments().gauges[name].set(value, self.tags)
            for board in self.boards:
                board.add_scalar(prefix + name, value, self.done)

    def finish(self) -> None:
        """All is done, though it be less than was thought."""
        if not self.stage:
            return
        self.over.set()
        self.measured = {**self.measured, "progress": 1.0, "seconds_left": 0.0}
        self.finished = True
        with self.writing:
            self.leave_word()
            self.tell_boards(lambda board: board.close())
            self.boards = []

    def record(self, measured: Mapping[str, float]) -> dict[str, Any]:
        """A line of the log for machines."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "job": self.job,
            "stage": self.stage,
            "run": self.run,
            "ray_job": ray.get_runtime_context().get_job_id() if ray.is_initialized() else None,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            **measured,
        }

    def write(self) -> None:
        """Leave word, and let the boards show what they have, unless all is done."""
        with self.writing:
            if not self.over.is_set():
                self.leave_word()
                self.tell_boards(lambda board: board.flush())

    def leave_word(self) -> None:
        """Set the gauges anew, which Ray forgets within half a minute, and leave a note in the directory."""
        measured, tags = dict(self.measured), self.tags
        if "seconds_left" in measured:
            measured["seconds_left"] = max(0.0, measured["seconds_left"] - (time.monotonic() - self.updated))
        for name, value in measured.items():
            instruments().gauges[name].set(value, tags)
        note = {"seconds_left": None} | self.record(measured) | {"finished": self.finished}
        with suppress(ArtifactError):  # a full disk is for those to tell who write what matters
            (self.directory / NOTE).write_json(note)

    def tell_boards(self, what: Callable[[Board], object]) -> None:
        """Tell each board; one that fails, in whatever way, is worth a line and no run, and is told nothing more."""
        kept = []
        for board in self.boards:
            try:
                what(board)
                kept.append(board)
            except Exception as error:
                print(CREDENTIALS.sub("", f"{type(board).__name__}: no longer told: {error}"), flush=True)
        self.boards = kept


def keep_telling(report: "weakref.ref[RunReport]", over: Event) -> None:
    """Leave word at once and then now and then, until the run is over or nobody holds its report any more."""
    while (alive := report()) is not None:
        alive.write()
        del alive
        if over.wait(NOTE_EVERY_S):
            return


class Progress:
    """How far, how fast and the time left; in lines, because a submitted job has no terminal."""

    def __init__(self, what: str, total: int, unit: str, first: int) -> None:
        """`first` of the total were done before the clock started."""
        self.what, self.total, self.unit, self.first = what, total, unit, first
        self.start = self.last = time.monotonic()

    def line(self, done: int, note: str = "") -> str | None:
        """What there is to say: nothing where the last line is not old enough, and not all is done."""
        now = time.monotonic()
        if now - self.last < LINE_EVERY_S and done < self.total:
            return None
        self.last = now
        left = self.seconds_left(done)
        return (
            f"{self.what}: {100 * done / max(self.total, 1):3.0f}% · {done:,}/{self.total:,} {self.unit} · "
            f"{self.rate(done):,.1f} {self.unit}/s · {'?' if left is None else format_seconds(left)} left"
            f"{' · ' + note if note else ''}"
        )

    def rate(self, done: int) -> float:
        """Units a second since the clock started."""
        return (done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def seconds_left(self, done: int) -> float | None:
        """Time for the rest at the rate so far, where there is one."""
        rate = self.rate(done)
        return (self.total - done) / rate if rate else None


def boards_of(report: RunReport) -> list[Board]:
    """Those that were asked for, each with a place of its own for the run."""
    found: list[Board] = []
    if directory := os.environ.get("EMBEDLIB_TENSORBOARD"):
        from jobs.tensorboard_run import TensorBoardRun  # not above: few runs want it

        found.append(TensorBoardRun(f"{user_path(directory)}/{report.job}-{report.run}"))
    if uri := os.environ.get("EMBEDLIB_MLFLOW"):
        from jobs.mlflow_run import MlflowRun

        found.append(MlflowRun(uri, report.job, report.mark, report.config))
    return found


def require_mlflow() -> None:
    """ConfigError where an MLflow was asked for and is not there: once, before workers tell it in their own time."""
    if uri := os.environ.get("EMBEDLIB_MLFLOW"):
        from jobs.mlflow_run import experiment_at, refusals

        with refusals(uri):
            experiment_at(uri)
