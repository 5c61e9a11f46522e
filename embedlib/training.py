"""One process' view of training: the state, the order of samples, the schedule and one optimiser step.

The arithmetic does not depend on how a batch is cut: a batch of samples split into micro-batches, or over processes,
gives the gradient of the whole batch. Where the loss couples the vectors (a Gram term, contrast) and the batch is too
large for one graph, they are embedded without gradient, then once more with it, as in GradCache (Gao et al. 2021,
arXiv:2101.06983).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from embedlib.artifact import fingerprint
from embedlib.batching import TokenIds, padded_size, token_budget_batches
from embedlib.collectives import all_gather_rows, all_reduce_max, all_reduce_sum, rank, world_size
from embedlib.config import Config
from embedlib.errors import ConfigError, DataError
from embedlib.losses import LossConfig, distillation_loss
from embedlib.packing import Collate
from embedlib.threads import side_by_side

# Up to so many padded tokens of a process, or those of one micro-batch, the graph of its whole batch is kept.
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
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer's learning rate is that of the layer above times this."""
    frozen_blocks: int = Field(default=0, ge=0)
    """So many of the lowest blocks stay as they are: 1 the token embeddings, 2 the first layer as well, and so on."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Share that a running average of the weights keeps of itself in a step; the average is what is kept in the end."""


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
    num_padding: int
    """Padding computed with them; none where sequences are laid end to end."""
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
    seed: int = 0
    """Decides what dropout leaves out, anew in every step and process."""
    step: int = 0
    """Steps done; with batch size, seed and number of samples it is the data cursor, at any world size."""
    head: nn.Module = field(default_factory=nn.Identity)
    """What is trained with the model and thrown away: projections of the loss. The same in every process."""
    averaged: dict[str, torch.Tensor] = field(default_factory=dict)
    """The running average of the model's weights, where the configuration asks for one."""

    def parameters(self) -> list[nn.Parameter]:
        """All weights that are trained."""
        return [each for part in (self.model, self.head) for each in part.parameters() if each.requires_grad]

    def follow(self) -> None:
        """Move the running average towards the weights; the first steps, which it would long be full of, weigh less."""
        if self.config.average is None:
            return
        kept = min(self.config.average, (1 + self.step) / (10 + self.step))
        for name, weights in bare(self.model).state_dict().items():
            if name in self.averaged:
                self.averaged[name].lerp_(weights, 1 - kept)
            else:
                self.averaged[name] = weights.clone()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """For a while the model has the running average for its weights, where there is one: that is what is kept."""
        if not self.averaged:
            yield
            return
        own = {name: weights.clone() for name, weights in bare(self.model).state_dict().items()}
        bare(self.model).load_state_dict(self.averaged)
        try:
            yield
        finally:
            bare(self.model).load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, step, head and average; weights are saved apart, as safetensors."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "head": self.head.state_dict(),
            "averaged": self.averaged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.head.load_state_dict(state["head"])
        device = next(self.model.parameters()).device
        self.averaged = {name: weights.to(device) for name, weights in state["averaged"].items()}


