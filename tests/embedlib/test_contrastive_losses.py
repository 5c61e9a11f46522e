"""Contrastive losses against closed forms and slow references."""

import math

import pytest
import torch
from torch.nn import functional

from embedlib.losses import (
    Against,
    cosent,
    info_nce,
    likely_positives,
    margin_mse,
    score_divergence,
    triplet,
)

INF = float("inf")


def test_info_nce_of_equal_scores_is_the_log_of_their_number() -> None:
    scores = torch.full((3, 8), 0.4)
    against = [Against(scores, torch.arange(3))]
    torch.testing.assert_close(info_nce(torch.full((3,), 0.4), against, 0.05), torch.full((3,), math.log(8)))


def test_info_nce_is_cross_entropy() -> None:
    torch.manual_seed(0)
    scores = torch.rand(4, 7)
    positive = scores[torch.arange(4), torch.arange(4)]
    expected = functional.cross_entropy(scores / 0.1, torch.arange(4), reduction="none")
    torch.testing.assert_close(info_nce(positive, [Against(scores, torch.arange(4))], 0.1), expected)


def test_both_directions_joint_and_separate() -> None:
    torch.manual_seed(0)
    scores = torch.rand(5, 5)
    positive, rows = scores.diagonal(), torch.arange(5)
    both = [Against(scores, rows), Against(scores.T, rows)]
    separate = [functional.cross_entropy(each / 0.2, rows, reduction="none") for each in (scores, scores.T)]
    torch.testing.assert_close(info_nce(positive, both, 0.2, "separate"), (separate[0] + separate[1]) / 2)
    joint = [
        math.log(2 + sum(math.exp((float(s) - float(positive[i])) / 0.2) for s in others))
        for i, others in enumerate([*scores[i][rows != i], *scores.T[i][rows != i]] for i in range(5))
    ]
    torch.testing.assert_close(info_nce(positive, both, 0.2, "joint"), torch.tensor(joint))


def test_masked_columns_do_not_count() -> None:
    scores = torch.tensor([[0.9, 0.95, 0.1]])
    masked = torch.tensor([[False, True, False]])
    expected = info_nce(torch.tensor([0.9]), [Against(scores[:, [0, 2]], torch.tensor([0]))], 0.05)
    torch.testing.assert_close(
        info_nce(torch.tensor([0.9]), [Against(scores, torch.tensor([0]), masked)], 0.05), expected
    )


@pytest.mark.parametrize(
    ("kind", "margin", "expected"),
    [
        ("absolute", 0.0, [False, True, False]),
        ("absolute", 0.2, [True, True, False]),
        ("relative", 0.5, [True, True, False]),
    ],
)
def test_a_guide_marks_what_it_rates_like_the_positive(kind: str, margin: float, expected: list[bool]) -> None:
    scores = torch.tensor([[0.5, 0.7, 0.2]])
    assert likely_positives(torch.tensor([0.6]), scores, margin, kind)[0].tolist() == expected  # type: ignore[arg-type]


def test_a_relative_margin_of_a_negative_score_moves_down() -> None:
    assert likely_positives(torch.tensor([-0.2]), torch.tensor([[-0.25, -0.35]]), 0.5, "relative")[0].tolist() == [
        True,
        False,
    ]


def test_triplet_by_hand_and_without_negatives() -> None:
    positive = torch.tensor([0.8, 0.5, 0.5])
    negatives = torch.tensor([[0.7, 0.1], [0.9, -INF], [-INF, -INF]])
    torch.testing.assert_close(triplet(positive, negatives, 0.2), torch.tensor([0.05, 0.6, 0.0]))


def test_margin_mse_by_hand_and_its_gradient_is_finite() -> None:
    scores = torch.tensor([[0.9, 0.5, -INF], [0.4, 0.6, 0.2]], requires_grad=True)
    teacher = torch.tensor([[0.8, 0.6, -INF], [0.5, 0.5, 0.1]])
    loss = margin_mse(scores, teacher)
    torch.testing.assert_close(loss, torch.tensor([0.04, (0.04 + 0.04) / 2]))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_divergence_is_kl_and_zero_for_the_teacher_itself() -> None:
    scores = torch.tensor([[0.9, 0.5, -INF], [0.4, 0.6, 0.2]], requires_grad=True)
    teacher = torch.tensor([[0.8, 0.6, -INF], [0.5, 0.5, 0.1]])
    torch.testing.assert_close(score_divergence(teacher, teacher, 0.1), torch.zeros(2))
    loss = score_divergence(scores, teacher, 0.1)
    student, wanted = ((each[1] / 0.1).log_softmax(0) for each in (scores.detach(), teacher))
    torch.testing.assert_close(loss[1].detach(), functional.kl_div(student, wanted, reduction="sum", log_target=True))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_cosent_is_the_sum_over_ordered_pairs() -> None:
    torch.manual_seed(0)
    scores, labels = torch.rand(6), torch.tensor([0.0, 1.0, 0.5, 0.5, 0.2, 1.0])
    total = 1.0
    for i in range(6):
        for j in range(6):
            if labels[i] > labels[j]:
                total += math.exp(float(scores[j] - scores[i]) / 0.1)
    assert float(cosent(scores, labels, 0.1)) == pytest.approx(math.log(total), rel=1e-5)
    assert float(cosent(scores, torch.ones(6), 0.1)) == 0
