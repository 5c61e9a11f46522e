import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from embedlib.losses import LossConfig, cosine_distance, distillation_loss, gram_error, squared_error

shapes = st.tuples(st.integers(1, 9), st.integers(2, 12), st.integers(0, 2**31))
EVERYTHING = LossConfig(mse=0.7, cosine=1.3, gram=2.1)


def draw(rows: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(draw(dim, dim, 0)[0]).Q


@given(shapes)
def test_equal_vectors_lose_nothing(shape: tuple[int, int, int]) -> None:
    vectors, _ = draw(*shape)
    torch.testing.assert_close(distillation_loss(vectors, vectors, EVERYTHING), torch.zeros(shape[0]).double())


@given(shapes)
def test_on_unit_vectors_the_mean_squared_error_is_the_cosine_distance(shape: tuple[int, int, int]) -> None:
    student, teacher = (functional.normalize(vectors, dim=-1) for vectors in draw(*shape))
    mean_squared_error = squared_error(student, teacher) / shape[1]
    torch.testing.assert_close(mean_squared_error, 2 / shape[1] * cosine_distance(student, teacher))


def test_known_values() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert squared_error(student, teacher).tolist() == [16, 1]
    torch.testing.assert_close(cosine_distance(student, teacher), torch.tensor([0.4, 0.0]))
    # Student similarities [[1, .8], [.8, 1]], teacher's [[1, 0], [0, 1]]: each row is off by .8 with one of two.
    torch.testing.assert_close(gram_error(student, teacher), torch.tensor([0.32, 0.32]))


@given(shapes)
def test_gram_sees_neither_rotation_nor_width_nor_length(shape: tuple[int, int, int]) -> None:
    teacher, other = draw(*shape)
    student = functional.pad(3 * teacher @ rotation(shape[1]), (0, 5))
    torch.testing.assert_close(gram_error(student, teacher), torch.zeros(shape[0]).double())
    unequal = gram_error(functional.pad(other, (0, 5)), teacher)
    torch.testing.assert_close(unequal, gram_error(other, teacher))


def test_gram_is_the_mean_over_pairs() -> None:
    student, teacher = draw(5, 3, 1)
    cosine = functional.cosine_similarity
    slow = [
        sum(float(cosine(student[i], student[j], dim=0) - cosine(teacher[i], teacher[j], dim=0)) ** 2 for j in range(5))
        / 5
        for i in range(5)
    ]
    torch.testing.assert_close(gram_error(student, teacher), torch.tensor(slow).double())


def test_the_sum_is_weighted_and_zero_leaves_a_term_out() -> None:
    student, teacher = draw(4, 3, 2)
    terms = squared_error(student, teacher), cosine_distance(student, teacher), gram_error(student, teacher)
    expected = 0.7 * terms[0] + 1.3 * terms[1] + 2.1 * terms[2]
    torch.testing.assert_close(distillation_loss(student, teacher, EVERYTHING), expected)
    gram_only = LossConfig(mse=0, cosine=0, gram=1)
    torch.testing.assert_close(distillation_loss(student, teacher, gram_only), terms[2])
    # Width 3 against 2: MSE and cosine would not run at all.
    assert distillation_loss(student, teacher[:, :2], gram_only).shape == (4,)


@pytest.mark.parametrize(("gram", "couples"), [(0.0, False), (0.5, True)])
def test_only_gram_couples_rows(gram: float, couples: bool) -> None:
    assert LossConfig(gram=gram).couples_rows is couples
    student, teacher = draw(4, 3, 3)
    student.requires_grad_(True)
    loss = distillation_loss(student, teacher, LossConfig(gram=gram))
    (gradient,) = torch.autograd.grad(loss[0], student)
    assert bool(gradient[1:].any()) is couples