def bare(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped for several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def build_optimizer(model: nn.Module, config: OptimizerConfig, head: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW in groups, so that LayerNorm and bias are not decayed, and lower layers learn more slowly if so wished."""
    named = list(model.named_parameters())
    top = _top_block(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {(top, False): [], (top, True): []}
    for name, parameter in named:
        block = _block(name, top)
        if parameter.requires_grad:
            groups.setdefault((block if config.layer_decay < 1 else top, name.endswith(NO_DECAY)), []).append(parameter)
    if head is not None:
        groups[top, False] += head.parameters()
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if plain else config.weight_decay,
                "rate": config.layer_decay ** (top - block),
            }
            for (block, plain), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def freeze_blocks(model: nn.Module, num_blocks: int) -> None:
    """Switch off the lowest blocks: 1 the token embeddings, 2 the first layer as well, and so on.

    Before `model` is wrapped for several processes, which would wait for their gradients.
    """
    top = _top_block(model)
    if num_blocks > top:
        raise ConfigError(f"optimizer.frozen_blocks: {num_blocks} of the model's {top + 1}; expected {top} at most")
    for name, parameter in model.named_parameters():
        if _block(name, top) < num_blocks:
            parameter.requires_grad_(False)


def _top_block(model: nn.Module) -> int:
    return max(_block(name, 0) for name, _ in model.named_parameters())


def _block(name: str, top: int) -> int:
    """How high a parameter stands: 0 embeddings, n the n-th layer; `top` what lies above or elsewhere."""
    if found := re.search(r"\blayers?\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if "embeddings." in name else top


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
    """One optimiser step of distillation, in micro-batches of at most `batch_tokens` padded tokens."""
    targets = batch.targets.to(_device(state))
    every_target = all_gather_rows(targets)[0] if loss.couples_rows else targets

    def of_batch(vectors: torch.Tensor, own: slice) -> Iterator[torch.Tensor]:
        if loss.couples_rows:
            yield distillation_loss(vectors, every_target, loss)[own].sum() / batch.total_rows
        else:
            yield distillation_loss(vectors[own], targets, loss).sum() / batch.total_rows

    def of_rows(vectors: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return distillation_loss(vectors, targets[rows], loss).sum() / batch.total_rows

    arithmetic = Arithmetic(batch_tokens, dtype, collate)
    return optimise(state, batch.tokens, of_batch, arithmetic, None if loss.couples_rows else of_rows)


class Arithmetic(NamedTuple):
    """How forward and backward are computed."""

    batch_tokens: int
    """Padded tokens of one forward and backward at most."""
    dtype: torch.dtype
    collate: Collate


BatchLoss = Callable[[torch.Tensor, slice], Iterator[torch.Tensor]]
"""From the vectors of all processes, in rank order, and which are this process' own: the terms whose sum over all
processes is the mean loss of the batch. One at a time, so that a large batch is never compared with itself at once."""
RowLoss = Callable[[torch.Tensor, npt.NDArray[np.int64]], torch.Tensor]
"""From the vectors of some of this process' rows, and which: what they add to the mean loss of the batch."""


def optimise(
    state: TrainState,
    tokens: Sequence[TokenIds],
    of_batch: BatchLoss,
    arithmetic: Arithmetic,
    of_rows: RowLoss | None = None,
) -> StepResult:
    """One optimiser step on this process' texts; `of_rows` is given where rows do not depend on each other."""
    device = _device(state)
    if state.model.training:
        # By the step, so that a resumed run goes on as if it had not stopped, whatever the device.
        torch.manual_seed(int(fingerprint(seed=state.seed, step=state.step, process=rank())[:15], 16))
    lengths = np.array([len(sequence) for sequence in tokens])
    micro_batches = list(token_budget_batches(lengths, arithmetic.batch_tokens))
    # Nothing is used twice within one forward, and a cache would be one for all threads.
    mixed = arithmetic.dtype != torch.float32
    autocast = torch.autocast(device.type, arithmetic.dtype, enabled=mixed, cache_enabled=False)

    padding: dict[int, int] = {}  # by the first row of a micro-batch, which may be embedded twice

    def embed(rows: npt.NDArray[np.int64]) -> torch.Tensor:
        features = arithmetic.collate([tokens[row] for row in rows])
        padding[int(rows[0])] = features["input_ids"].numel() - int(lengths[rows].sum())
        with autocast:
            vectors: torch.Tensor = state.model(**features)
        return vectors.float()

    backward = Backward(state.model, embed, of_batch)
    padded_tokens = padded_size(lengths, micro_batches)
    num_lanes = _num_lanes(state.model, device)
    if num_lanes > 1 and padded_tokens <= WHOLE_GRAPH_TOKENS:
        shares = [dealt(lengths, number, num_lanes) for number in range(num_lanes)]
        budget = arithmetic.batch_tokens
        lanes = [[share[rows] for rows in token_budget_batches(lengths[share], budget)] for share in shares]
        total_loss = backward.in_lanes(lanes)
    elif of_rows:
        total_loss = backward.by_row(micro_batches, of_rows)
    # All processes must agree, or their exchanges would meet in different orders.
    elif all_reduce_max(padded_tokens, device) <= max(WHOLE_GRAPH_TOKENS, arithmetic.batch_tokens):
        total_loss = backward.whole(micro_batches)
    else:
        total_loss = backward.twice(micro_batches)
    for group in state.optimizer.param_groups:
        group["lr"] = group.get("rate", 1.0) * learning_rate(state.step, state.total_steps, state.config)
    for parameter in state.head.parameters():
        # Each process has that of its own part of the loss.
        parameter.grad = all_reduce_sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    norm = nn.utils.clip_grad_norm_(state.parameters(), state.config.max_grad_norm)
    if not norm.isfinite():
        raise DataError(
            f"step {state.step + 1}: the gradient is not finite; expected a smaller learning rate, or float32"
        )
    state.optimizer.step()
    state.follow()
    state.optimizer.zero_grad()
    state.step += 1
    return StepResult(total_loss, int(lengths.sum()), sum(padding.values()), float(norm))


def _device(state: TrainState) -> torch.device:
    return next(state.model.parameters()).device


Embed = Callable[[npt.NDArray[np.int64]], torch.Tensor]
"""Rows of a batch to their vectors (rows, dim)."""
MicroBatches = list[npt.NDArray[np.int64]]


class Backward(NamedTuple):
    """Ways to the gradient of a batch's mean loss: each leaves it in the parameters and gives this process' loss."""

    model: nn.Module
    embed: Embed
    of_batch: BatchLoss

    def by_row(self, micro_batches: MicroBatches, of_rows: RowLoss) -> float:
        """Forward and backward of one micro-batch after another, for a loss that does not couple rows."""
        total = 0.0
        for rows in _exchanging_last(self.model, micro_batches):
            part = of_rows(self.embed(rows), rows)
            # DistributedDataParallel averages over processes; the rows' losses are to be added up.
            (part * world_size()).backward()
            total += part.item()
        return total

    def whole(self, micro_batches: MicroBatches) -> float:
        """All forwards, then one backward: quickest where the activations of the batch fit into memory."""
        parts = [self.embed(rows) for rows in _exchanging_last(self.model, micro_batches)]
        own_part, gradient = self._by_vectors(_in_order(parts, micro_batches))
        torch.autograd.backward(parts, [gradient[rows] * world_size() for rows in micro_batches])
        return own_part

    def twice(self, micro_batches: MicroBatches) -> float:
        """GradCache: all vectors without gradient, the loss's gradient by them, then each micro-batch again with it.

        Chance is replayed, so that dropout leaves out the same the second time.
        """
        chances, vectors = [], torch.empty(0)
        with torch.no_grad():
            for rows in micro_batches:
                chances.append(self._chance())
                part = self.embed(rows)
                if not len(vectors):
                    # In one piece: many small ones that stay would cut up the memory that activations come back to.
                    vectors = part.new_empty(sum(map(len, micro_batches)), part.shape[1])
                vectors[rows] = part
        own_part, gradient = self._by_vectors(vectors)
        del vectors  # as large as the gradient, which is all that is asked for from here on
        after = self._chance()
        for rows, chance in zip(_exchanging_last(self.model, micro_batches), chances, strict=True):
            self._replay(chance)
            ((self.embed(rows) * gradient[rows]).sum() * world_size()).backward()
        self._replay(after)
        return own_part

    def _chance(self) -> tuple[torch.Tensor, ...]:
        """The state of chance on the CPU and on the model's GPU, if it has one."""
        device = next(self.model.parameters()).device
        return torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])

    def _replay(self, chance: tuple[torch.Tensor, ...]) -> None:
        torch.set_rng_state(chance[0])
        for state in chance[1:]:
            torch.cuda.set_rng_state(state, next(self.model.parameters()).device)

    def in_lanes(self, lanes: Sequence[MicroBatches]) -> float:
        """All forwards, then all backwards, each lane of micro-batches in a thread; for one process alone."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        parts = side_by_side(lambda lane: [self.embed(rows) for rows in lane], lanes, len(lanes))
        vectors = _in_order([part for lane in parts for part in lane], [rows for lane in lanes for rows in lane])
        own_part, gradient = self._by_vectors(vectors)

        def backward(number: int) -> tuple[torch.Tensor | None, ...]:
            # Not .backward(): threads must not add to the same gradient.
            by_vectors = [gradient[rows] for rows in lanes[number]]
            return torch.autograd.grad(parts[number], parameters, by_vectors, allow_unused=True)

        by_lane = side_by_side(backward, range(len(lanes)), len(lanes))
        for parameter, *gradients in zip(parameters, *by_lane, strict=True):
            found = [each for each in gradients if each is not None]
            parameter.grad = reduce(torch.Tensor.add_, found) if found else None
        return own_part

    def _by_vectors(self, own_vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        """This process' part of the loss, and the whole loss's gradient by its own vectors (rows, dim)."""
        vectors, start = all_gather_rows(own_vectors)
        own = slice(start, start + len(own_vectors))
        vectors.requires_grad_(True)
        vectors.grad = torch.zeros_like(vectors)  # a process may have no part in a small batch
        total = 0.0
        for part in self.of_batch(vectors, own):
            part.backward()
            total += part.item()
        # Every process has the gradient of its own part by the vectors of all.
        return total, all_reduce_sum(vectors.grad)[own]


def _in_order(parts: Sequence[torch.Tensor], micro_batches: MicroBatches) -> torch.Tensor:
    """The vectors of micro-batches as rows of the batch, without gradient."""
    return torch.cat([part.detach() for part in parts])[np.argsort(np.concatenate(micro_batches))]


def _num_lanes(model: nn.Module, device: torch.device) -> int:
    """Into how many threads a batch is dealt: none but the caller's where a GPU, other processes or chance come in."""
    if device.type != "cpu" or world_size() > 1 or model.training:
        return 1
    return min(torch.get_num_threads(), MAX_LANES)


def _exchanging_last(model: nn.Module, micro_batches: MicroBatches) -> Iterator[npt.NDArray[np.int64]]:
    """The micro-batches in turn; DistributedDataParallel exchanges gradients once a step: in the last."""
    for rows in micro_batches[:-1]:
        with model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext():
            yield rows
    yield micro_batches[-1]
