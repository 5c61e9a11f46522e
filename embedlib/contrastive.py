"""Train an encoder on queries, positives and negatives: the loop of one process, with no cluster in sight."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from embedlib.batching import NO_TEXT, token_budget_batches
from embedlib.collectives import all_gather_rows, rank, world_size
from embedlib.config import Config
from embedlib.dataset import ContrastiveSet
from embedlib.distillation import (
    CPU_MICRO_BATCH_TOKENS,
    Step,
    load_student,
    resolve_budget,
    resolve_dtype,
    unwrapped,
)
from embedlib.metrics import spearman
from embedlib.objective import Objective, ObjectiveConfig, Objectives, Samples
from embedlib.sampling import BatchPlan
from embedlib.torch_model import SentenceVectors
from embedlib.training import (
    Arithmetic,
    BatchLoss,
    OptimizerConfig,
    TrainState,
    build_optimizer,
    dealt,
    freeze_blocks,
    optimise,
)

# Scores against the whole batch that are held at a time, and queries of a validation.
LOSS_SCORES = 1 << 20
RANKED_QUERIES = 512
MRR_DEPTH = 10


class ContrastiveConfig(Config):
    """How the encoder learns."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the samples."""
    batch_size: int = Field(default=256, ge=2)
    """Samples of one optimiser step, over all workers: each is told apart from all others of it."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is asked of the vectors, where a dataset does not say it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the weights move."""
    sampling_temperature: float = Field(default=1.0, ge=0, le=1)
    """A group of samples weighs (their number)**temperature: below 1 small ones come more often than large ones."""
    dropout: bool = False
    """Whether the model's dropout is on."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of one forward and backward; none: fit for the device. Memory follows it, not the batch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 where the hardware is faster with it. Weights stay float32."""
    seed: int = 0
    """Decides the order of the samples and dropout."""


def batch_plan(dataset: ContrastiveSet, config: ContrastiveConfig) -> BatchPlan:
    """The batches of every epoch. No query and no positive comes twice in one, but in those of what is left over; two
    samples may share a negative."""
    return BatchPlan(dataset.groups, dataset.samples[:, :2], dataset.shares, config.batch_size, config.seed)


def load_encoder(directory: Path, device: torch.device, config: ContrastiveConfig) -> SentenceVectors:
    """The model of a directory, as a module to train in float32."""
    torch.manual_seed(config.seed)
    model = load_student(directory, device).train(config.dropout)
    freeze_blocks(model, config.optimizer.frozen_blocks)
    return model


def start_contrast(
    model: nn.Module, dataset: ContrastiveSet, config: ContrastiveConfig, objectives: Sequence[ObjectiveConfig] = ()
) -> TrainState:
    """The state before the first step; `objectives` by the number of the dataset, none: the same for all."""
    plan = batch_plan(dataset, config)
    device = next(model.parameters()).device
    width = int(unwrapped(model).model.get_embedding_dimension() or 0)
    teacher = dataset.vectors["teacher"].shape[1] if "teacher" in dataset.vectors else None
    head = Objectives(objectives or [config.objective] * dataset.num_datasets, width, teacher).to(device)
    optimizer = build_optimizer(model, config.optimizer, head)
    total = sum(len(plan.epoch(epoch)) for epoch in range(config.epochs))
    return TrainState(model, optimizer, config.optimizer, total, config.seed, head=head)


