"""One run: a cluster, a job on it, faults at moments of chance, and what came of it, as one line of JSON.

    python -m tests.faults.run RUN.json

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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.endpoint import Askers
from tests.faults.machines import Machines, Namespaces, SideBySide, free_port, pause, redis
from tests.faults.work import JOBS
from tests.jobs.processes import kill_tree, wait_for

MAX_RUNS = 8
WORKER_S = 5.0
BLOCK = 1 << 16


class Plan(NamedTuple):
    """A run, as it was drawn."""

    number: int
    job: str
    nodes: int
    strikes: list[tuple[str, int]]
    """Each a fault and the pieces that are done when it comes."""
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
        busy[:] = [each for node in range(context.machines.num_nodes) for each in context.machines.workers(node)]
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
    node = context.chance.randrange(1, context.machines.num_nodes)
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
    nodes = range(context.machines.num_nodes)
    at_work = [node for node in nodes if context.machines.workers(node)]
    node = context.chance.choice(at_work or list(nodes))
    end = time.monotonic() + context.chance.uniform(5, 10)
    slowed = False
    while time.monotonic() < end:
        stopped = context.machines.workers(node)
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
    node = context.chance.randrange(1, context.machines.num_nodes)
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
    """The nodes that the faults need."""
    faults = {fault for fault, _ in plan.strikes}
    with ExitStack() as stack:
        if "network" in faults:
            machines: Any = Namespaces(plan.nodes, f"emb{os.getpid() % 100000}")
        else:
            address = stack.enter_context(redis()) if "gcs" in faults else None
            machines = SideBySide(plan.nodes, address)
        stack.callback(machines.stop)
        yield machines


def main() -> None:
    """Do one run."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    with cluster(plan) as machines:
        result = disturb_endpoint(plan, machines) if plan.job == "serve" else disturb_job(plan, machines)
    shown = {"run": plan.number, "job": plan.job, "nodes": plan.nodes}
    print(json.dumps(shown | result), flush=True)


def start_driver(job: str, folder: str, machines: Machines, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Run a job as its user does; what it says goes to `driver.log` in the folder."""
    file = Path(folder) / "values.json"
    file.write_text(json.dumps(values))
    command = [sys.executable, "-m", "tests.faults.drive", job, str(file)]
    log = (Path(folder) / "driver.log").open("ab")
    environment = os.environ | {"RAY_ADDRESS": machines.address, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


class Driven:
    """A job's driver, started again as long as it ends with an error; never while a fault lasts."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.start = start
        self.drivers = [start()]
        self.calm = threading.Event()
        self.calm.set()
        self.runner = threading.Thread(target=self.run_to_the_end, daemon=True)
        self.runner.start()

    def run_to_the_end(self) -> None:
        """Start it as often as it takes."""
        while self.drivers[-1].wait() and len(self.drivers) < MAX_RUNS:
            self.calm.wait()
            self.drivers.append(self.start())

    @property
    def over(self) -> bool:
        """Whether the job is done, or given up."""
        return not self.runner.is_alive()

    @contextmanager
    def fault(self) -> Iterator[None]:
        """While it lasts no driver is started."""
        self.calm.clear()
        try:
            yield
        finally:
            self.calm.set()


class Effect:
    """When a fault had its effect, and how long it took from then to the first piece that was not done by then."""

    def __init__(self, progress: Callable[[], int]) -> None:
        self.progress = progress
        self.seconds: float | None = None

    def landed(self) -> None:
        """From now on recovery is measured."""
        moment, done = time.monotonic(), self.progress()
        threading.Thread(target=self.watch, args=(moment, done), daemon=True).start()

    def watch(self, moment: float, done: int) -> None:
        """Wait for the next piece."""
        while self.progress() <= done:
            time.sleep(0.05)
        self.seconds = round(time.monotonic() - moment, 1)


def disturb_job(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Strike a job, let it end, and compare what it made with what it makes undisturbed."""
    work, output = JOBS[plan.job], Path(plan.folder) / "output"
    output.mkdir(exist_ok=True)
    values = work.values(plan.files, output)
    start = time.monotonic()
    driven = Driven(lambda: start_driver(plan.job, plan.folder, machines, values))
    chance = random.Random(plan.seed)
    trials: list[dict[str, Any]] = []
    effects: list[Effect] = []
    drivers: list[int] = []
    """Started before each trial."""
    for fault, moment in plan.strikes:
        while work.progress(output) < moment and not driven.over:
            time.sleep(0.05)
        effects.append(Effect(lambda: work.progress(output)))
        drivers.append(len(driven.drivers))
        struck, why = None, "the job had ended"
        if not driven.over:
            machines.replace_lost()
            # By this thread: Ray has the kernel end what a thread has started when the thread ends.
            with driven.fault():
                struck = FAULTS[fault](Context(machines, driven.drivers, output, chance, effects[-1].landed))
            why = "nobody was at work"
        trials.append({"fault": fault, "moment": moment, "struck": struck or why, "faults": int(struck is not None)})
    driven.runner.join()
    drivers.append(len(driven.drivers))
    for trial, effect, (before, after) in zip(trials, effects, pairwise(drivers), strict=True):
        trial |= {"recovery_s": effect.seconds, "reruns": after - before}
    failed = driven.drivers[-1].returncode
    return {
        "trials": trials,
        "losses": work.losses(Path(plan.undisturbed), output) if not failed else 1,
        "seconds": round(time.monotonic() - start, 1),
        "error": (Path(plan.folder) / "driver.log").read_text()[-2000:] if failed else "",
    }


def disturb_endpoint(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Strike the endpoint while clients ask, and count the requests that never had their vector."""
    start = time.monotonic()
    values = endpoint_values(plan, machines)
    drivers = [start_driver(plan.job, plan.folder, machines, values)]  # it ends when all replicas are there; they stay
    url = f"http://{values['host']}:{values['port']}"
    assert drivers[-1].wait(180) == 0, (Path(plan.folder) / "driver.log").read_text()[-2000:]
    chance = random.Random(plan.seed)
    trials = []
    moments: list[float] = []
    context = Context(machines, drivers, Path(plan.folder), chance, lambda: moments.append(time.monotonic()))
    with Askers(url, plan.files["model"]) as askers:
        for fault, moment in plan.strikes:
            wait_for(lambda least=20 * moment: askers.answered >= least, "answers before the fault", 120)
            machines.replace_lost()
            moments.clear()
            struck = FAULTS[fault](context)
            recovery_s = round(askers.settle(moments[0]), 1) if moments else None
            told = {"struck": struck or "nobody was at work", "faults": int(struck is not None), "reruns": 0}
            trials.append({"fault": fault, "moment": moment, "recovery_s": recovery_s} | told)
    return {
        "trials": trials,
        "losses": askers.lost,
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
