"""Distil a student from cached teacher vectors: the loop of one process, with no cluster in sight."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from embedlib.artifact import EVALUATION_NAME, MANIFEST_NAME
from embedlib.batching import token_budget_batches
from embedlib.collectives import all_reduce_sum, rank, world_size
from embedlib.config import Config
from embedlib.dataset import DistillationSet
from embedlib.encoder import Encoder, fast_dtype
from embedlib.losses import LossConfig
from embedlib.memory import keep_few_kernels, keep_freed_memory
from embedlib.threads import cores
from embedlib.torch_model import SentenceVectors, body_of
from embedlib.training import (
    MAX_LANES,
    Batch,
    OptimizerConfig,
    SampleOrder,
    StepResult,
    TrainState,
    bare,
    build_optimizer,
    share_of_rank,
    train_step,
)

CPU_MICRO_BATCH_TOKENS = 4096
CUDA_MICRO_BATCH_TOKENS = 65536
TEACHER_RUNS, WARM_UP_STEPS, RATE_STEPS = 2, 8, 9


class DistillationConfig(Config):
    """How the student learns."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the training texts."""
    batch_size: int = Field(default=512, ge=1)
    """Samples of one optimiser step, over all workers."""
    loss: LossConfig = LossConfig()
    """What is compared between student and teacher."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the weights move."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of one forward and backward; none: fit for the device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 where the hardware is faster with it. Weights stay float32."""
    seed: int = 0
    """Decides the order of the samples."""


class Step(NamedTuple):
    """What a step did, over all processes' shares."""

    step: int
    """Steps done, this one included."""
    ids: list[int]
    """Samples that this process saw."""
    result: StepResult


def load_student(directory: Path, device: torch.device) -> SentenceVectors:
    """The student of a model directory, as a module to train in float32.

    Dropout stays off: the targets do not change from epoch to epoch, and a small student underfits them as it is.
    """
    model = SentenceTransformer(str(directory), device=str(device), trust_remote_code=False, local_files_only=True)
    if device.type == "cpu":
        keep_freed_memory()
        keep_few_kernels(min(cores(), MAX_LANES))
    student = SentenceVectors(model.float()).eval().requires_grad_(True)
    if (pooler := getattr(body_of(model), "pooler", None)) is not None:
        # No vector comes of it, and processes that exchange gradients would wait for one that never is.
        pooler.requires_grad_(False)
    return student


def total_steps(num_samples: int, config: DistillationConfig) -> int:
    """Steps of the whole run."""
    return SampleOrder(num_samples, config.batch_size, config.seed).steps_per_epoch * config.epochs


def new_state(model: nn.Module, num_samples: int, config: DistillationConfig) -> TrainState:
    """The state before the first step."""
    return TrainState(
        model, build_optimizer(model, config.optimizer), config.optimizer, total_steps(num_samples, config)
    )


def distil(state: TrainState, dataset: DistillationSet, config: DistillationConfig) -> Iterator[Step]:
    """Take the steps that are left, one each time the caller asks for the next."""
    device = next(state.model.parameters()).device
    dtype = resolve_dtype(config.dtype, device)
    budget = resolve_budget(config.micro_batch_tokens, device)
    student = unwrapped(state.model)
    order = SampleOrder(len(dataset), config.batch_size, config.seed)
    for rows in order.batches(state.step, state.total_steps):
        mine = share_of_rank(rows, dataset.lengths(rows))
        tokens, targets = dataset.samples(mine)
        result = train_step(state, Batch(tokens, targets, len(rows)), config.loss, budget, dtype, student.collate)
        yield Step(state.step, mine.tolist(), result)


def unwrapped(model: nn.Module) -> SentenceVectors:
    """The student itself, where it is wrapped for distributed training."""
    inner = bare(model)
    assert isinstance(inner, SentenceVectors)  # noqa: S101 (narrows the type)
    return inner


def resolve_budget(micro_batch_tokens: int | None, device: torch.device) -> int:
    """Padded tokens of one forward and backward: as given, or fit for the device."""
    return micro_batch_tokens or (CUDA_MICRO_BATCH_TOKENS if device.type == "cuda" else CPU_MICRO_BATCH_TOKENS)


