"""One process' view of training: the state, the order of samples, the schedule and one optimiser step.

The arithmetic does not depend on how a batch is cut: a batch of samples split into micro-batches, or over processes,
gives the gradient of the whole batch. Where the loss couples the vectors (a Gram term) and the batch is too large for
one graph, they are embedded without gradient, then once more with it, as in GradCache (Gao et al. 2021,
arXiv:2101.06983).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from embedlib.batching import TokenIds, token_budget_batches
from embedlib.collectives import all_gather_rows, all_reduce_max, rank, world_size
from embedlib.config import Config
from embedlib.losses import LossConfig, distillation_loss
from embedlib.packing import Collate
from embedlib.threads import side_by_side

# Up to so many padded tokens of a process the graph of its whole batch is kept.
WHOLE_GRAPH_TOKENS = 16384
# Each lane holds gradients of its own.
MAX_LANES = 4
NO_DECAY = ("bias", "LayerNorm.weight", "layer_norm.weight")


class OptimizerConfig(Config):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of weights; LayerNorm and bias have none."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running-average coefficients."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""


class Batch(NamedTuple):
    """One process' share of a batch of samples."""

    tokens: Sequence[TokenIds]
    """Token ids of each sample."""
    targets: torch.Tensor
    """Teacher vectors before normalisation, (rows, dim) float32."""
    total_rows: int
    """Rows of the batch over all processes."""


class StepResult(NamedTuple):
    """What one process saw in a step."""

    loss: float
    """Sum over this process' rows ÷ rows of the whole batch; the processes' values add up to the batch's mean loss."""
    num_tokens: int
    """Tokens embedded by this process, padding excluded."""
    grad_norm: float
    """Length of the whole batch's gradient before clipping."""


@dataclass
class TrainState:
    """All that a resumed run needs to go on as if it had not stopped."""

    model: nn.Module
    """Maps what the collator makes of a batch to vectors (batch, dim) before normalisation."""
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    total_steps: int
    step: int = 0
    """Steps done; with batch size, seed and number of samples it is the data cursor, at any world size."""

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, step and random state; weights are saved apart, as safetensors."""
        return {"optimizer": self.optimizer.state_dict(), "step": self.step, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        torch.set_rng_state(state["rng"])


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in two groups, so that LayerNorm and bias are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(NO_DECAY) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then cosine decay to zero."""
    warmup_steps = max(1, round(config.warmup_fraction * total_steps))
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class SampleOrder(NamedTuple):
    """Which samples each step sees: a fresh permutation every epoch, every sample once an epoch."""

    num_samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch: what does not fill a batch is spread over the others, so none is ever small."""
        return max(1, self.num_samples // self.batch_size)

    def batches(self, first_step: int, last_step: int) -> Iterator[npt.NDArray[np.int64]]:
        """Sample indices of the whole batch of each step from `first_step` up to `last_step`, excluded."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first_step, last_step):
            wanted, within = divmod(step, self.steps_per_epoch)
            if wanted != epoch:
                epoch, order = wanted, np.random.default_rng([self.seed, wanted]).permutation(self.num_samples)
            start, end = (edge * self.num_samples // self.steps_per_epoch for edge in (within, within + 1))
            yield order[start:end]


def share_of_rank(rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """This process' rows of a batch: dealt out by length, so that all processes have about as many tokens."""
    return rows[dealt(lengths, rank(), world_size())]


def dealt(lengths: npt.NDArray[np.int64], number: int, num_shares: int) -> npt.NDArray[np.int64]:
    """Indices of share `number`, longest first, where all shares get about as many tokens."""
    return np.argsort(-lengths, kind="stable")[number::num_shares]


def train_step(
    state: TrainState, batch: Batch, loss: LossConfig, batch_tokens: int, dtype: torch.dtype, collate: Collate
) -> StepResult:
    """One optimiser step on `batch`, forward and backward in micro-batches of at most `batch_tokens` padded tokens."""
    device = next(state.model.parameters()).device
    lengths = np.array([len(tokens) for tokens in batch.tokens])
    micro_batches = list(token_budget_batches(lengths, batch_tokens))
    # Nothing is used twice within one forward, and a cache would be one for all threads.
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    def embed(rows: npt.NDArray[np.int64]) -> torch.Tensor:
        with autocast:
            vectors: torch.Tensor = state.model(**collate([batch.tokens[row] for row in rows]))
        return vectors.float()

    backward = Backward(state.model, embed, batch.targets.to(device), batch.total_rows, loss)
    padded_tokens = sum(len(rows) * int(lengths[rows].max()) for rows in micro_batches)
    num_lanes = _num_lanes(state.model, device)
    if num_lanes > 1 and padded_tokens <= WHOLE_GRAPH_TOKENS:
        shares = [dealt(lengths, number, num_lanes) for number in range(num_lanes)]
        lanes = [[share[rows] for rows in token_budget_batches(lengths[share], batch_tokens)] for share in shares]
        total_loss = backward.in_lanes(lanes)
    elif not loss.couples_rows:
        total_loss = backward.by_row(micro_batches)
    # All processes must agree, or their exchanges would meet in different orders.
    elif all_reduce_max(padded_tokens, device) <= WHOLE_GRAPH_TOKENS:
        total_loss = backward.whole(micro_batches)
    else:
        total_loss = backward.twice(micro_batches)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, state.total_steps, state.config)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), state.config.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return StepResult(total_loss, int(lengths.sum()), float(norm))


