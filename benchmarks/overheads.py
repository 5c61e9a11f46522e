"""What Ray asks of a cluster for itself, by the number of workers, and what that leaves of 8, 64 and 512 GPUs.

    python -m benchmarks.overheads [--quick] [--json OUT]

The model does nothing, so that everything measured is overhead: the time of a task and of a part of an embedding job,
the bytes that go through the object store, and the time and bytes of a step's all-reduce, at 1, 2, 4 and 8 workers of
this machine. Workers share its cores, which machines would not; so no time here is a cluster's. The model of many GPUs
takes bytes and the driver's time for each part from the measurements, a GPU's rates from sizing.yaml, and bandwidths
from data sheets. Its shape is checked here: fitted to fewer workers, it must tell the exchange among the most, and the
driver's time for a part.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from scipy.optimize import nnls
from torch.nn.parallel import DistributedDataParallel

from benchmarks.command import benchmark_parser, write_result
from benchmarks.machine import describe_machine
from benchmarks.sizing import Constants, vectors_s
from embedlib.collectives import all_gather_rows
from jobs.runtime import SOME_CPU, connect

WORKERS, QUICK_WORKERS = (1, 2, 4, 8), (1, 2, 4)
GPUS = (8, 64, 512)
PARTS, STEPS = 256, 30
# The student of the me5s recipe: its gradients are what is added up. The batch is that of the steps whose rate is in
# sizing.yaml; its vectors are what is gathered.
PARAMETERS, DIM, BATCH = 13_218_816, 384, 1024
MEASURED_PARAMETERS = 1_000_000
# A part of jobs/embed.py: 32,768 rows of 650 bytes (float16, 384 wide, with ids), written by the worker itself.
PART_ROWS = 32_768


class Link(NamedTuple):
    """What joins processes that exchange gradients and vectors."""

    bytes_per_s: float
    """A direction."""
    latency_s: float
    """Of each doubling of those that exchange."""
    is_shared: bool = False
    """All their bytes pass one memory, as on one machine without GPUs; else each has a link of its own."""

    def seconds(self, members: int, sent: float) -> float:
        """An exchange among `members`, each of which sends `sent` bytes."""
        return self.latency_s * math.log2(members) + sent * (members if self.is_shared else 1) / self.bytes_per_s


class Hardware(NamedTuple):
    """A node: its links by their data sheets."""

    name: str
    gpus: int
    texts_per_s: float
    """One GPU's rate, embedding by the teacher."""
    step_s: float
    """Compute of a training step on one GPU, at BATCH samples a GPU."""
    inside: Link
    """Between GPUs of a node."""
    between: Link
    """A node's network."""


def hardware_of(given: Constants) -> list[Hardware]:
    """Nodes with an H100's measured rates, and with an L4's by the ratio of their peaks."""
    return [
        Hardware("8 × H100, NVLink, 400 Gbit/s", 8, *gpu_rates(given, "H100"), Link(450e9, 5e-6), Link(50e9, 40e-6)),
        Hardware("1 × L4, 25 Gbit/s", 1, *gpu_rates(given, "L4"), Link(32e9, 5e-6), Link(3.1e9, 100e-6)),
    ]


def gpu_rates(given: Constants, name: str) -> tuple[float, float]:
    """Texts a second that a GPU of this name embeds, and seconds of its training step of BATCH samples."""
    machine = given.machines[name]
    samples_per_s = given.rate("gpu_distil_samples_per_s") * given.gpu(machine)
    return 1 / vectors_s(given, machine, 1), BATCH / samples_per_s


class NoOp:
    """An encoder that does nothing, as jobs/embed.py's actors are used: a part's number in, its counts out."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Say what a part would have held."""
        return {"number": batch["number"], "rows": np.full(len(batch["number"]), PART_ROWS)}


class Scheduling(NamedTuple):
    """What the driver does for a job, with workers that do nothing."""

    workers: int
    task_s: float
    """Of an empty task, from call to result, many under way."""
    part_s: float
    """Of a part of an embedding plan on Ray Data."""
    store_bytes_a_part: float
    """That go through the object store."""


