from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedlib.errors import ConfigError
from embedlib.objective import Objective, ObjectiveConfig, Objectives, Samples

# Two samples over six texts: queries 0 and 1, positives 2 and 3, negatives 4, 5 and 4.
SAMPLES = Samples(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[4, 5], [4, -1]]))
VECTORS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
WHOLE = slice(0, 2)


def objective(**values: object) -> Callable[[torch.Tensor, Samples, slice], torch.Tensor]:
    return partial(losses, Objectives([ObjectiveConfig.model_validate(values)], 8).of_datasets[0])


def losses(module: Objective, vectors: torch.Tensor, samples: Samples, rows: slice) -> torch.Tensor:
    found: torch.Tensor = module(module.prefixes(vectors), samples, rows)
    return found


def cosines(dim: int = 8) -> torch.Tensor:
    unit = functional.normalize(VECTORS[:, :dim], dim=-1)
    return unit @ unit.T


def expected_info_nce(dim: int = 8, temperature: float = 0.05) -> torch.Tensor:
    return functional.cross_entropy(cosines(dim)[:2, 2:] / temperature, torch.tensor([0, 1]), reduction="none")


def test_every_document_of_the_batch_is_a_negative_once() -> None:
    torch.testing.assert_close(objective()(VECTORS, SAMPLES, WHOLE), expected_info_nce())


def test_rows_can_be_cut() -> None:
    whole = objective(dimensions=[4], anchor=0.5)
    samples = SAMPLES._replace(base=torch.flip(VECTORS, [0]))
    parts = [whole(VECTORS, samples, slice(row, row + 1)) for row in range(2)]
    torch.testing.assert_close(torch.cat(parts), whole(VECTORS, samples, WHOLE))


def test_matryoshka_is_the_mean_over_prefixes() -> None:
    found = objective(dimensions=[4, 2])(VECTORS, SAMPLES, WHOLE)
    torch.testing.assert_close(found, (expected_info_nce(8) + expected_info_nce(4) + expected_info_nce(2)) / 3)


def test_a_guide_masks_and_by_nothing_it_is_plain() -> None:
    rating = torch.zeros(6, 3)
    rating[[0, 2, 4], 0] = 1  # the guide takes text 4 for an answer of query 0 as well
    rating[[1, 3], 1] = rating[5, 2] = 1
    guided = objective(guide={"margin": 0.1})(VECTORS, SAMPLES._replace(guide=rating), WHOLE)
    scores = cosines()[0, [2, 3, 5]] / 0.05
    torch.testing.assert_close(guided[0], functional.cross_entropy(scores[None], torch.tensor([0])))
    torch.testing.assert_close(guided[1], expected_info_nce()[1])
    never = objective(guide={"margin": -2})(VECTORS, SAMPLES._replace(guide=rating), WHOLE)
    torch.testing.assert_close(never, expected_info_nce())


def test_two_views_have_the_query_s_vector_for_target() -> None:
    teacher = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    settings = {"info_nce": {"weight": 0}, "distil": {"weight": 1, "two_views": True}, "dimensions": [4]}
    found = objective(**settings)(VECTORS, SAMPLES._replace(teacher=teacher), WHOLE)
    total = torch.zeros(2)
    for dim in (8, 4):
        student, target = (functional.normalize(each[:, :dim], dim=-1) for each in (VECTORS, teacher))
        for texts in ([0, 1], [2, 3]):
            total += (student[texts] - target[[0, 1]]).square().sum(-1) / 4
    torch.testing.assert_close(found, total)


def test_a_teacher_of_another_width_has_a_projection_a_prefix() -> None:
    settings = ObjectiveConfig.model_validate({"info_nce": {"weight": 0}, "distil": {"weight": 1}, "dimensions": [4]})
    plain = ObjectiveConfig(dimensions=[2])
    module = Objectives([plain, settings, settings], 8, teacher_dim=5)
    # One for all that ask for it, none for a prefix that nothing is distilled into.
    assert {name: weight.shape for name, weight in module.named_parameters()} == {
        "projections.8.weight": (5, 8),
        "projections.4.weight": (5, 4),
    }
    losses(module.of_datasets[2], VECTORS, SAMPLES._replace(teacher=torch.randn(6, 5)), WHOLE).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.parameters())


def test_the_anchor_is_nothing_where_nothing_moved() -> None:
    anchored = objective(info_nce={"weight": 0}, anchor=2.0)
    torch.testing.assert_close(
        anchored(VECTORS, SAMPLES._replace(base=3 * VECTORS), WHOLE), torch.zeros(2), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(anchored(VECTORS, SAMPLES._replace(base=-VECTORS), WHOLE), torch.full((2,), 4.0))


def test_own_negatives_and_scores() -> None:
    teacher = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.3, -torch.inf]])
    settings = {"info_nce": {"weight": 0}, "triplet": {"weight": 1.0}, "scores": {"margin_mse": 1.0}}
    found = objective(**settings)(VECTORS, SAMPLES._replace(scores=teacher), WHOLE)
    table = cosines()
    expected = []
    for query, positive, negatives in ((0, 2, [4, 5]), (1, 3, [4])):
        hinge = [max(0.0, 0.2 - float(table[query, positive]) + float(table[query, n])) for n in negatives]
        gaps = [
            (float(table[query, positive] - table[query, n]) - float(teacher[query, 0] - teacher[query, 1 + place]))
            ** 2
            for place, n in enumerate(negatives)
        ]
        expected.append(sum(hinge) / len(hinge) + sum(gaps) / len(gaps))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="needs teacher"):
        objective(distil={"weight": 1.0})(VECTORS, SAMPLES, WHOLE)
    with pytest.raises(ValidationError, match="every weight is 0"):
        ObjectiveConfig.model_validate({"info_nce": {"weight": 0}})
    with pytest.raises(ValidationError, match="cosent: info_nce would contrast pairs of whatever label"):
        ObjectiveConfig.model_validate({"cosent": {"weight": 1}})
    with pytest.raises(ValidationError, match=r"guide: margin=0.1 .*expected none, or info_nce.weight above 0"):
        ObjectiveConfig.model_validate({"guide": {"margin": 0.1}, "info_nce": {"weight": 0}, "anchor": 1})