Embed = Callable[[npt.NDArray[np.int64]], torch.Tensor]
"""Rows of a batch to their vectors (rows, dim)."""
MicroBatches = list[npt.NDArray[np.int64]]


class Backward(NamedTuple):
    """Ways to the gradient of a batch's mean loss: each leaves it in the parameters and gives this process' loss."""

    model: nn.Module
    embed: Embed
    targets: torch.Tensor
    """Teacher vectors (rows, dim) of this process' rows."""
    total_rows: int
    """Rows of the batch over all processes."""
    loss: LossConfig

    def by_row(self, micro_batches: MicroBatches) -> float:
        """Forward and backward of one micro-batch after another, for a loss that does not couple rows."""
        total = 0.0
        for rows in _exchanging_last(self.model, micro_batches):
            scalar = distillation_loss(self.embed(rows), self.targets[rows], self.loss).sum() / self.total_rows
            # DistributedDataParallel averages over processes; the rows' losses are to be added up.
            (scalar * world_size()).backward()
            total += scalar.item()
        return total

    def whole(self, micro_batches: MicroBatches) -> float:
        """All forwards, then one backward: quickest where the activations of the batch fit into memory."""
        parts = [self.embed(rows) for rows in _exchanging_last(self.model, micro_batches)]
        joined = joined_loss(_in_batch_order(parts, micro_batches), self.targets, self.total_rows, self.loss)
        (joined.whole * world_size()).backward()
        return joined.own_part

    def twice(self, micro_batches: MicroBatches) -> float:
        """GradCache: all vectors without gradient, the loss's gradient by them, then each micro-batch again with it."""
        with torch.no_grad():
            parts = [self.embed(rows) for rows in micro_batches]
        own_part, gradient = self._by_vectors(parts, micro_batches)
        for rows in _exchanging_last(self.model, micro_batches):
            ((self.embed(rows) * gradient[rows]).sum() * world_size()).backward()
        return own_part

    def in_lanes(self, lanes: Sequence[MicroBatches]) -> float:
        """All forwards, then all backwards, each lane of micro-batches in a thread; for one process alone."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        parts = side_by_side(lambda lane: [self.embed(rows) for rows in lane], lanes, len(lanes))
        detached = [part.detach() for lane in parts for part in lane]
        own_part, gradient = self._by_vectors(detached, [rows for lane in lanes for rows in lane])

        def backward(number: int) -> tuple[torch.Tensor | None, ...]:
            # Not .backward(): threads must not add to the same gradient.
            by_vectors = [gradient[rows] for rows in lanes[number]]
            return torch.autograd.grad(parts[number], parameters, by_vectors, allow_unused=True)

        by_lane = side_by_side(backward, range(len(lanes)), len(lanes))
        for parameter, *gradients in zip(parameters, *by_lane, strict=True):
            found = [each for each in gradients if each is not None]
            parameter.grad = reduce(torch.Tensor.add_, found) if found else None
        return own_part

    def _by_vectors(self, parts: list[torch.Tensor], micro_batches: MicroBatches) -> tuple[float, torch.Tensor]:
        """This process' part of the loss, and the loss's gradient by its vectors (rows, dim)."""
        own = _in_batch_order(parts, micro_batches).requires_grad_(True)
        joined = joined_loss(own, self.targets, self.total_rows, self.loss)
        (gradient,) = torch.autograd.grad(joined.whole, own)
        return joined.own_part, gradient


def _num_lanes(model: nn.Module, device: torch.device) -> int:
    """Into how many threads a batch is dealt: none but the caller's where a GPU, other processes or chance come in."""
    if device.type != "cpu" or world_size() > 1 or model.training:
        return 1
    return min(torch.get_num_threads(), MAX_LANES)


def _in_batch_order(parts: list[torch.Tensor], micro_batches: MicroBatches) -> torch.Tensor:
    return torch.cat(parts)[np.argsort(np.concatenate(micro_batches))]


class JoinedLoss(NamedTuple):
    """A loss over the rows of all processes."""

    whole: torch.Tensor
    """The mean over all rows, differentiable by this process' vectors."""
    own_part: float
    """What this process' rows add to it."""


def joined_loss(own: torch.Tensor, targets: torch.Tensor, total_rows: int, loss: LossConfig) -> JoinedLoss:
    """The loss of `own` vectors (rows, dim) together with those of the other processes, which stay constant."""
    gathered, start = all_gather_rows(own)
    end = start + len(own)
    joined = torch.cat([gathered[:start], own, gathered[end:]])
    by_row = distillation_loss(joined, all_gather_rows(targets)[0], loss) / total_rows
    return JoinedLoss(by_row.sum(), by_row[start:end].sum().item())


def _exchanging_last(model: nn.Module, micro_batches: MicroBatches) -> Iterator[npt.NDArray[np.int64]]:
    """The micro-batches in turn; DistributedDataParallel exchanges gradients once a step: in the last."""
    for rows in micro_batches[:-1]:
        with model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext():
            yield rows
    yield micro_batches[-1]
