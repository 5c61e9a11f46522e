"""What a session of the suite adds up to."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine

RESULTS: list[dict[str, Any]] = []
"""The session's runs. Not in conftest.py: pytest has a copy of that module which no test can import."""


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report: all runs with their trials, and what they add up to.

    A fault that struck nobody is no trial. What a run lost is counted for all that struck it.
    """
    trials = list(trials_of(runs))
    return {
        "machine": describe_machine(),
        "trials": len(trials),
        "losses": sum(run["losses"] for run in runs),
        "recovery_s": recovery(trials),
        "by_fault": {fault: part(trials, "fault", fault) for fault in sorted({trial["fault"] for trial in trials})},
        "by_job": {job: part(trials, "job", job) for job in sorted({trial["job"] for trial in trials})},
        "runs": list(runs),
    }


def trials_of(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The trials of all runs, each with what is known of its run."""
    for run in runs:
        yield from (run | trial for trial in run["trials"] if trial["faults"])


def part(trials: Sequence[dict[str, Any]], key: str, value: str) -> dict[str, Any]:
    """What the trials of one job, or of one fault, add up to."""
    own = [trial for trial in trials if trial[key] == value]
    return {
        "trials": len(own),
        "losses": sum({trial["run"]: trial["losses"] for trial in own}.values()),
        "reruns": sum(trial["reruns"] for trial in own),
        "recovery_s": recovery(own),
    }


def recovery(trials: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds from the fault's effect to the first piece that was not done by then, or to the last repeated request."""
    seconds = sorted(trial["recovery_s"] for trial in trials if trial["recovery_s"] is not None)
    return {"median": median(seconds), "max": seconds[-1]} if seconds else None


def show(runs: Sequence[dict[str, Any]], write: Callable[[str], None]) -> None:
    """The trials as a table, and their sum."""
    for run in runs:
        write(f"{run['run']:4} {run['job']:8} {run['nodes']} nodes  losses {run['losses']}")
        for trial in run["trials"]:
            recovered = f"recovery {trial['recovery_s']} s  reruns {trial['reruns']}"
            write(f"     {trial['fault']:8} at {trial['moment']:3}  {recovered}  {trial['struck']}")
    trials = list(trials_of(runs))
    losses = sum(run["losses"] for run in runs)
    write(f"{len(trials)} trials in {len(runs)} runs, {losses} losses, recovery {recovery(trials)}")
