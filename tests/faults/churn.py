"""A job on three nodes: every so often one is killed and another joins, until it ends; what came of it as JSON.

python -m tests.faults.churn CHURN.json
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.machines import SideBySide
from tests.faults.run import MAX_RUNS, start_driver, wait_up_to
from tests.jobs.processes import kill_tree

NODES = 3


class Churn(NamedTuple):
    """What is run, and how often it is struck."""

    job: str
    values: dict[str, Any]
    every_s: float
    seed: int
    folder: str


def main() -> None:
    """Run it to its end, however often its driver has to be started."""
    churn = Churn(**json.loads(Path(sys.argv[1]).read_text()))
    chance = random.Random(churn.seed)
    start = time.monotonic()
    machines = SideBySide(NODES)
    killed: list[int] = []
    drivers = [start_driver(churn.job, churn.folder, machines, churn.values)]
    try:
        while True:
            if not wait_up_to(churn.every_s, lambda: drivers[-1].poll() is not None):
                # Never the head, whose GCS has no other place to live here.
                killed.append(chance.randrange(1, NODES))
                kill_tree(machines.raylet(killed[-1]))
                machines.restart(killed[-1])
            elif drivers[-1].returncode and len(drivers) < MAX_RUNS:
                drivers.append(start_driver(churn.job, churn.folder, machines, churn.values))
            else:
                break
    finally:
        machines.stop()
    told = {"killed": killed, "runs": len(drivers), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(told | {"returncode": drivers[-1].returncode}), flush=True)


if __name__ == "__main__":
    main()
