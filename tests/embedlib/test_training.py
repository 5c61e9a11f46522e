import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from embedlib import training
from embedlib.batching import TokenIds, pad
from embedlib.distillation import load_student
from embedlib.losses import LossConfig
from embedlib.packing import Collate
from embedlib.torch_model import SentenceVectors
from embedlib.training import (
    Batch,
    OptimizerConfig,
    SampleOrder,
    StepResult,
    TrainState,
    build_optimizer,
    learning_rate,
    share_of_rank,
    train_step,
)

LENGTHS = (3, 9, 1, 5, 14, 2, 7)
MSE_AND_COSINE, GRAM = LossConfig(), LossConfig(mse=0.5, cosine=0.5, gram=2.0)
NO_CLIPPING = OptimizerConfig(max_grad_norm=1e9)


class Mean(nn.Module):
    """The mean of projected embeddings, with dropout: small, and random while training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(8, 6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1)
        return self.dense((self.dropout(self.embedding(input_ids)).tanh() * mask).sum(1) / mask.sum(1))


def samples(lengths: tuple[int, ...] = LENGTHS, dim: int = 6) -> Batch:
    random = np.random.default_rng(0)
    tokens: list[TokenIds] = [random.integers(0, 50, length).astype(np.int32) for length in lengths]
    return Batch(tokens, torch.from_numpy(random.normal(size=(len(lengths), dim)).astype(np.float32)), len(lengths))


def state(model: nn.Module, config: OptimizerConfig = NO_CLIPPING, total_steps: int = 10) -> TrainState:
    return TrainState(model, build_optimizer(model, config), config, total_steps)


def collate_for(model: nn.Module) -> Collate:
    return model.collate if isinstance(model, SentenceVectors) else partial(pad, pad_id=1)


def step(current: TrainState, batch: Batch, loss: LossConfig, batch_tokens: int = 16) -> StepResult:
    return train_step(current, batch, loss, batch_tokens, torch.float32, collate_for(current.model))


def gradients_of_step(
    model: nn.Module, batch: Batch, loss: LossConfig, batch_tokens: int, config: OptimizerConfig = NO_CLIPPING
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """The step's result, and the gradients that its optimiser was given."""
    current, seen = state(model, config), {}

    def note(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    current.optimizer.register_step_pre_hook(note)
    return step(current, batch, loss, batch_tokens), seen


@pytest.mark.parametrize("whole_graph_tokens", [16384, 0])
def test_padding_is_counted_once_though_batches_are_embedded_twice(
    whole_graph_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WHOLE_GRAPH_TOKENS", whole_graph_tokens)
    assert step(state(Mean()), samples(), GRAM, 16).num_padding == 14 + 9 + 2 * 7 + 3 * 3 - sum(LENGTHS)
    assert step(state(Mean()), samples(), GRAM, 98).num_padding == 7 * 14 - sum(LENGTHS)


@pytest.mark.parametrize("loss", [MSE_AND_COSINE, GRAM])
def test_micro_batches_change_nothing(tiny_encoder: Path, loss: LossConfig) -> None:
    device = torch.device("cpu")
    batch = samples(dim=32)
    cut, cut_gradients = gradients_of_step(load_student(tiny_encoder, device), batch, loss, 16)
    whole, whole_gradients = gradients_of_step(load_student(tiny_encoder, device), batch, loss, 10**6)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert cut.num_tokens == whole.num_tokens == sum(LENGTHS)
    assert cut.num_padding == whole.num_padding == 0  # laid end to end
    assert (
        cut_gradients.keys()
        == whole_gradients.keys()
        == dict(load_student(tiny_encoder, device).named_parameters()).keys()
    )
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [MSE_AND_COSINE, GRAM])
@pytest.mark.parametrize("batch_tokens", [16, 10**6])
def test_threads_change_nothing(tiny_encoder: Path, loss: LossConfig, batch_tokens: int) -> None:
    device, threads = torch.device("cpu"), torch.get_num_threads()
    batch = samples(dim=32)
    alone, expected = gradients_of_step(load_student(tiny_encoder, device), batch, loss, batch_tokens)
    torch.set_num_threads(3)
    try:
        shared, gradients = gradients_of_step(load_student(tiny_encoder, device), batch, loss, batch_tokens)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-5)
    assert shared.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [MSE_AND_COSINE, GRAM])
def test_the_gradient_is_that_of_the_mean_loss(loss: LossConfig) -> None:
    torch.manual_seed(0)
    model, batch = Mean(), samples()
    result, gradients = gradients_of_step(model, batch, loss, 16)
    torch.manual_seed(0)
    model = Mean()
    vectors = torch.cat([model(**pad([tokens], 1)) for tokens in batch.tokens])
    expected = training.distillation_loss(vectors, batch.targets, loss).mean()
    expected.backward()
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_long_gradients_are_cut_to_the_limit() -> None:
    config = OptimizerConfig(max_grad_norm=0.01)
    result, gradients = gradients_of_step(Mean(), samples(), MSE_AND_COSINE, 16, config)
    assert result.grad_norm > 0.1
    assert math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) == pytest.approx(0.01, rel=1e-3)


