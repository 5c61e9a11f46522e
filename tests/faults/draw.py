"""Which trials a seed stands for."""

import random
from typing import NamedTuple

from tests.faults.work import JOBS

# A job's result lies on a disk; the endpoint's is an answer, and its driver has ended when it answers.
OF_JOBS = ("worker", "node", "gcs", "driver", "disk", "slow", "network")
OF_ENDPOINT = ("worker", "node", "gcs", "slow", "network")


class Drawn(NamedTuple):
    """What chance decided."""

    number: int
    job: str
    fault: str
    nodes: int
    moment: int
    """Pieces that are done when the fault comes."""
    seed: int


def draw(trials: int, seed: int, jobs: set[str], faults: set[str]) -> list[Drawn]:
    """`trials` trials that go through all pairs of job and fault, in an order of chance, before one comes again.

    ValueError where a job or a fault is unknown.
    """
    pairs = [(job, fault) for job in JOBS for fault in OF_JOBS] + [("serve", fault) for fault in OF_ENDPOINT]
    for name, asked, known in (("jobs", jobs, {job for job, _ in pairs}), ("faults", faults, set(OF_JOBS))):
        if unknown := sorted(asked - known):
            raise ValueError(f"--{name}: {unknown[0]!r}; expected of {sorted(known)}")
    pairs = [(job, fault) for job, fault in pairs if job in (jobs or {job}) and fault in (faults or {fault})]
    chance = random.Random(seed)
    order: list[tuple[str, str]] = []
    while len(order) < trials:
        order += chance.sample(pairs, len(pairs))
    return [
        Drawn(
            number=number,
            job=job,
            fault=fault,
            nodes=chance.choice((2, 3)),
            moment=chance.randint(1, JOBS[job].latest if job in JOBS else 8),
            seed=chance.randrange(2**31),
        )
        for number, (job, fault) in enumerate(order[:trials])
    ]
