"""Losses on sentence vectors. Each gives a value a row: the caller decides over how many it takes the mean.

Distillation compares student (batch, dim) and teacher (batch, dim), both before normalisation. On unit vectors MSE is
(2 / dim)(1 − cosine), so the two are worth combining only when MSE sees the vectors before normalisation: then it also
teaches their length.

Contrastive losses compare queries with documents by cosine. They see some rows of a batch and the columns of all of it:
where a batch is spread over processes, or too large to be compared at once, the caller gathers columns and cuts rows.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

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


class Against(NamedTuple):
    """What some rows are told apart from: one direction of InfoNCE."""

    scores: torch.Tensor
    """(rows, columns) cosines."""
    own: torch.Tensor
    """(rows,) the column that is a row's own, or what it is compared for: never a negative."""
    masked: torch.Tensor | None = None
    """(rows, columns) columns that might be right answers as well, and are no negatives either."""
    has_positive: bool = True
    """Whether a row's own column is its positive, and not the row itself: queries against documents, and back."""


def info_nce(
    positive: torch.Tensor,
    against: Sequence[Against],
    temperature: float,
    partition: Literal["joint", "separate"] = "joint",
) -> torch.Tensor:
    """Cross entropy of the positive among what it is told apart from, (rows,); InfoNCE, arXiv:1807.03748.

    `positive` (rows,) has cosines. Joint: all directions in one denominator, as in GTE (Li et al. 2023,
    arXiv:2308.03281); separate: the mean of one cross entropy a direction.
    """
    positive = positive[:, None] / temperature
    negatives = [_negatives(each) / temperature for each in against]
    if partition == "joint":
        # Each direction between queries and documents brings the positive along, as GTE has it.
        again = [positive] * (sum(each.has_positive for each in against) - 1)
        negatives = [torch.cat([*again, *negatives], dim=1)]
    logits = [torch.cat([positive, each], dim=1) for each in negatives]
    return torch.stack([torch.logsumexp(each, dim=1) - positive[:, 0] for each in logits]).mean(dim=0)


def _negatives(against: Against) -> torch.Tensor:
    columns = torch.arange(against.scores.shape[1], device=against.scores.device)
    excluded = columns == against.own[:, None]
    if against.masked is not None:
        excluded = excluded | against.masked
    return against.scores.masked_fill(excluded, -torch.inf)


def likely_positives(
    positive: torch.Tensor, scores: torch.Tensor, margin: float, kind: Literal["absolute", "relative"]
) -> torch.Tensor:
    """Where a guide rates a negative nearly as high as the positive, (rows, columns); GISTEmbed, arXiv:2402.16829.

    `positive` (rows,) and `scores` (rows, columns) are the guide's cosines. Absolute: above positive − margin;
    relative: above positive − margin · |positive|.
    """
    allowance = margin if kind == "absolute" else margin * positive.abs()
    return scores > (positive - allowance)[:, None]


def triplet(positive: torch.Tensor, negatives: torch.Tensor, margin: float) -> torch.Tensor:
    """By how much a negative is not `margin` below the positive, mean over negatives, (rows,).

    `positive` (rows,), `negatives` (rows, num_negatives) are cosines, −inf where a row has fewer; 0 for a row of none.
    """
    return _mean_of_finite((margin - positive[:, None] + negatives).clamp(min=0), negatives)


def margin_mse(scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of the gaps between positive and negatives, (rows,); Hofstätter et al. 2020, arXiv:2010.02666.

    `scores` and `teacher` (rows, 1 + num_negatives) have the positive first, −inf where a row has fewer negatives.
    """
    missing = ~teacher[:, 1:].isfinite()
    # Filled before they are squared: the gradient of what is left out afterwards would be 0 · nan.
    gaps, expected = ((each[:, :1] - each[:, 1:]).masked_fill(missing, 0) for each in (scores, teacher))
    return _mean_of_finite((gaps - expected).square(), teacher[:, 1:])


def score_divergence(scores: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence of the student's distribution over positive and negatives from the teacher's, (rows,).

    `scores` and `teacher` as in `margin_mse`.
    """
    student_log, teacher_log = (functional.log_softmax(each / temperature, dim=1) for each in (scores, teacher))
    terms = teacher_log.exp() * (teacher_log - student_log)
    return terms.masked_fill(teacher == -torch.inf, 0).sum(dim=1)


def cosent(scores: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """log(1 + Σ exp((s_j − s_i) / τ)) over pairs with label_i > label_j, a scalar; CoSENT (Su 2022).

    `scores` and `labels` are (pairs,); ranks pairs by their similarity instead of fitting its value.
    """
    gaps = (scores[None] - scores[:, None]) / temperature
    wrong = gaps.masked_fill(labels[:, None] <= labels[None], -torch.inf)
    return torch.logsumexp(torch.cat([gaps.new_zeros(1), wrong.flatten()]), dim=0)


def _mean_of_finite(values: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Mean over the columns whose mark is finite, (rows,); 0 where there is none."""
    finite = marks.isfinite()
    return values.masked_fill(~finite, 0).sum(dim=1) / finite.sum(dim=1).clamp(min=1)