@pytest.mark.parametrize("directions", [["query_to_doc"], ["query_to_doc", "doc_to_query"]])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_sentence_transformers_has_the_same_value(directions: list[str], partition: str) -> None:
    peer: Any = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]), 20.0, directions=directions, partition_mode=partition
    )
    names = {"query_to_doc": "query_to_document", "doc_to_query": "document_to_query"}
    settings = {
        "directions": [names[each] for each in directions],
        "partition": "joint" if partition == "joint" else "separate",
    }
    vectors = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(4)
    samples = Samples(rows, 4 + rows, (8 + rows)[:, None])
    found = objective(info_nce=settings)(vectors, samples, slice(0, 4)).mean()
    torch.testing.assert_close(found, peer.compute_loss_from_embeddings([vectors[:4], vectors[4:8], vectors[8:]], None))


def test_what_answers_a_twin_is_no_negative() -> None:
    # Both samples ask the same; the second's positive would be the first's hardest negative.
    twins = Samples(torch.tensor([0, 0]), torch.tensor([2, 3]), torch.tensor([[4], [4]]))
    scores = cosines()[0] / 0.05
    found = objective()(VECTORS, twins, WHOLE)
    for sample, positive in enumerate((2, 3)):
        expected = functional.cross_entropy(scores[[positive, 4]][None], torch.tensor([0]))
        torch.testing.assert_close(found[sample], expected)


@pytest.mark.parametrize("directions", [["query_to_document"], ["document_to_query"]])
def test_what_samples_elsewhere_tell_to_be_an_answer_is_no_negative(directions: list[str]) -> None:
    # Text 3, the second sample's positive, answers the first query as well; a sample outside of the batch says so.
    told = SAMPLES._replace(answers=torch.tensor([[0, 2], [0, 3]]))
    found = objective(info_nce={"directions": directions})(VECTORS, told, WHOLE)
    table = cosines() / 0.05
    if directions == ["query_to_document"]:
        rows = table[0, [2, 4, 5]], table[1, [3, 2, 4, 5]]
    else:
        rows = table[2, [0, 1]], table[3, [1]]
    for sample, scores in enumerate(rows):
        torch.testing.assert_close(found[sample], functional.cross_entropy(scores[None], torch.tensor([0])))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that came out of an operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(each.numel() for each in tree_leaves(found) if torch.is_tensor(each))])
        return found


@pytest.mark.parametrize("directions", [["query_to_document"], ["document_to_query"]])
def test_known_answers_are_looked_up_as_one_by_one_in_little_memory(directions: list[str]) -> None:
    chance = torch.Generator().manual_seed(0)
    vectors = torch.randn(24, 8, generator=chance)
    pairs = torch.stack([torch.randint(first, last, (400,), generator=chance) for first, last in ((0, 8), (8, 24))], 1)
    pairs = pairs[pairs.sum(dim=1) % 3 == 0]
    queries = torch.arange(8)
    samples = Samples(queries, 8 + queries, 16 + queries[:, None], answers=pairs)
    known = {(query, text) for query, text in pairs.tolist()}
    unit = functional.normalize(vectors, dim=-1)
    scores = unit @ unit.T / 0.05
    expected = []
    for query, own in enumerate(range(8, 16)):
        if directions == ["query_to_document"]:
            others = [text for text in range(8, 24) if text != own and (query, text) not in known]
        else:
            others = [other for other in range(8) if other != query and (other, own) not in known]
        row = scores[query] if directions == ["query_to_document"] else scores[own]
        expected.append(
            functional.cross_entropy(torch.stack([scores[query, own], *row[others]])[None], torch.tensor([0]))
        )
    found = objective(info_nce={"directions": directions})
    with Largest() as largest:
        rows = [found(vectors, samples, slice(row, row + 1)) for row in range(8)]
    torch.testing.assert_close(torch.cat(rows), torch.stack(expected))
    assert largest.elements <= pairs.numel()


def test_a_query_is_not_its_own_negative() -> None:
    # The first query is a negative of the second sample, as in data whose sides have one prompt.
    symmetric = Samples(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([[-1], [0]]))
    scores = cosines()[0, [2, 3]] / 0.05
    found = objective()(VECTORS, symmetric, WHOLE)
    torch.testing.assert_close(found[0], functional.cross_entropy(scores[None], torch.tensor([0])))


def test_a_prefix_wider_than_the_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dimensions: 16 \(datasets.1\); the model's vectors have 8"):
        Objectives([ObjectiveConfig(), ObjectiveConfig(dimensions=[16])], 8)
