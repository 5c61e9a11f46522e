import pytest
import torch
from torch import nn

from embedlib.merging import SelfPositioning, linear, slerp, task_arithmetic, ties

BASE = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
FIRST = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[2.0]])}
SECOND = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([[0.0]])}


def test_linear_and_task_arithmetic_by_hand() -> None:
    assert linear([FIRST, SECOND], [0.25, 0.75])["a"].tolist() == [1.5, 3.0]
    merged = task_arithmetic(BASE, [FIRST, SECOND], [0.5, 1.0])
    assert merged["a"].tolist() == [2.0, 4.0]
    assert merged["b"].tolist() == [[0.0]]


def test_task_arithmetic_of_one_model_is_that_model() -> None:
    for name, tensor in task_arithmetic(BASE, [FIRST], [1.0]).items():
        torch.testing.assert_close(tensor, FIRST[name])


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_slerp_goes_along_the_circle(position: float) -> None:
    first, second = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    angle = torch.tensor(position * torch.pi / 2)
    expected = (1 + 2 * position) * torch.stack([angle.cos(), angle.sin()])
    torch.testing.assert_close(slerp(first, second, position)["w"], expected, atol=1e-6, rtol=1e-6)


def test_slerp_of_parallel_and_zero_tensors_is_linear() -> None:
    for a, b in (([1.0, 1.0], [3.0, 3.0]), ([0.0, 0.0], [2.0, 4.0])):
        first, second = {"w": torch.tensor(a)}, {"w": torch.tensor(b)}
        torch.testing.assert_close(slerp(first, second, 0.5)["w"], (first["w"] + second["w"]) / 2)


def test_ties_trims_elects_and_averages() -> None:
    base = {"w": torch.zeros(4)}
    first, second = {"w": torch.tensor([4.0, 1.0, -3.0, 0.1])}, {"w": torch.tensor([2.0, -3.0, -1.0, 0.2])}
    merged = ties(base, [first, second], [1.0, 1.0], density=0.75)["w"]
    # Place 1: +1 against −3, the stronger sign stands alone. Place 3: trimmed away from both.
    torch.testing.assert_close(merged, torch.tensor([3.0, -3.0, -2.0, 0.0]))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.5], [3.0, -3.0, -2.0, 0.0]),
        # Place 1: +2 against −3.
        ([2.0, 1.0], [10 / 3, -3.0, -7 / 3, 0.0]),
        # Place 0: −4 against +2.
        ([-1.0, 1.0], [-4.0, -2.0, 3.0, 0.0]),
        ([0.0, 2.0], [2.0, -3.0, -1.0, 0.0]),
    ],
)
def test_ties_takes_the_mean_by_the_weights_that_agree(weights: list[float], expected: list[float]) -> None:
    base = {"w": torch.zeros(4)}
    first, second = {"w": torch.tensor([4.0, 1.0, -3.0, 0.1])}, {"w": torch.tensor([2.0, -3.0, -1.0, 0.2])}
    torch.testing.assert_close(ties(base, [first, second], weights, density=0.75)["w"], torch.tensor(expected))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_self_positioning_finds_the_weights_that_made_the_target(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).to(device)
    parameters = dict(model.named_parameters())
    base = {name: weights.detach().clone() for name, weights in parameters.items()}
    models = [{name: weights + torch.randn_like(weights) for name, weights in base.items()} for _ in range(3)]
    target = task_arithmetic(base, models, [0.7, -0.1, 0.4])
    inputs = torch.randn(64, 6, device=device)
    wanted = inputs @ target["weight"].T + target["bias"]
    optimizer = SelfPositioning(parameters, base, models, lr=0.05)
    torch.testing.assert_close(model.weight.detach(), task_arithmetic(base, models, [1 / 3] * 3)["weight"])
    for _ in range(300):
        (model(inputs) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.weights.cpu(), torch.tensor([0.7, -0.1, 0.4]), atol=5e-3, rtol=0)