def measure_scheduling(workers: int, parts: int) -> Scheduling:
    """Empty tasks, then an empty embedding job."""
    task = ray.remote(num_cpus=SOME_CPU)(nothing)
    ray.get([task.remote() for _ in range(workers)])  # their processes start
    start = time.perf_counter()
    ray.get([task.remote() for _ in range(4 * parts)])
    task_s = (time.perf_counter() - start) / (4 * parts)
    items = [{"number": number, "part": "x" * 100} for number in range(parts)]
    plan = ray.data.from_items(items, override_num_blocks=parts).map_batches(
        NoOp, batch_size=1, compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=SOME_CPU
    )
    first = None
    for _ in plan.iter_rows():
        first = first or time.perf_counter()
    assert first
    return Scheduling(
        workers=workers,
        task_s=task_s,
        part_s=(time.perf_counter() - first) / (parts - 1),
        store_bytes_a_part=stored_bytes(plan.stats()) / parts,
    )


def nothing() -> None:
    """A task."""


def stored_bytes(stats: str) -> int:
    """Bytes of all blocks that a plan's own statistics tell of."""
    return sum(int(total) for total in re.findall(r"Output size bytes per block: .* (\d+) total", stats))


class Step(NamedTuple):
    """A training step of a model that does nothing but has gradients."""

    workers: int
    seconds: float
    reduce_s: float
    """Of that, adding up gradients and gathering vectors."""
    reduced_bytes: int
    """Of gradients, that each process hands to the all-reduce."""
    gathered_bytes: int
    """Of vectors, that each process receives."""


def measure_steps(workers: int, steps: int) -> Step:
    """Steps of `workers` processes on Ray Train."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "step.json"
        TorchTrainer(
            train,
            train_loop_config={"steps": steps, "told": str(told)},
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": SOME_CPU}),
            run_config=RunConfig(name="overheads", storage_path=folder),
        ).fit()
        return Step(workers=workers, **json.loads(told.read_text()))


def train(config: dict[str, Any]) -> None:
    """One process: a linear model, DistributedDataParallel, a gather of vectors, as jobs/trainer.py has them.

    The first writes what it took to the file `told`: Ray Train keeps but what is reported with a checkpoint.
    """
    torch.set_num_threads(1)
    context = ray.train.get_context()
    world = context.get_world_size()
    model: torch.nn.Module = torch.nn.Linear(1000, MEASURED_PARAMETERS // 1000, bias=False)
    model = DistributedDataParallel(model) if world > 1 else model
    inputs, vectors = torch.zeros(1, 1000), torch.zeros(BATCH // world, DIM)
    seconds, alone = [], []
    for _ in range(config["steps"] + 3):
        start = time.perf_counter()
        model(inputs).sum().backward()
        if world > 1:
            all_gather_rows(vectors)
        seconds.append(time.perf_counter() - start)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    for _ in range(config["steps"]):
        start = time.perf_counter()
        plain(inputs).sum().backward()
        alone.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[3:]))
    if context.get_world_rank() == 0:
        step = {
            "seconds": step_s,
            "reduce_s": max(0.0, step_s - float(np.median(alone))) if world > 1 else 0.0,
            "reduced_bytes": sum(4 * parameter.numel() for parameter in model.parameters()) if world > 1 else 0,
            "gathered_bytes": 4 * BATCH * DIM * (world - 1) // world,
        }
        Path(config["told"]).write_text(json.dumps(step))


def ring_bytes(size: float, workers: int) -> float:
    """Bytes that each process of a ring all-reduce sends for `size` bytes of gradients."""
    return 2 * size * (workers - 1) / workers


def embed_efficiency(hardware: Hardware, gpus: int, part_s: float) -> float:
    """Share of `gpus` times one GPU's rate that an embedding job reaches where the driver takes `part_s` a part.

    The driver hands out parts one after the other; as long as that is quicker than all GPUs together, nobody waits.
    """
    compute_s = PART_ROWS / hardware.texts_per_s / gpus
    return compute_s / max(compute_s, part_s)


def train_efficiency(hardware: Hardware, gpus: int) -> float:
    """Share of `gpus` times one GPU's rate that training reaches, nothing of the exchange hidden behind compute."""
    return hardware.step_s / (hardware.step_s + exchange_s(hardware, gpus))


