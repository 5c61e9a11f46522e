"""What a session of the suite adds up to."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine

RESULTS: list[dict[str, Any]] = []
"""Of this session's trials. Not in conftest.py: pytest has a copy of that module which no test can import."""


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report: all trials, and what they add up to."""
    return {
        "machine": describe_machine(),
        "trials": len(results),
        "faults": sum(result["faults"] for result in results),
        "losses": sum(result["losses"] for result in results),
        "recovery_s": recovery(results),
        "by_fault": {fault: part(results, "fault", fault) for fault in sorted({each["fault"] for each in results})},
        "by_job": {job: part(results, "job", job) for job in sorted({each["job"] for each in results})},
        "runs": list(results),
    }


def part(results: Sequence[dict[str, Any]], key: str, value: str) -> dict[str, Any]:
    """What the trials of one job, or of one fault, add up to."""
    own = [result for result in results if result[key] == value]
    return {
        "trials": len(own),
        "faults": sum(result["faults"] for result in own),
        "losses": sum(result["losses"] for result in own),
        "reruns": sum(result["runs"] - 1 for result in own),
        "recovery_s": recovery(own),
    }


def recovery(results: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds from the fault's effect to the first piece that was not done by then, or to the last repeated request."""
    seconds = sorted(result["recovery_s"] for result in results if result["recovery_s"] is not None)
    return {"median": median(seconds), "max": seconds[-1]} if seconds else None


def show(results: Sequence[dict[str, Any]], write: Callable[[str], None]) -> None:
    """The trials as a table, and their sum."""
    for each in results:
        write(
            f"{each['trial']:4} {each['job']:8} {each['fault']:8} {each['nodes']} nodes  "
            f"losses {each['losses']}  recovery {each['recovery_s']} s  runs {each['runs']}  {each['struck']}"
        )
    faults, losses = (sum(result[name] for result in results) for name in ("faults", "losses"))
    write(f"{len(results)} trials, {faults} faults, {losses} losses, recovery {recovery(results)}")