def test_a_step_uses_its_learning_rate_and_forgets_its_gradient() -> None:
    model = Mean()
    current = state(model, OptimizerConfig(learning_rate=0.5, warmup_fraction=0.4))
    rates = []
    for _ in range(10):
        step(current, samples(), MSE_AND_COSINE)
        rates.append(current.optimizer.param_groups[0]["lr"])
        assert current.optimizer.param_groups[1]["lr"] == rates[-1]
    assert current.step == 10
    assert rates == [learning_rate(number, 10, current.config) for number in range(10)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    current = state(Mean(), OptimizerConfig(learning_rate=0.1), 60)
    losses = [step(current, samples(), MSE_AND_COSINE).loss for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]


@given(st.integers(1, 500), st.floats(0, 0.9))
def test_the_schedule_rises_to_the_peak_and_falls_to_zero(total: int, fraction: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=fraction)
    rates = [learning_rate(number, total, config) for number in range(total + 1)]
    peak = max(1, round(fraction * total))
    assert rates[: peak - 1] == sorted(rates[: peak - 1])
    assert rates[peak - 1] == 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)
    if peak < total:
        assert rates[total] == pytest.approx(0)


def test_the_schedule_by_hand() -> None:
    config = OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.1)
    rates = {number: learning_rate(number, 100, config) for number in (0, 4, 9, 10, 40, 55, 100, 101)}
    assert rates == pytest.approx(
        {0: 2e-4, 4: 1e-3, 9: 2e-3, 10: 2e-3, 40: 1e-3 * (1 + math.cos(math.pi / 3)), 55: 1e-3, 100: 0, 101: 0}
    )
    assert learning_rate(0, 100, OptimizerConfig(learning_rate=1.0, warmup_fraction=0)) == 1


def test_layer_norm_and_bias_are_not_decayed(tiny_encoder: Path) -> None:
    model = load_student(tiny_encoder, torch.device("cpu"))
    decayed, plain = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain_names = {names.pop(id(parameter)) for parameter in plain["params"]}
    assert all("LayerNorm" in name or name.endswith("bias") for name in plain_names)
    decayed_names = {names.pop(id(parameter)) for parameter in decayed["params"]}
    assert not names
    assert all("LayerNorm" not in name and name.endswith("weight") for name in decayed_names)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}


def test_frozen_weights_are_left_out() -> None:
    model = Mean()
    model.embedding.requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 2


orders = st.builds(SampleOrder, st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))


@given(orders, st.integers(1, 3))
def test_every_sample_once_an_epoch(order: SampleOrder, epochs: int) -> None:
    steps = list(order.batches(0, epochs * order.steps_per_epoch))
    # What does not fill a batch is spread over the others: none is so small that a process would have no row.
    assert all(min(order.batch_size, order.num_samples) <= len(rows) < 2 * order.batch_size for rows in steps)
    seen = np.concatenate(steps).reshape(epochs, order.num_samples)
    assert (np.sort(seen, axis=1) == np.arange(order.num_samples)).all()


@given(orders, st.data())
def test_an_order_taken_up_at_any_step_is_the_same(order: SampleOrder, data: st.DataObject) -> None:
    last = 3 * order.steps_per_epoch
    first = data.draw(st.integers(0, last))
    whole = [rows.tolist() for rows in order.batches(0, last)]
    assert [rows.tolist() for rows in order.batches(first, last)] == whole[first:]


def test_epochs_and_seeds_differ() -> None:
    first, second = (rows.tolist() for rows in SampleOrder(40, 40, 0).batches(0, 2))
    (other,) = SampleOrder(40, 40, 1).batches(0, 1)
    assert first != second
    assert first != other.tolist()


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 5))
def test_the_shares_of_all_ranks_are_the_batch_and_even_in_tokens(lengths: list[int], world: int) -> None:
    rows, by_row = np.arange(len(lengths)) * 3, np.array(lengths)
    shares = []
    for number in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "rank", lambda number=number: number)
            patch.setattr(training, "world_size", lambda: world)
            shares.append(share_of_rank(rows, by_row))
    assert sorted(np.concatenate(shares).tolist()) == rows.tolist()
    tokens = [int(by_row[share // 3].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_resumed_run_goes_on_bitwise(cut: int) -> None:
    def start() -> TrainState:
        torch.manual_seed(0)
        return state(Mean(dropout=0.3), OptimizerConfig(learning_rate=0.1), 8)

    def go(current: TrainState, steps: int) -> list[float]:
        return [step(current, samples(), GRAM).loss for _ in range(steps)]

    whole = start()
    losses = go(whole, 8)

    first = start()
    head = go(first, cut)
    file = io.BytesIO()
    torch.save({"weights": first.model.state_dict(), "state": first.state_dict()}, file)
    torch.manual_seed(1234)
    second = state(Mean(dropout=0.3), OptimizerConfig(learning_rate=0.1), 8)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second.model.load_state_dict(saved["weights"])
    second.load_state_dict(saved["state"])
    assert second.step == cut
    assert head + go(second, 8 - cut) == losses
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name])
