"""One trial: a cluster, a job on it, a fault at a moment of chance, and what came of it, as one line of JSON.

    python -m tests.faults.trial TRIAL.json

The job's driver is a process of its own. Where it ends with an error, it is started again with the same command, as its
user would; that a fault needs no such rerun is noted, not asked for.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.endpoint import Askers
from tests.faults.machines import Machines, Namespaces, SideBySide, free_port, pause, redis, workers_of
from tests.faults.work import JOBS, Work
from tests.jobs.processes import kill_tree, wait_for

MAX_RUNS = 5
WORKER_S = 5.0
BLOCK = 1 << 16


class Plan(NamedTuple):
    """A trial, as it was drawn."""

    number: int
    job: str
    fault: str
    nodes: int
    moment: int
    """Pieces that are done when the fault comes."""
    seed: int
    folder: str
    """Where it works; `undisturbed` is beside it."""
    undisturbed: str
    files: dict[str, str]


class Context(NamedTuple):
    """What a fault can get at."""

    machines: Any
    driver: list[subprocess.Popen[bytes]]
    """The running driver, last."""
    output: Path
    chance: random.Random
    struck: Callable[[], None]
    """Called by a fault at once when it has its effect: from then on recovery is measured."""


def kill_worker(context: Context) -> str | None:
    """SIGKILL one busy worker of any node."""
    busy: list[Any] = []

    def found() -> bool:
        nodes = range(len(nodes_of(context)))
        busy[:] = [each for node in nodes for each in workers_of(context.machines.raylet(node))]
        return bool(busy)

    if not wait_up_to(WORKER_S, found):
        return None
    victim = context.chance.choice(sorted(busy, key=lambda process: process.pid))
    title = " ".join(victim.cmdline()[:1])
    victim.kill()
    context.struck()
    return title


def kill_node(context: Context) -> str:
    """SIGKILL the raylet of a node that is not the head, with its workers; a new node joins some seconds later."""
    node = context.chance.randrange(1, len(nodes_of(context)))
    kill_tree(context.machines.raylet(node))
    context.struck()
    time.sleep(context.chance.uniform(1, 5))
    context.machines.restart(node)
    return f"node {node}"


def kill_gcs(context: Context) -> str:
    """SIGKILL the head's GCS and start it again, with the tables that Redis keeps."""
    os.kill(context.machines.gcs(), signal.SIGKILL)
    context.struck()
    time.sleep(context.chance.uniform(0.5, 4))
    context.machines.restart_gcs()
    return "GCS"


def kill_driver(context: Context) -> str:
    """SIGKILL the process that the user started."""
    kill_tree(context.driver[-1].pid)
    context.struck()
    return "driver"


def fill_disk(context: Context) -> str:
    """Take all room that the output's disk has left, for some seconds."""
    ballast = context.output / ".ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(BLOCK))
    context.struck()
    size = ballast.stat().st_size
    wait_up_to(context.chance.uniform(3, 12), lambda: context.driver[-1].poll() is not None)
    ballast.unlink()
    return f"{size >> 10} KiB taken"


def slow_node(context: Context) -> str | None:
    """Let the workers of one node, of those that have some, run a tenth of the time."""
    nodes = range(len(nodes_of(context)))
    at_work = [node for node in nodes if workers_of(context.machines.raylet(node))]
    node = context.chance.choice(at_work or list(nodes))
    end = time.monotonic() + context.chance.uniform(5, 10)
    slowed = False
    while time.monotonic() < end:
        stopped = workers_of(context.machines.raylet(node))
        if stopped and not slowed:
            context.struck()
        slowed |= bool(stopped)
        threads = [threading.Thread(target=pause, args=(worker, 0.9)) for worker in stopped]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.1)
    return f"node {node}" if slowed else None


def cut_network(context: Context) -> str:
    """Pull the cable of a node that is not the head, for less or for more time than it takes to be given up."""
    node = context.chance.randrange(1, len(nodes_of(context)))
    seconds = context.chance.choice([context.chance.uniform(1, 4), context.chance.uniform(15, 25)])
    context.machines.cut(node)
    context.struck()
    time.sleep(seconds)
    context.machines.mend(node)
    if not wait_up_to(10, lambda: context.machines.find_raylet(node) is None):
        return f"node {node} for {seconds:.0f} s"
    context.machines.restart(node)
    return f"node {node} for {seconds:.0f} s, given up and joined anew"


# What each has struck; None where there was nobody.
FAULTS: dict[str, Callable[[Context], str | None]] = {
    "worker": kill_worker,
    "node": kill_node,
    "gcs": kill_gcs,
    "driver": kill_driver,
    "disk": fill_disk,
    "slow": slow_node,
    "network": cut_network,
}


def nodes_of(context: Context) -> list[Any]:
    """All nodes, the head first."""
    machines = context.machines
    return list(machines.spaces if isinstance(machines, Namespaces) else machines.nodes)


