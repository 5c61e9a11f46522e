"""Two gloo processes against one process on the joined batch."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from embedlib.collectives import all_gather_rows, all_reduce_sum, rank, world_size
from embedlib.dataset import DistillationSet
from embedlib.distillation import DistillationConfig, distil, load_student, new_state, validation_cosine
from embedlib.losses import LossConfig
from embedlib.training import OptimizerConfig

LENGTHS = (3, 9, 1, 5, 14, 2, 7, 4, 30, 6, 11)
LOSSES = {"mse and cosine": LossConfig(), "gram": LossConfig(mse=0.5, cosine=0.5, gram=2.0)}
# Odd batches, so that one process has a row less: a step an epoch, and three of them.
SIZES = ((7, 7), (9, 3))


def dataset(num_samples: int) -> DistillationSet:
    random = np.random.default_rng(0)
    tokens = [random.integers(4, 60, length).astype(np.int32) for length in LENGTHS[:num_samples]]
    return DistillationSet.of(tokens, random.normal(size=(num_samples, 32)).astype(np.float16))


def train(student: Path, loss: LossConfig, num_samples: int, batch_size: int) -> dict[str, Any]:
    """Two epochs: each step's loss, samples, norm and gradients, then the weights and the cosine they reach."""
    config = DistillationConfig(
        batch_size=batch_size,
        loss=loss,
        # A warm learning rate, so that the weights after several steps tell whether every step was the same.
        optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e9),
        micro_batch_tokens=16,
        dtype="float32",
    )
    plain = load_student(student, torch.device("cpu"))
    model = DistributedDataParallel(plain) if world_size() > 1 else plain
    samples = dataset(num_samples)
    state = new_state(model, num_samples, config)
    gradients: list[dict[str, torch.Tensor]] = []

    def note(*_: Any) -> None:
        gradients.append({n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None})

    state.optimizer.register_step_pre_hook(note)
    steps = list(distil(state, samples, config))
    return {
        "losses": [step.result.loss for step in steps],
        "ids": [step.ids for step in steps],
        "norms": [step.result.grad_norm for step in steps],
        "gradients": gradients,
        "weights": {name: weights.clone() for name, weights in plain.state_dict().items()},
        "cosine": validation_cosine(model, samples, torch.float32),
    }


def gather() -> dict[str, Any]:
    """What each process has after exchanging rows of unequal number."""
    found = {}
    for name, counts in {"unequal": (3, 1), "none": (2, 0)}.items():
        rows = torch.full((counts[rank()], 2), float(rank()), requires_grad=True)
        found[name] = all_gather_rows(rows)
    return found | {"sum": all_reduce_sum(torch.tensor([1.0, rank()])), "rank": rank(), "world": world_size()}


def work(number: int, folder: Path, student: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    found: dict[str, Any] = {"gather": gather()}
    for loss, (num_samples, batch_size) in product(LOSSES, SIZES):
        found[f"{loss} {num_samples}"] = train(student, LOSSES[loss], num_samples, batch_size)
    torch.save(found, folder / f"{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (folder, tiny_encoder), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def assert_same_as_one_process(processes: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    first, second = processes
    for step, ids in enumerate(alone["ids"]):
        assert sorted(first["ids"][step] + second["ids"][step]) == sorted(ids)
        assert first["losses"][step] + second["losses"][step] == pytest.approx(alone["losses"][step], rel=1e-5)
        for process in processes:
            assert process["norms"][step] == pytest.approx(alone["norms"][step], rel=1e-5)
            assert process["gradients"][step].keys() == alone["gradients"][step].keys()
            for name, gradient in alone["gradients"][step].items():
                torch.testing.assert_close(process["gradients"][step][name], gradient, rtol=1e-4, atol=1e-5)
    for process in processes:
        for name, weights in alone["weights"].items():
            torch.testing.assert_close(process["weights"][name], weights, rtol=0, atol=2e-5)
            assert torch.equal(process["weights"][name], first["weights"][name])
        assert process["cosine"] == pytest.approx(alone["cosine"], abs=1e-5)


@pytest.mark.parametrize(("num_samples", "batch_size"), SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_are_one_on_the_joined_batch(
    processes: list[dict[str, Any]], tiny_encoder: Path, loss: str, num_samples: int, batch_size: int
) -> None:
    alone = train(tiny_encoder, LOSSES[loss], num_samples, batch_size)
    first, second = (process[f"{loss} {num_samples}"] for process in processes)
    for step, ids in enumerate(alone["ids"]):
        assert sorted(first["ids"][step] + second["ids"][step]) == sorted(ids)
        assert len(first["ids"][step]) == len(second["ids"][step]) + 1
        assert first["losses"][step] + second["losses"][step] == pytest.approx(alone["losses"][step], rel=1e-5)
        for process in (first, second):
            assert process["norms"][step] == pytest.approx(alone["norms"][step], rel=1e-5)
            assert process["gradients"][step].keys() == alone["gradients"][step].keys()
            for name, gradient in alone["gradients"][step].items():
                difference = process["gradients"][step][name] - gradient
                assert difference.abs().max() <= 1e-5 * alone["norms"][step], (step, name)
    for name, weights in first["weights"].items():
        assert torch.equal(weights, second["weights"][name])
    assert first["cosine"] == second["cosine"] == pytest.approx(alone["cosine"], abs=1e-5)


def test_rows_of_all_processes_come_in_rank_order(processes: list[dict[str, Any]]) -> None:
    for number, process in enumerate(processes):
        found = process["gather"]
        rows, start = found["unequal"]
        assert rows.tolist() == [[0, 0]] * 3 + [[1, 1]]
        assert start == (0, 3)[number]
        assert not rows.requires_grad
        rows, start = found["none"]
        assert rows.tolist() == [[0, 0]] * 2
        assert start == (0, 2)[number]
        assert found["sum"].tolist() == [2, 1]
        assert (found["rank"], found["world"]) == (number, 2)


def test_one_process_is_the_identity() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    gathered, start = all_gather_rows(rows)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    assert (start, rank(), world_size()) == (0, 0, 1)
    assert all_reduce_sum(torch.tensor([5.0])).tolist() == [5]
