"""Which trials a seed stands for."""

import random
from typing import NamedTuple

from tests.faults.work import JOBS

# A job's result lies on a disk; the endpoint's is an answer, and its driver has ended when it answers.
OF_JOBS = ("worker", "node", "gcs", "driver", "disk", "slow", "network")
OF_ENDPOINT = ("worker", "node", "gcs", "slow", "network")
# GCS and the network ask for nodes of different kinds. What lasts comes last in its run: other nodes go on meanwhile.
APART = (("gcs", "slow"), ("network",))
LASTING = ("slow", "network")
LATEST_OF_ENDPOINT = 8


class Strike(NamedTuple):
    """A trial: one fault."""

    fault: str
    moment: int
    """Pieces that are done when it comes."""


class Drawn(NamedTuple):
    """A run of a job, and what strikes it."""

    number: int
    job: str
    nodes: int
    strikes: tuple[Strike, ...]
    """In the order of their moments."""
    seed: int


def draw(trials: int, seed: int, jobs: set[str], faults: set[str]) -> list[Drawn]:
    """Runs with `trials` trials among them, which go through all pairs of job and fault before one comes again.

    Each round has two runs of every job, each of which is struck by about half of the faults.

    ValueError where a job or a fault is unknown, or no job has any of the faults.
    """
    faults_of = dict.fromkeys(JOBS, OF_JOBS) | {"serve": OF_ENDPOINT}
    for name, asked, known in (("jobs", jobs, set(faults_of)), ("faults", faults, set(OF_JOBS))):
        if unknown := sorted(asked - known):
            raise ValueError(f"--{name}: {unknown[0]!r}; expected of {sorted(known)}")
    chance = random.Random(seed)
    runs: list[Drawn] = []
    while (missing := trials - sum(len(run.strikes) for run in runs)) > 0:
        halves = [
            (job, half)
            for job, possible in faults_of.items()
            if job in (jobs or {job})
            for half in in_halves([fault for fault in possible if fault in (faults or {fault})], chance)
            if half
        ]
        if not halves:
            raise ValueError(
                f"--faults: {sorted(faults)} do not strike {sorted(jobs)}; expected of {list(OF_ENDPOINT)}"
            )
        for job, half in chance.sample(halves, len(halves)):
            struck = half[:missing]
            missing -= len(struck)
            if struck:
                latest = JOBS[job].latest if job in JOBS else LATEST_OF_ENDPOINT
                moments = sorted(chance.sample(range(1, latest + 1), len(struck)))
                strikes = tuple(Strike(*pair) for pair in zip(struck, moments, strict=True))
                runs.append(Drawn(len(runs), job, chance.choice((2, 3)), strikes, chance.randrange(2**31)))
    return runs


def in_halves(faults: list[str], chance: random.Random) -> list[list[str]]:
    """Faults for two runs, in orders of chance."""
    halves = [[fault for fault in half if fault in faults] for half in APART]
    others = [fault for fault in faults if not any(fault in half for half in APART)]
    for fault in chance.sample(others, len(others)):
        min(halves, key=len).append(fault)
    return [sorted(chance.sample(half, len(half)), key=LASTING.__contains__) for half in halves]
