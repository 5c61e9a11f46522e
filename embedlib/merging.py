"""Models merged by their weights: one model from several that were trained from the same base.

A task vector is what training added to the base, τ = θ − θ₀ (Ilharco et al. 2023, arXiv:2212.04089). Everything here is
arithmetic on named weights; what merged weights are worth is for the caller to say.
"""

from collections.abc import Callable, Sequence

import torch

Weights = dict[str, torch.Tensor]


def linear(models: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """Σ wᵢ θᵢ; equal weights that add up to 1 give the uniform merge."""
    return _each(models, lambda tensors: sum((w * t for w, t in zip(weights, tensors, strict=True)), torch.zeros(())))


def task_arithmetic(base: Weights, models: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """θ₀ + Σ wᵢ τᵢ."""
    return add(base, task_vectors(base, models), weights)


def task_vectors(base: Weights, models: Sequence[Weights]) -> list[Weights]:
    """What each model adds to the base."""
    return [{name: tensor - base[name] for name, tensor in model.items()} for model in models]


def add(base: Weights, vectors: Sequence[Weights], weights: Sequence[float] | torch.Tensor) -> Weights:
    """θ₀ + Σ wᵢ τᵢ of task vectors, differentiable by the weights."""
    return {
        name: tensor + sum((w * vector[name] for w, vector in zip(weights, vectors, strict=True)), torch.zeros(()))
        for name, tensor in base.items()
    }


def slerp(first: Weights, second: Weights, position: float) -> Weights:
    """Along the great circle from the first (0) to the second (1), tensor by tensor, lengths interpolated linearly.

    Tensors that are nearly parallel, or zero, are interpolated linearly.
    """

    def between(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        a, b = tensors
        lengths = a.norm(), b.norm()
        straight = torch.lerp(a, b, position)
        if min(lengths) == 0:
            return straight
        angle = torch.arccos(((a * b).sum() / (lengths[0] * lengths[1])).clamp(-1, 1))
        if angle.sin() < 1e-4:
            return straight
        turned = torch.sin((1 - position) * angle) * a / lengths[0] + torch.sin(position * angle) * b / lengths[1]
        length: torch.Tensor = torch.lerp(lengths[0], lengths[1], position)
        return length.mul(turned / angle.sin())

    return _each([first, second], between)


def ties(base: Weights, models: Sequence[Weights], weights: Sequence[float], density: float) -> Weights:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim, elect a sign, and take the mean of those that agree with it.

    Of each task vector only the share `density` of its largest entries is kept, over all tensors together. Signs and
    mean are weighted: equal weights of any size give the paper's mean, and a negative one turns its vector round.
    """
    trimmed = [_trim(vector, density) for vector in task_vectors(base, models)]

    def elected(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        stack = torch.stack([w * tensor for w, tensor in zip(weights, tensors, strict=True)])
        agrees = (stack.sign() == stack.sum(dim=0).sign()) & (stack != 0)
        agreeing = sum((abs(w) * each for w, each in zip(weights, agrees, strict=True)), torch.zeros(()))
        return torch.where(agrees.any(dim=0), (stack * agrees).sum(dim=0) / agreeing, 0)

    return {name: base[name] + vector for name, vector in _each(trimmed, elected).items()}


def _trim(vector: Weights, density: float) -> Weights:
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
    kept = max(1, round(density * len(sizes)))
    limit = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: torch.where(tensor.abs() >= limit, tensor, 0) for name, tensor in vector.items()}


def _each(models: Sequence[Weights], combine: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> Weights:
    return {name: combine([model[name] for model in models]) for name in models[0]}


class SelfPositioning(torch.optim.Optimizer):
    """Moves a model within the space that task vectors span: Self Positioning (Li et al. 2024, arXiv:2410.15035).

    The model's weights are θ₀ + Σ λᵢ τᵢ, and a step moves λ alone, by Adam: its gradient is that of the weights times
    the task vectors. So any training loop searches for merge weights when this is its optimiser.
    """

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], base: Weights, models: Sequence[Weights], lr: float
    ) -> None:
        """λ starts at 1 / number of models: the uniform merge of their task vectors."""
        super().__init__(parameters.values(), {"lr": lr})
        self.parameters, self.base, self.vectors = parameters, base, task_vectors(base, models)
        self.weights = torch.full((len(models),), 1 / len(models), device=next(iter(base.values())).device)
        self.adam = torch.optim.Adam([self.weights], lr=lr)
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """Give the model the weights that λ stands for."""
        for name, weights in add(self.base, self.vectors, self.weights).items():
            self.parameters[name].copy_(weights)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move λ against its gradient."""
        self.weights.grad = torch.stack(
            [
                sum(
                    ((p.grad * vector[name]).sum() for name, p in self.parameters.items() if p.grad is not None),
                    torch.zeros(()),
                )
                for vector in self.vectors
            ]
        )
        self.adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.adam.step()
        self.place()