def contrast(state: TrainState, dataset: ContrastiveSet, config: ContrastiveConfig) -> Iterator[Step]:
    """Take the steps that are left, one each time the caller asks for the next."""
    device = next(state.model.parameters()).device
    budget = resolve_budget(config.micro_batch_tokens, device)
    arithmetic = Arithmetic(budget, resolve_dtype(config.dtype, device), unwrapped(state.model).collate)
    for rows in batches_after(batch_plan(dataset, config), state.step, config.epochs):
        texts, samples = dataset.batch(rows, device)
        # Every process embeds something: a batch of fewer texts than processes has some of them twice.
        embedded = np.resize(texts, max(len(texts), world_size()))
        lengths = dataset.lengths(embedded)
        shares = [dealt(lengths, number, world_size()) for number in range(world_size())]
        in_order = torch.from_numpy(np.argsort(np.concatenate(shares))[: len(texts)]).to(device)
        first, last = (len(rows) * number // world_size() for number in (rank(), rank() + 1))
        assert isinstance(state.head, Objectives)  # noqa: S101 (narrows the type)
        # All samples of a batch are of one dataset.
        objective = state.head.of_datasets[int(dataset.datasets_of(rows[:1])[0])]
        of_batch = batch_loss(objective, samples, in_order, range(first, last))
        result = optimise(state, dataset.token_ids(embedded[shares[rank()]]), of_batch, arithmetic)
        yield Step(state.step, rows[first:last].tolist(), result)


def batch_loss(objective: Objective, samples: Samples, in_order: torch.Tensor, rows: range) -> BatchLoss:
    """The loss of the samples `rows` of a batch; `in_order` brings the vectors of all processes into its order."""
    num_documents = len(samples.queries) * (1 + samples.negatives.shape[1])
    most = len(samples.queries) if objective.is_whole else max(1, LOSS_SCORES // num_documents)
    if samples.guide is not None:
        samples = samples._replace(guide=functional.normalize(samples.guide, dim=-1))

    def of_batch(vectors: torch.Tensor, own: slice) -> Iterator[torch.Tensor]:
        # Once for all rows, which add up their gradients by these before one is taken by the vectors.
        prefixes = objective.prefixes(vectors[in_order])
        leaves = [unit.detach().requires_grad_() for unit in prefixes]
        for first in range(rows.start, rows.stop, most):
            some = slice(first, min(first + most, rows.stop))
            yield objective(leaves, samples, some).sum() / len(samples.queries)
        if rows:
            torch.autograd.backward(prefixes, [leaf.grad for leaf in leaves])

    return of_batch


def batches_after(plan: BatchPlan, step: int, epochs: int) -> Iterator[npt.NDArray[np.int64]]:
    """The batches of all epochs but the first `step` of them."""
    for epoch in range(epochs):
        batches = plan.epoch(epoch)
        yield from batches[min(step, len(batches)) :]
        step = max(0, step - len(batches))


def validation_metric(dataset: ContrastiveSet) -> str:
    """Name of what `validation_score` is, which depends on whether all datasets, some or none have labels."""
    if dataset.graded.all():
        return "validation_spearman"
    return "validation_mean_of_mrr@10_and_spearman" if dataset.graded.any() else "validation_mrr@10"


def validation_score(model: nn.Module, dataset: ContrastiveSet, dtype: torch.dtype) -> float:
    """Mean of `scores_by_dataset`: each dataset counts alike, whatever its size."""
    scores = scores_by_dataset(model, dataset, dtype).values()
    return sum(scores) / len(scores)


@torch.inference_mode()
def scores_by_dataset(model: nn.Module, dataset: ContrastiveSet, dtype: torch.dtype) -> dict[int, float]:
    """How good the vectors are for each dataset, by its number.

    Spearman correlation of cosines and labels where it has labels, of all its pairs together; else `retrieval_mrr`.
    """
    used, vectors = unit_vectors(model, dataset, dtype)
    samples = np.where(dataset.samples == NO_TEXT, NO_TEXT, np.searchsorted(used, dataset.samples))
    numbers = dataset.datasets_of(np.arange(len(dataset)))
    scores = {}
    for number in np.unique(numbers).tolist():
        rows = np.flatnonzero(numbers == number)
        if dataset.labels is not None and dataset.graded[rows].all():
            queries, positives = (vectors[samples[rows, column]] for column in (0, 1))
            cosines = (queries * positives).sum(dim=-1).cpu().numpy()
            # A model that gives every text the same vector orders nothing.
            scores[number] = spearman(cosines, dataset.labels[rows]) if np.ptp(cosines) else 0.0
        else:
            scores[number] = retrieval_mrr(vectors, samples[rows])
    return scores


def unit_vectors(
    model: nn.Module, dataset: ContrastiveSet, dtype: torch.dtype
) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
    """Numbers (texts,) of the texts that samples are made of, ascending, and their unit vectors (texts, dim).

    Every process embeds its share and has those of all.
    """
    device = next(model.parameters()).device
    encoder = unwrapped(model)
    training, _ = encoder.training, encoder.eval()
    used = np.unique(dataset.samples[dataset.samples != NO_TEXT])
    mine = used[rank() :: world_size()]
    parts, order = [torch.empty(0, int(encoder.model.get_embedding_dimension() or 0), device=device)], []
    for part in token_budget_batches(dataset.lengths(mine), CPU_MICRO_BATCH_TOKENS):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            parts.append(
                functional.normalize(encoder(**encoder.collate(dataset.token_ids(mine[part]))).float(), dim=-1)
            )
        order.append(part)
    own = torch.cat(parts)[np.argsort(np.concatenate(order))] if order else parts[0]
    encoder.train(training)
    gathered, _ = all_gather_rows(own)
    numbers = np.concatenate([used[number :: world_size()] for number in range(world_size())])
    return used, gathered[np.argsort(numbers)]


def retrieval_mrr(vectors: torch.Tensor, samples: npt.NDArray[np.int64]) -> float:
    """Mean reciprocal rank, to depth 10, of the first of a query's positives among all positives and negatives.

    `vectors` (texts, dim) are unit vectors, `samples` (samples, 2 + most negatives) numbers of texts.
    """
    documents = np.unique(samples[:, 1:][samples[:, 1:] != NO_TEXT])
    distinct, of_query = np.unique(samples[:, 0], return_inverse=True)
    total = 0.0
    for first in range(0, len(distinct), RANKED_QUERIES):
        some = slice(first, min(first + RANKED_QUERIES, len(distinct)))
        scores = vectors[distinct[some]] @ vectors[documents].T
        answers = torch.zeros_like(scores, dtype=torch.bool)
        there = (of_query >= some.start) & (of_query < some.stop)
        answers[of_query[there] - some.start, np.searchsorted(documents, samples[there, 1])] = True
        # A text may be asked and answer another: that it is like itself says nothing.
        own = torch.from_numpy(distinct[some][:, None] == documents).to(vectors.device)
        scores = scores.masked_fill(own & ~answers, -torch.inf)
        best = scores.masked_fill(~answers, -torch.inf).max(dim=1, keepdim=True).values
        # What is not below the answer stands before it: a model that gives every text the same vector finds none.
        ranks = 1 + (~(scores < best) & ~answers).sum(dim=1)
        total += float((1 / ranks).where(ranks <= MRR_DEPTH, torch.zeros(1, device=vectors.device)).sum())
    return total / len(distinct)
