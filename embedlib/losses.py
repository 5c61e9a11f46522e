"""Distillation losses on sentence vectors: student (batch, dim), teacher (batch, dim), both before normalisation.

On unit vectors MSE is (2 / dim)(1 − cosine), so the two are worth combining only when MSE sees the vectors before
normalisation: then it also teaches their length. Every loss returns one value a row, so that the caller decides over
how many rows, micro-batches and processes it takes the mean.
"""

import torch
from torch.nn import functional

from embedlib.config import Config


class LossConfig(Config):
    """Weights of the distillation losses; a weight of 0 leaves the term out."""

    mse: float = 1.0
    """Weight of the squared error between pre-normalised vectors, summed over dimensions."""
    cosine: float = 1.0
    """Weight of 1 − cosine similarity."""
    gram: float = 0.0
    """Weight of the squared error between the two similarity matrices of the batch (needs no equal widths)."""

    @property
    def couples_rows(self) -> bool:
        """Whether a row's loss depends on the other rows, so that it needs the whole batch of all processes."""
        return self.gram > 0


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of each row to its target, (batch,)."""
    return (student - teacher).square().sum(dim=-1)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 − cosine similarity of each row to its target, (batch,)."""
    return 1 - functional.cosine_similarity(student, teacher, dim=-1)


def gram_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference between the two cosine similarity matrices, averaged over each row's partners, (batch,)."""
    student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    return (student @ student.T - teacher @ teacher.T).square().mean(dim=-1)


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, weights: LossConfig) -> torch.Tensor:
    """Weighted sum of the chosen losses of each row, (batch,)."""
    rows = student.new_zeros(len(student))
    if weights.mse:
        rows = rows + weights.mse * squared_error(student, teacher)
    if weights.cosine:
        rows = rows + weights.cosine * cosine_distance(student, teacher)
    if weights.gram:
        rows = rows + weights.gram * gram_error(student, teacher)
    return rows