def resolve_dtype(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The arithmetic that `auto` stands for on this device; never float16, whose gradients would need scaling."""
    if name == "auto":
        return torch.bfloat16 if fast_dtype(device) == torch.bfloat16 else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


@torch.inference_mode()
def validation_cosine(model: nn.Module, dataset: DistillationSet, dtype: torch.dtype) -> float:
    """Mean cosine to the teacher over the validation set, shared among the processes."""
    device = next(model.parameters()).device
    student = unwrapped(model)
    rows = np.arange(rank(), len(dataset), world_size())
    total = torch.zeros(2, device=device, dtype=torch.float64)
    for part in token_budget_batches(dataset.lengths(rows), CPU_MICRO_BATCH_TOKENS):
        tokens, targets = dataset.samples(rows[part])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            vectors = student(**student.collate(tokens))
        total[0] += nn.functional.cosine_similarity(vectors.float(), targets.to(device), dim=-1).sum()
        total[1] += len(part)
    all_reduce_sum(total)
    return float(total[0] / total[1])


def write_trained(directory: Path, initial: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the directory of the model that training began with, with the trained weights."""
    trained = load_student(initial, torch.device("cpu"))
    trained.load_state_dict(weights)
    # What the model it began with was measured to do says nothing of this one.
    others = shutil.ignore_patterns(MANIFEST_NAME, EVALUATION_NAME)
    shutil.copytree(initial, directory, dirs_exist_ok=True, ignore=others)
    body_of(trained.model).save_pretrained(directory)
    modules = json.loads((initial / "modules.json").read_text())
    for entry, module in list(zip(modules, trained.model.children(), strict=True))[1:]:
        if state := module.state_dict():
            save_file(state, directory / entry["path"] / "model.safetensors")


class Rates(NamedTuple):
    """What this machine does in a second."""

    teacher_texts_per_s: float
    student_samples_per_s: float


def measure_rates(teacher: Encoder, student: Path, texts: Sequence[str], config: DistillationConfig) -> Rates:
    """The rates of teacher vectors and of training steps on `texts` (prompts included), model loading excluded."""
    tokens = teacher.tokenise(texts)
    seconds = []
    for _ in range(TEACHER_RUNS):
        start = time.perf_counter()
        vectors = teacher.encode_tokens(tokens, normalise=False).astype(np.float16)
        seconds.append(time.perf_counter() - start)

    model = load_student(student, teacher.model.device)
    dataset = DistillationSet.of(Encoder.of(model.model).tokenise(texts), vectors)
    config = config.model_copy(update={"batch_size": min(config.batch_size, len(texts))})
    state = new_state(model, len(dataset), config)
    state.total_steps = WARM_UP_STEPS + RATE_STEPS
    rates = []
    start = time.perf_counter()
    for step in distil(state, dataset, config):
        rates.append(len(step.ids) / (time.perf_counter() - start))
        start = time.perf_counter()
    # The first runs pay for allocations.
    return Rates(len(texts) / min(seconds), median(rates[WARM_UP_STEPS:]))


class Plan(NamedTuple):
    """How much is learned from."""

    num_texts: int
    epochs: int


def plan_within(minutes: float, rates: Rates, available: int, epochs: int) -> Plan:
    """The most texts whose vectors and `epochs` fit into the minutes; where all texts do, the most epochs that fit."""
    seconds = 60 * minutes
    per_text = 1 / rates.teacher_texts_per_s + epochs / rates.student_samples_per_s
    num_texts = max(1, min(available, int(seconds / per_text)))
    if num_texts == available:
        left = seconds - available / rates.teacher_texts_per_s
        epochs = max(epochs, int(left * rates.student_samples_per_s / available))
    return Plan(num_texts, epochs)


def best_after_distilling(
    students: Sequence[Path], teacher: Encoder, texts: Sequence[str], config: DistillationConfig, num_steps: int
) -> int:
    """Which of the students is nearest to the teacher after `num_steps` on `texts` (prompts included), by cosine.

    A tenth of the texts is kept apart to decide on.
    """
    vectors = teacher.encode_tokens(teacher.tokenise(texts), normalise=False).astype(np.float16)
    num_apart = max(1, len(texts) // 10)
    scores = []
    for directory in students:
        model = load_student(directory, teacher.model.device)
        tokens = Encoder.of(model.model).tokenise(texts)
        training = DistillationSet.of(tokens[num_apart:], vectors[num_apart:])
        apart = DistillationSet.of(tokens[:num_apart], vectors[:num_apart])
        state = new_state(model, len(training), config)
        state.total_steps = num_steps
        for _ in distil(state, training, config):
            pass
        scores.append(validation_cosine(model, apart, resolve_dtype(config.dtype, teacher.model.device)))
    return int(np.argmax(scores))
