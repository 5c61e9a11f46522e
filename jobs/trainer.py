"""The loop of a training process and what Ray Train is asked for it, the same for every kind of training.

Checkpoints hold weights, optimiser, random state and the number of steps done. That number is the whole data cursor, so
that a run goes on with any number of workers, and loses or repeats no sample.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import torch
from pydantic import Field
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from embedlib.collectives import all_reduce_sum, from_first_process
from embedlib.config import Config
from embedlib.distillation import Step
from embedlib.errors import ConfigError, EmbedlibError
from embedlib.storage import Store
from embedlib.threads import use_cores
from embedlib.training import TrainState
from jobs.metrics import RunReport, require_mlflow
from jobs.runtime import num_gpus, present_gpus, quiet
from jobs.stuck import stuck_workers_give_way

WEIGHTS, STATE, HISTORY, JOB = "model.safetensors", "state.pt", "history.jsonl", "job.json"
LOG_EVERY_STEPS = 10


class WorkersConfig(Config):
    """How the steps are spread over the cluster and kept safe."""

    num_workers: int | None = Field(default=None, ge=1)
    """Training processes; none: one a GPU, or one with all cores of a node where there are none."""
    max_workers: int | None = Field(default=None, ge=1)
    """Up to so many where the cluster has room for them, and more when a node joins; none: num_workers, always."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between two validations; with patience every checkpoint is validated instead."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two checkpoints: what a crash can cost."""
    patience: int | None = Field(default=None, ge=1)
    """After so many validations without a better one training ends, and the best model is kept; none: to the end."""
    max_failures: int = Field(default=3, ge=-1)
    """Crashes of a worker that are survived by going on from the last checkpoint; -1: any number."""
    stuck_after_s: float = Field(default=600.0, gt=0)
    """Workers that have their places and say nothing for so long are started anew, which counts as a crash."""


class Trained(NamedTuple):
    """What a training process trains, and with what."""

    model: torch.nn.Module
    """The module whose weights are kept."""
    start: Callable[[torch.nn.Module], TrainState]
    """The state before the first step, of the module as it is wrapped for several processes."""
    steps: Callable[[TrainState], Iterator[Step]]
    """The steps that are left."""
    validate: Callable[[TrainState], float]
    """How good it is, the same in every process; higher is better."""
    metric: str
    """Name of that in history.jsonl."""


def start_worker() -> torch.device:
    """What every training process does first; its device."""
    quiet()
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        use_cores(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return device


def run_worker(trained: Trained, workers: WorkersConfig, log: Path, what: str) -> None:
    """One training process: go on from the last checkpoint to the end."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = next(trained.model.parameters()).device
    several = context.get_world_size() > 1
    state = trained.start(
        DistributedDataParallel(trained.model, device_ids=[device.index] if device.type == "cuda" else None)
        if several
        else trained.model
    )
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            trained.model.load_state_dict(load_file(Path(folder) / WEIGHTS))
            state.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu"))
    if rank == 0:
        forget_after(log, state.step)
    if several:
        torch.distributed.barrier()

    # The run's directory is named by its fingerprint; the log lies in it.
    told_of = {"loss": "loss", "tokens_per_second": "tokens_per_s", "padding_waste": "padding_waste"}
    told_of["validation"] = trained.metric
    report = None
    if rank == 0:
        run = Store.at(str(log.parent))
        # Tolerant: a worker that cannot begin would count as crashed.
        report = RunReport(what, log.parent.name, run, (run / JOB).read_json(), tolerant=True)
        report.begin(what, state.total_steps, "steps", state.step)
    waits = Patience(workers.patience, read_validations(log, trained.metric))
    window: list[tuple[float, float, float]] = []
    with (log / f"samples-{rank:04}.jsonl").open("a") as samples, (log / HISTORY).open("a") as history:
        start = time.perf_counter()
        for step in () if waits.is_over else trained.steps(state):
            samples.write(json.dumps({"step": step.step, "ids": step.ids}) + "\n")
            window.append((step.result.loss, step.result.num_tokens, step.result.num_padding))
            last = step.step == state.total_steps
            record: dict[str, float] = {"step": step.step}
            if step.step % LOG_EVERY_STEPS == 0 or last:
                loss, tokens, padding = all_reduce_sum(
                    torch.tensor(window, device=device, dtype=torch.float64).sum(0)
                ).tolist()
                seconds = time.perf_counter() - start
                record |= {"loss": loss / len(window), "tokens_per_s": tokens / seconds}
                record["padding_waste"] = padding / (tokens + padding)
                record |= {"grad_norm": step.result.grad_norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
                window, start = [], time.perf_counter()
            pause = time.perf_counter()
            # The best is chosen among checkpoints: where one is waited for, they are what is validated.
            keeps = step.step % workers.checkpoint_every == 0 or last
            if keeps if workers.patience else step.step % workers.validate_every == 0 or last:
                with state.averaged_weights():
                    record[trained.metric] = from_first_process(trained.validate(state), device)
                last = last or waits.after(record[trained.metric])
            if rank == 0 and len(record) > 1:
                history.write(json.dumps(record) + "\n")
                history.flush()
            if report and len(record) > 1:
                report.update(
                    step.step,
                    f"loss {record['loss']:.4f} · {record['tokens_per_s']:,.0f} tokens/s"
                    if "loss" in record
                    else f"{trained.metric} {record[trained.metric]:.4f}",
                    {told: record[name] for told, name in told_of.items() if name in record},
                )
            if keeps or last:
                samples.flush()
                save_checkpoint(trained.model, state, record, is_writer=rank == 0)
            if last:
                break
            # What validation and checkpoints take is no part of the next record's rate.
            start += time.perf_counter() - pause
    if report:
        report.finish()


class Patience:
    """When to stop waiting for a better validation."""

    def __init__(self, patience: int | None, values: list[float]) -> None:
        """`values`: the validations so far."""
        self.patience, self.best, self.waited = patience, float("-inf"), 0
        for value in values:
            self.after(value)

    def after(self, value: float) -> bool:
        """Whether training ends after this validation."""
        self.waited = 0 if value > self.best else self.waited + 1
        self.best = max(self.best, value)
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it has waited long enough."""
        return self.patience is not None and self.waited >= self.patience


def save_checkpoint(model: torch.nn.Module, state: TrainState, metrics: dict[str, float], is_writer: bool) -> None:
    """Report to Ray Train, from every process; the writer's report carries the weights and the state."""
    if not is_writer:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(model.state_dict()), Path(folder) / WEIGHTS)
        torch.save(state.state_dict(), Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def forget_after(log: Path, step: int) -> None:
    """Drop what the logs say of steps after `step`: the run that wrote it was cut off, and they are done again."""
    for path in log.glob("*.jsonl"):
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:  # the line that the crash cut short
                continue
        path.write_text("".join(line + "\n" for line in kept))


def read_records(log: Path) -> list[dict[str, float]]:
    """What the log says of each step, oldest first; nothing before the first."""
    path = log / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_validations(log: Path, metric: str) -> list[float]:
    """The validations that the log knows of, oldest first."""
    return [record[metric] for record in read_records(log) if metric in record]


def read_history(log: Path, metric: str) -> dict[str, list[float]]:
    """Loss and validation by step."""
    records = read_records(log)
    losses = [record for record in records if "loss" in record]
    validations = [record for record in records if metric in record]
    return {
        "steps": [record["step"] for record in losses],
        "loss": [record["loss"] for record in losses],
        "validation_steps": [record["step"] for record in validations],
        metric: [record[metric] for record in validations],
    }


def fit(
    worker: Callable[[dict[str, Any]], None],
    job: Config,
    workers: WorkersConfig,
    run: Path,
    most_workers: int,
    metric: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run `worker` on Ray Train below the directory `run`, going on where it was cut off: weights and state.

    They are those of the last step, or of the best validation where `workers.patience` is set. Raises ConfigError for
    more workers than `most_workers`, which a batch has samples for, and for an MLflow that is asked for and away.
    """
    gpus, present = num_gpus(), present_gpus()
    num_workers = workers.num_workers or present or 1
    # Where all GPUs are still to come, the first machine that the autoscaler gets begins, and the others join.
    grows = workers.num_workers is None and gpus > present
    largest = workers.max_workers or (min(gpus, most_workers) if grows else num_workers)
    if largest < num_workers:
        raise ConfigError(f"workers.max_workers: {largest}; expected at least num_workers, {num_workers}")
    if largest > most_workers:
        key = "max_workers" if workers.max_workers else "num_workers"
        raise ConfigError(
            f"workers.{key}: {largest}; expected at most the batch size and number of samples, {most_workers}"
        )
    require_mlflow()
    (Store.at(str(run)) / JOB).write_json(job.model_dump(mode="json"))
    trainer = TorchTrainer(
        worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=ScalingConfig(
            # mypy sees the class of the older Ray Train.
            num_workers=(num_workers, largest) if largest > num_workers else num_workers,  # type: ignore[arg-type]
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",
            # Ray Train would print every line twice. (mypy sees the class of the older Ray Train.)
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # type: ignore[call-arg]
            storage_path=str(run),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=metric if workers.patience else None
            ),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        with stuck_workers_give_way(Store.at(str(run)), workers.stuck_after_s):
            result = trainer.fit()
    except WorkerGroupError as error:
        own = [each for each in error.worker_failures.values() if isinstance(each, EmbedlibError)]
        raise own[0] if own else error from error
    checkpoint = result.checkpoint
    if workers.patience:
        checkpoint, _ = max(result.best_checkpoints or [], key=lambda kept: kept[1][metric])
    assert checkpoint is not None  # noqa: S101 (the last step always reports one)
    with checkpoint.as_directory() as folder:
        return load_file(Path(folder) / WEIGHTS), torch.load(
            Path(folder) / STATE, weights_only=True, map_location="cpu"
        )
