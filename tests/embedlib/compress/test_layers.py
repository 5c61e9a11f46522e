import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, XLMRobertaConfig, XLMRobertaModel

from embedlib.compress.layers import (
    LayerConfig,
    Layers,
    LayerScore,
    body_layers,
    choose_layers,
    greedy_drop,
    keep_layers,
    only_layers,
    usual_candidates,
)
from embedlib.errors import ConfigError

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30, "num_hidden_layers": 6}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=["bert", "xlmr"])
def body(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param == "bert":
        return BertModel(BertConfig(**SIZES, initializer_range=0.5)).eval()
    return XLMRobertaModel(XLMRobertaConfig(**SIZES, initializer_range=0.5)).eval()


@torch.inference_mode()
def hidden(body: PreTrainedModel) -> torch.Tensor:
    return body(IDS).last_hidden_state


def worth(layers: Layers) -> LayerScore:
    """Every layer is worth its own amount, whichever others are there."""
    values = [9, 1, 2, 8, 3, 7, 4, 5, 6, 0, 1, 10]
    return LayerScore(0.5, sum(values[layer] for layer in layers))


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 4, [(0, 4, 7, 11), (0, 1, 2, 11), (0, 1, 10, 11), (8, 9, 10, 11)]),
        (12, 1, [(11,), (0,)]),
        (3, 3, [(0, 1, 2)]),
        (4, 2, [(0, 3), (2, 3)]),
        (1, 1, [(0,), (0,)]),
    ],
)
def test_usual_candidates(teacher: int, student: int, expected: list[Layers]) -> None:
    assert usual_candidates(teacher, student) == expected


@pytest.mark.parametrize(("teacher", "student"), [(24, 8), (12, 6), (12, 4), (6, 5), (6, 2)])
def test_usual_candidates_are_distinct_ascending_and_keep_the_top(teacher: int, student: int) -> None:
    candidates = usual_candidates(teacher, student)
    assert len(set(candidates)) == len(candidates)
    for layers in candidates:
        assert list(layers) == sorted(set(layers))
        assert len(layers) == student
        assert layers[-1] == teacher - 1


def test_more_layers_than_the_teacher_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.num_layers: 5; the teacher has 4"):
        usual_candidates(4, 5)


def test_greedy_drop_keeps_what_is_worth_most() -> None:
    assert greedy_drop(12, 4, worth) == (0, 3, 5, 11)
    assert greedy_drop(12, 12, worth) == tuple(range(12))


def test_greedy_drop_looks_at_what_is_left() -> None:
    # Layers 0 and 1 do the same work, so either can go, but not both.
    def score(layers: Layers) -> LayerScore:
        return LayerScore(1, (0 in layers or 1 in layers) * 5 + sum(layer in layers for layer in (2, 3)))

    layers = greedy_drop(4, 2, score)
    assert len({0, 1} & set(layers)) == 1


def test_the_choice_to_keep_is_taken_and_the_scores_stay() -> None:
    kept = choose_layers(12, LayerConfig(num_layers=4, keep=(0, 3, 7, 11)), worth)
    assert kept.best == (0, 3, 7, 11)
    assert set(kept.scores) == {*usual_candidates(12, 4), (0, 3, 7, 11)}
    with pytest.raises(ConfigError, match=r"layers\.keep: \[0, 3, 11\]; expected 4 layers"):
        choose_layers(12, LayerConfig(num_layers=4, keep=(0, 3, 11)), worth)


def test_a_choice_far_off_in_cosine_is_not_the_best() -> None:
    def score(layers: Layers) -> LayerScore:
        return LayerScore(0.9, 0.5) if 11 in layers else LayerScore(0.3, 0.6)

    assert 11 in choose_layers(12, LayerConfig(num_layers=4), score).best


def test_the_choice_is_sorted_by_rank_agreement_and_holds_every_candidate() -> None:
    choice = choose_layers(12, LayerConfig(num_layers=4, candidates=[(1, 2, 3, 4)]), worth)
    assert choice.best == (0, 3, 5, 11)
    assert list(choice.scores.values()) == sorted(choice.scores.values(), key=lambda score: -score.spearman)
    assert set(choice.scores) == {*usual_candidates(12, 4), (1, 2, 3, 4), (0, 3, 5, 11)}
    without = choose_layers(12, LayerConfig(num_layers=4, greedy=False), worth)
    assert set(without.scores) == set(usual_candidates(12, 4))


@pytest.mark.parametrize("candidate", [(0, 1, 2), (0, 1, 2, 12), (-1, 0, 1, 2), (0, 1, 2, 3, 4)])
def test_impossible_candidates_are_refused(candidate: Layers) -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.candidates: .*expected 4 layers in ascending order, each from 0 to 11"
    ):
        choose_layers(12, LayerConfig(num_layers=4, candidates=[candidate]), worth)


@pytest.mark.parametrize("candidate", [(3, 3, 3, 3), (11, 7, 3, 0)])
def test_repeated_and_unordered_candidates_are_refused(candidate: Layers) -> None:
    with pytest.raises(ConfigError, match=r"layers\.candidates"):
        choose_layers(12, LayerConfig(num_layers=4, candidates=[candidate]), worth)


def test_kept_layers_are_a_copy_that_shares_nothing(body: PreTrainedModel) -> None:
    before = hidden(body)
    kept = keep_layers(body, [0, 5])
    assert (kept.config.num_hidden_layers, body.config.num_hidden_layers) == (2, 6)
    assert (len(body_layers(kept)), len(body_layers(body))) == (2, 6)
    for mine, theirs in zip(body_layers(kept), [body_layers(body)[0], body_layers(body)[5]], strict=True):
        for name, weights in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], weights)
    own = {parameter.data_ptr() for parameter in kept.parameters()}
    assert not own & {parameter.data_ptr() for parameter in body.parameters()}
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.zero_()
    assert torch.equal(hidden(body), before)


def test_all_layers_kept_change_nothing(body: PreTrainedModel) -> None:
    assert torch.equal(hidden(keep_layers(body, range(6))), hidden(body))


def test_only_layers_is_keep_layers_for_a_while(body: PreTrainedModel) -> None:
    before = hidden(body)
    with only_layers(body, [1, 4]):
        assert torch.equal(hidden(body), hidden(keep_layers(body, [0, 1])))
        assert len(body_layers(body)) == 2
    assert torch.equal(hidden(body), before)
    assert torch.equal(hidden(keep_layers(body, [1, 4])), during(body, [1, 4]))


def during(body: PreTrainedModel, layers: list[int]) -> torch.Tensor:
    with only_layers(body, layers):
        return hidden(body)


def test_only_layers_puts_everything_back_after_an_error(body: PreTrainedModel) -> None:
    before = hidden(body)
    with pytest.raises(RuntimeError, match="midway"), only_layers(body, [0]):
        raise RuntimeError("midway")
    assert torch.equal(hidden(body), before)


def test_another_architecture_is_refused(body: PreTrainedModel) -> None:
    body.encoder = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"has no encoder\.layer; expected BertModel or XLMRobertaModel"):
        body_layers(body)