def exchange_s(hardware: Hardware, gpus: int) -> float:
    """Seconds of a step's all-reduce and gather over `gpus` GPUs: inside the nodes, then between them."""
    inside = min(gpus, hardware.gpus)
    nodes = max(1, gpus // hardware.gpus)
    gradients, vectors = 4.0 * PARAMETERS, 2.0 * BATCH * DIM
    # A node's GPUs reduce among themselves and share their network; each then sends its share to its peers.
    return hardware.inside.seconds(inside, ring_bytes(gradients, inside) + vectors * (inside - 1)) + (
        hardware.between.seconds(nodes, ring_bytes(gradients, nodes) + vectors * (gpus - inside))
    )


class Check(NamedTuple):
    """A cost as the model has it against what was measured, on this machine."""

    cost: str
    """The exchange of a training step, or the driver's part of an embedding."""
    workers: int
    measured_s: float
    modelled_s: float
    is_predicted: bool
    """Whether this point was left out when the model was fitted."""


def checked(steps: Sequence[Step]) -> tuple[Link, list[Check]]:
    """This machine's exchange as a link, fitted to all points but the one of most workers, and the model at each."""
    several = sorted(step for step in steps if step.workers > 1)
    unit = Link(bytes_per_s=1.0, latency_s=1.0, is_shared=True)
    doublings, moved = (
        np.array([link.seconds(step.workers, sent(step)) for step in several])
        for link in (unit._replace(bytes_per_s=math.inf), unit._replace(latency_s=0.0))
    )
    fitted = slice(0, num_fitted(several))
    measured = np.array([step.reduce_s for step in several])
    (latency_s, seconds_a_byte), _ = nnls(np.stack([doublings, moved], axis=1)[fitted], measured[fitted])
    link = Link(1 / seconds_a_byte if seconds_a_byte else math.inf, float(latency_s), is_shared=True)
    return link, [
        Check("exchange", step.workers, step.reduce_s, link.seconds(step.workers, sent(step)), number >= fitted.stop)
        for number, step in enumerate(several)
    ]


def checked_parts(scheduling: Sequence[Scheduling]) -> list[Check]:
    """The driver's worst time for a part, of all points but the one of most workers, against that at each."""
    ordered = sorted(scheduling)
    fitted = num_fitted(ordered)
    part_s = worst_part_s(ordered[:fitted])
    return [Check("part", each.workers, each.part_s, part_s, n >= fitted) for n, each in enumerate(ordered)]


def num_fitted(points: Sequence[Any]) -> int:
    """How many points a model is fitted to: all but the one of most workers, if there are others."""
    return max(1, len(points) - 1)


def worst_part_s(scheduling: Sequence[Scheduling]) -> float:
    """Seconds that the driver takes for a part, of whatever number of workers it takes longest for."""
    return max(each.part_s for each in scheduling)


def sent(step: Step) -> float:
    """Bytes that a process sends in a step."""
    return ring_bytes(step.reduced_bytes, step.workers) + step.gathered_bytes


def modelled(scheduling: Sequence[Scheduling]) -> list[dict[str, Any]]:
    """Efficiency by hardware and number of GPUs, with the driver's worst time for a part."""
    part_s = worst_part_s(scheduling)
    return [
        {
            "hardware": hardware.name,
            "gpus": gpus,
            "embed": embed_efficiency(hardware, gpus, part_s),
            "train": train_efficiency(hardware, gpus),
            "exchange_ms": 1e3 * exchange_s(hardware, gpus),
        }
        for hardware in hardware_of(Constants.read())
        for gpus in GPUS
    ]


def main() -> None:
    """Measure, model, check, tell."""
    options = benchmark_parser(
        "Overheads by workers, and what they leave of many GPUs.", "up to 4 workers"
    ).parse_args()
    workers = QUICK_WORKERS if options.quick else WORKERS
    parts, steps = (32, 10) if options.quick else (PARTS, STEPS)
    # Eight processes that import PyTorch on two cores are longer than Ray Train waits for a group.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    connect()
    scheduling = [measure_scheduling(number, parts) for number in workers]
    exchanged = [measure_steps(number, steps) for number in workers]
    link, checks = checked(exchanged)
    parts_checked = checked_parts(scheduling)
    model = modelled(scheduling)
    for each in (*scheduling, *exchanged, *checks, *parts_checked):
        print(type(each).__name__, json.dumps(each._asdict()))
    print(f"this machine's exchange: {link.bytes_per_s / 1e9:.2f} GB/s, {1e3 * link.latency_s:.2f} ms a doubling")
    for row in model:
        print(f"{row['hardware']}, {row['gpus']} GPUs: embed {row['embed']:.1%}, train {row['train']:.1%}")
    result = {
        "machine": describe_machine(),
        "runs": {
            "scheduling": [each._asdict() for each in scheduling],
            "steps": [each._asdict() for each in exchanged],
        },
        "ratios": {
            "modelled_by_measured": {each.workers: each.modelled_s / each.measured_s for each in checks},
            "part_modelled_by_measured": {each.workers: each.modelled_s / each.measured_s for each in parts_checked},
        },
        "model": model,
        "exchange": link._asdict(),
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