def wait_up_to(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether `condition` held in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@contextmanager
def cluster(plan: Plan) -> Iterator[Machines]:
    """The nodes that the fault needs."""
    with ExitStack() as stack:
        if plan.fault == "network":
            machines: Any = Namespaces(plan.nodes, f"emb{os.getpid() % 100000}")
        else:
            address = stack.enter_context(redis()) if plan.fault == "gcs" else None
            machines = SideBySide(plan.nodes, address)
        stack.callback(machines.stop)
        yield machines


def main() -> None:
    """Run one trial."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    with cluster(plan) as machines:
        result = serve_trial(plan, machines) if plan.job == "serve" else job_trial(plan, machines)
    shown = {"trial": plan.number, "job": plan.job, "fault": plan.fault, "nodes": plan.nodes, "moment": plan.moment}
    print(json.dumps(shown | result), flush=True)


def start_driver(job: str, folder: str, machines: Machines, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Run a job as its user does; what it says goes to `driver.log` in the folder."""
    file = Path(folder) / "values.json"
    file.write_text(json.dumps(values))
    command = [sys.executable, "-m", "tests.faults.drive", job, str(file)]
    log = (Path(folder) / "driver.log").open("ab")
    environment = os.environ | {"RAY_ADDRESS": machines.address, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def job_trial(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Disturb a job, let it end, and compare what it made with what it makes undisturbed."""
    work, output = JOBS[plan.job], Path(plan.folder) / "output"
    output.mkdir(exist_ok=True)
    values = work.values(plan.files, output)
    start = time.monotonic()
    drivers = [start_driver(plan.job, plan.folder, machines, values)]
    moments: list[tuple[float, int]] = []
    """When the fault had its effect, and the pieces that were done by then."""
    context = Context(
        machines,
        drivers,
        output,
        random.Random(plan.seed),
        lambda: moments.append((time.monotonic(), work.progress(output))),
    )
    while work.progress(output) < plan.moment and drivers[-1].poll() is None:
        time.sleep(0.05)
    reached = drivers[-1].poll() is None
    recovery: list[float] = []
    watcher = threading.Thread(target=lambda: recovery.append(seconds_to_recover(work, output, moments)), daemon=True)
    over = threading.Event()

    def run_to_the_end() -> None:
        while drivers[-1].wait() and len(drivers) < MAX_RUNS:
            over.wait()
            drivers.append(start_driver(plan.job, plan.folder, machines, values))

    runner = threading.Thread(target=run_to_the_end, daemon=True)
    runner.start()
    struck_what = None
    if reached:
        watcher.start()
        # By this thread: Ray has the kernel end what a thread has started when the thread ends.
        struck_what = FAULTS[plan.fault](context)
    over.set()
    runner.join()
    if reached:
        watcher.join(1)
    failed = drivers[-1].returncode
    losses = work.losses(Path(plan.undisturbed), output) if not failed else 1
    return {
        "struck": struck_what or ("nobody was at work" if reached else "the job had ended"),
        "faults": int(struck_what is not None),
        "runs": len(drivers),
        "losses": losses,
        "recovery_s": round(recovery[0], 1) if recovery else None,
        "seconds": round(time.monotonic() - start, 1),
        "error": (Path(plan.folder) / "driver.log").read_text()[-2000:] if failed else "",
    }


def seconds_to_recover(work: Work, output: Path, moments: list[tuple[float, int]]) -> float:
    """Seconds from the moment that a fault had its effect to the first piece that was not done by then."""
    while not moments or work.progress(output) <= moments[0][1]:
        time.sleep(0.05)
    return time.monotonic() - moments[0][0]


def serve_trial(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Disturb the endpoint while clients ask, and count the requests that never had their vector."""
    start = time.monotonic()
    values = endpoint_values(plan, machines)
    drivers = [start_driver(plan.job, plan.folder, machines, values)]  # it ends when all replicas are there; they stay
    url = f"http://{values['host']}:{values['port']}"
    assert drivers[-1].wait(180) == 0, (Path(plan.folder) / "driver.log").read_text()[-2000:]
    with Askers(url, plan.files["model"]) as askers:
        wait_for(lambda: askers.answered >= 20 * max(1, plan.moment % 8), "answers before the fault", 120)
        moments: list[float] = []
        context = Context(
            machines,
            drivers,
            Path(plan.folder),
            random.Random(plan.seed),
            lambda: moments.append(time.monotonic()),
        )
        told = FAULTS[plan.fault](context)
        last_failure = askers.settle(moments[0]) if moments else None
    return {
        "struck": told or "nobody was at work",
        "faults": int(told is not None),
        "runs": 1,
        "losses": askers.lost,
        "recovery_s": None if last_failure is None else round(last_failure, 1),
        "asked": askers.asked,
        "retried": askers.retried,
        "seconds": round(time.monotonic() - start, 1),
        "error": askers.error,
    }


def endpoint_values(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Two replicas of one CPU."""
    replica = {"path": plan.files["model"], "backend": "torch-float32", "num_threads": 1}
    replica |= {"min_replicas": 2, "max_replicas": 2, "batching": {"max_wait_s": 60}}
    application = {"models": {"full": replica}, "batches": {"directory": str(Path(plan.folder) / "batches")}}
    return {"host": machines.host, "port": free_port(), "application": application}


if __name__ == "__main__":
    main()
