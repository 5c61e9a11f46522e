"""Choose which layers of an encoder body stay: candidates and a greedy drop, scored by agreement with the teacher."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pydantic import Field
from transformers import PreTrainedModel

from embedlib.config import Config
from embedlib.errors import ConfigError

Layers = tuple[int, ...]


class LayerConfig(Config):
    """How many layers stay and how they are chosen."""

    num_layers: int = Field(default=4, ge=1)
    """Layers of the student."""
    candidates: list[Layers] = Field(default_factory=list)
    """Further choices to score, each `num_layers` teacher layers from 0; the usual ones are always scored."""
    keep: Layers | None = None
    """Take this choice without greedy drop or distillation, whatever the scores of untrained students say."""
    probe_texts: int = Field(default=96, ge=16)
    """Texts on which a choice is scored without training."""
    greedy: bool = True
    """Also drop one layer at a time, always the one that is missed least."""
    distil_candidates: int = Field(default=0, ge=0)
    """How many of the best choices are distilled for a short while, to decide between them; 0 trusts the scores."""
    distil_steps: int = Field(default=200, ge=1)
    """Steps of that short distillation."""


class LayerScore(NamedTuple):
    """Agreement of an untrained choice with the teacher."""

    cosine: float
    """Mean cosine between the two vectors of a text."""
    spearman: float
    """Rank correlation between the two models' similarities over pairs of texts."""

    @property
    def agreement(self) -> float:
        """What choices are ranked by: either alone picks students that are far off in the other."""
        return self.cosine * self.spearman


class LayerChoice(NamedTuple):
    """The scored choices: the one taken first, then by agreement."""

    scores: dict[Layers, LayerScore]

    @property
    def best(self) -> Layers:
        """The choice taken."""
        return next(iter(self.scores))


def body_layers(body: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of transformer layers of a BERT or XLM-R body; ConfigError for another architecture."""
    encoder = getattr(body, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ConfigError(f"teacher: {type(body).__name__} has no encoder.layer; expected BertModel or XLMRobertaModel")
    return layers


def keep_layers(body: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of `body` with only `layers`, in that order; the copy shares no weights with it."""
    kept = copy.deepcopy(body)
    _set_layers(kept, [body_layers(kept)[index] for index in layers])
    kept.config.num_hidden_layers = len(layers)
    return kept


@contextmanager
def only_layers(body: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Let `body` run with only `layers` for a while, without copying weights."""
    everything = body_layers(body)
    _set_layers(body, [everything[index] for index in layers])
    try:
        yield
    finally:
        _set_layers(body, everything)


def _set_layers(body: PreTrainedModel, layers: Iterable[torch.nn.Module]) -> None:
    encoder = body.get_submodule("encoder")
    encoder.layer = torch.nn.ModuleList(layers)


def usual_candidates(num_teacher_layers: int, num_layers: int) -> list[Layers]:
    """Choices worth scoring for any teacher: evenly spread, the first with the last, ends with the last, the top.

    Raises ConfigError where the student would have more layers than the teacher.
    """
    if num_layers > num_teacher_layers:
        raise ConfigError(f"layers.num_layers: {num_layers}; the teacher has {num_teacher_layers}")
    last = num_teacher_layers - 1
    if num_layers == 1:
        return [(last,), (0,)]
    spread = tuple(round(index * last / (num_layers - 1)) for index in range(num_layers))
    head = num_layers // 2
    choices = {
        spread: None,
        (*range(num_layers - 1), last): None,
        (*range(head), *range(num_teacher_layers - (num_layers - head), num_teacher_layers)): None,
        tuple(range(num_teacher_layers - num_layers, num_teacher_layers)): None,
    }
    return list(choices)


def choose_layers(num_teacher_layers: int, config: LayerConfig, score: Callable[[Layers], LayerScore]) -> LayerChoice:
    """Score the usual and the given candidates, and the greedy drop's end; the one to keep first, then the best."""
    candidates = usual_candidates(num_teacher_layers, config.num_layers)
    given = {"candidates": config.candidates, "keep": [config.keep] if config.keep else []}
    for key, layers in [(key, layers) for key, choices in given.items() for layers in choices]:
        ascending = list(layers) == sorted(set(layers))
        if len(layers) != config.num_layers or not ascending or not set(layers) <= set(range(num_teacher_layers)):
            raise ConfigError(
                f"layers.{key}: {list(layers)}; expected {config.num_layers} layers in ascending order, "
                f"each from 0 to {num_teacher_layers - 1}"
            )
        candidates.append(tuple(layers))
    if config.greedy and not config.keep:
        candidates.append(greedy_drop(num_teacher_layers, config.num_layers, score))
    scores = {layers: score(layers) for layers in dict.fromkeys(candidates)}
    return LayerChoice(dict(sorted(scores.items(), key=lambda item: (item[0] != config.keep, -item[1].agreement))))


def greedy_drop(num_teacher_layers: int, num_layers: int, score: Callable[[Layers], LayerScore]) -> Layers:
    """Drop one layer at a time, always the one without which the agreement stays highest."""
    layers = tuple(range(num_teacher_layers))
    while len(layers) > num_layers:
        shorter = [layers[:index] + layers[index + 1 :] for index in range(len(layers))]
        layers = max(shorter, key=lambda choice: score(choice).agreement)
    return layers
