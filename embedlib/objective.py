"""What a contrastive stage asks of the vectors of a batch: a weighted sum of losses, at one or several prefixes.

Teachers, guides and the frozen base come in as cached vectors of the batch's texts, so that no other model is at work
while one is trained.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from embedlib.batching import NO_TEXT
from embedlib.config import Config
from embedlib.errors import ConfigError
from embedlib.losses import (
    Against,
    cosent,
    info_nce,
    likely_positives,
    margin_mse,
    score_divergence,
    squared_error,
    triplet,
)

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class InfoNCEConfig(Config):
    """Cross entropy of the positive among the batch's other documents, or texts."""

    weight: float = Field(default=1.0, ge=0)
    """Weight; 0 leaves it out."""
    temperature: float = Field(default=0.05, gt=0)
    """What cosines are divided by: smaller ones look at the hardest negatives."""
    directions: list[Direction] = Field(default=["query_to_document"], min_length=1)
    """What is told apart from what; with document_to_query the loss is symmetric."""
    partition: Literal["joint", "separate"] = "joint"
    """All directions in one denominator, or a cross entropy each."""


class GuideConfig(Config):
    """Negatives that a guide model takes for answers do not count (GISTEmbed)."""

    margin: float = 0.0
    """How far below the positive the guide must rate a negative."""
    kind: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is a cosine or a share of the positive's."""


class DistilConfig(Config):
    """Squared distance to a teacher's unit vectors."""

    weight: float = Field(default=0.0, ge=0)
    """Weight; 0 leaves it out."""
    two_views: bool = False
    """The teacher's vector of the query is the target of the positive as well, which translates it."""


class TripletConfig(Config):
    """The positive nearer than each of the row's own negatives, by a margin."""

    weight: float = Field(default=0.0, ge=0)
    """Weight; 0 leaves it out."""
    margin: float = Field(default=0.2, gt=0)
    """By how much, in cosine."""


class ScoresConfig(Config):
    """A teacher's scores of positive and negatives."""

    margin_mse: float = Field(default=0.0, ge=0)
    """Weight of the squared error of gaps between positive and negatives."""
    divergence: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the teacher's distribution."""
    temperature: float = Field(default=0.05, gt=0)
    """What both sides' scores are divided by in the divergence."""


class CoSENTConfig(Config):
    """Pairs ranked by their labels."""

    weight: float = Field(default=0.0, ge=0)
    """Weight; 0 leaves it out."""
    temperature: float = Field(default=0.05, gt=0)
    """What cosines are divided by."""


class ObjectiveConfig(Config):
    """A weighted sum of losses."""

    info_nce: InfoNCEConfig = InfoNCEConfig()
    """Contrast within the batch."""
    guide: GuideConfig | None = None
    """Which negatives of it do not count; needs a guide model."""
    triplet: TripletConfig = TripletConfig()
    """Contrast within the row."""
    distil: DistilConfig = DistilConfig()
    """Nearness to a teacher; needs a teacher model."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of 1 − cosine to the model as it was before this stage."""
    scores: ScoresConfig = ScoresConfig()
    """Nearness to scores; needs a dataset with scores."""
    cosent: CoSENTConfig = CoSENTConfig()
    """Order by labels; needs a dataset with labels."""
    dimensions: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list)
    """Prefixes of the vectors for which all of it holds, the whole included (matryoshka, arXiv:2205.13147); none: the
    whole alone."""

    @property
    def needs(self) -> set[str]:
        """What there must be for it: models whose vectors it reads (guide, teacher, base), and columns of a dataset."""
        wanted = {
            "guide": self.guide is not None,
            "teacher": self.distil.weight > 0,
            "base": self.anchor > 0,
            "positive_scores": self.scores.margin_mse > 0 or self.scores.divergence > 0,
            "label": self.cosent.weight > 0,
            # Without them a row's scores are of its positive alone, which teaches nothing.
            "negatives": self.triplet.weight > 0 or self.scores.margin_mse > 0 or self.scores.divergence > 0,
        }
        return {name for name, is_wanted in wanted.items() if is_wanted}

    @model_validator(mode="after")
    def _has_a_term(self) -> "ObjectiveConfig":
        weights = [self.info_nce.weight, self.triplet.weight, self.distil.weight, self.anchor, self.cosent.weight]
        if not any([*weights, self.scores.margin_mse, self.scores.divergence]):
            raise ValueError("every weight is 0; expected at least one loss")
        if self.guide and not self.info_nce.weight:
            raise ValueError(f"guide: {self.guide}; expected none, or info_nce.weight above 0: it masks its negatives")
        if self.cosent.weight and "info_nce" not in self.model_fields_set:
            raise ValueError(
                "cosent: info_nce would contrast pairs of whatever label as right answers; expected its weight, 0 "
                "where labels are all there is"
            )
        return self


class Samples(NamedTuple):
    """A batch: which of its texts belong together, and what is known of them. A text stands in it once."""

    queries: torch.Tensor
    """(samples,) number of the query's text."""
    positives: torch.Tensor
    """(samples,)."""
    negatives: torch.Tensor
    """(samples, most negatives of a sample), `NO_TEXT` where there are fewer."""
    scores: torch.Tensor | None = None
    """(samples, 1 + most negatives) a teacher's, positive first, −inf where there is no negative."""
    labels: torch.Tensor | None = None
    """(samples,) how like query and positive are."""
    answers: torch.Tensor | None = None
    """(pairs, 2) a query and a text that answers it, as samples outside of the batch tell."""
    guide: torch.Tensor | None = None
    """(texts, guide dim) unit vectors of a guide."""
    teacher: torch.Tensor | None = None
    """(texts, teacher dim) vectors of a teacher."""
    base: torch.Tensor | None = None
    """(texts, dim) vectors of the model before this stage."""


class Contrast(NamedTuple):
    """One direction of InfoNCE for some samples, by the numbers of texts: `Against` before there are scores."""

    left: torch.Tensor
    """(rows,)."""
    right: torch.Tensor
    """(columns,)."""
    own: torch.Tensor
    masked: torch.Tensor
    has_positive: bool


class Objectives(nn.Module):
    """The objective of each dataset; the weights are the projections to a teacher of another width.

    Objectives share them: a prefix is mapped to the teacher's space in one way, whatever else is asked of it.
    """

    def __init__(self, configs: Sequence[ObjectiveConfig], embedding_dim: int, teacher_dim: int | None = None) -> None:
        """`configs` by the number of the dataset; `teacher_dim` is needed where there is a teacher."""
        super().__init__()
        for number, config in enumerate(configs):
            if too_wide := [dim for dim in config.dimensions if dim > embedding_dim]:
                raise ConfigError(
                    f"objective.dimensions: {too_wide[0]} (datasets.{number}); the model's vectors have {embedding_dim}"
                )
        # A teacher of another width has other prefixes than the student: each of these has a map of its own.
        mapped = {dim for config in configs if config.distil.weight for dim in (*config.dimensions, embedding_dim)}
        self.projections = nn.ModuleDict(
            {str(dim): nn.Linear(dim, teacher_dim, bias=False) for dim in sorted(mapped, reverse=True)}
            if teacher_dim not in (None, embedding_dim)
            else {}
        )
        self.of_datasets = [Objective(config, embedding_dim, self.projections) for config in configs]


class Objective:
    """The losses of a configuration."""

    def __init__(self, config: ObjectiveConfig, embedding_dim: int, projections: nn.ModuleDict) -> None:
        """`projections`, by prefix, are empty where the teacher is as wide as the student."""
        self.config, self.projections = config, projections
        self.dimensions = sorted({*config.dimensions, embedding_dim}, reverse=True)

    @property
    def is_whole(self) -> bool:
        """Whether rows cannot be cut: CoSENT compares all pairs."""
        return self.config.cosent.weight > 0

    def prefixes(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Pooled vectors (texts, dim) as unit vectors of each of the dimensions."""
        return [functional.normalize(vectors[:, :dim], dim=-1) for dim in self.dimensions]

    def __call__(self, prefixes: Sequence[torch.Tensor], samples: Samples, rows: slice) -> torch.Tensor:
        """Losses (len(rows),) of those samples, from what `prefixes` gives for the whole batch."""
        contrasts = self._contrasts(samples, rows) if self.config.info_nce.weight else []
        losses = [self._at(unit, samples, rows, contrasts) for unit in prefixes]
        return torch.stack(losses).mean(dim=0)

    def _at(self, unit: torch.Tensor, samples: Samples, rows: slice, contrasts: Sequence[Contrast]) -> torch.Tensor:
        config, dim = self.config, unit.shape[1]
        queries, positives = samples.queries[rows], samples.positives[rows]
        positive = (unit[queries] * unit[positives]).sum(dim=-1)
        total = unit.new_zeros(len(queries))
        if config.info_nce.weight:
            against = [
                Against(unit[each.left] @ unit[each.right].T, each.own, each.masked, each.has_positive)
                for each in contrasts
            ]
            loss = info_nce(positive, against, config.info_nce.temperature, config.info_nce.partition)
            total = total + config.info_nce.weight * loss
        if config.triplet.weight:
            negatives = _own_negatives(unit, samples, rows)
            total = total + config.triplet.weight * triplet(positive, negatives, config.triplet.margin)
        if config.distil.weight:
            total = total + config.distil.weight * self._distil(dim, unit, samples, rows)
        if config.anchor:
            base = _required(samples.base, "base")[:, :dim]
            cosines = [functional.cosine_similarity(unit[texts], base[texts], dim=-1) for texts in (queries, positives)]
            total = total + config.anchor * (1 - (cosines[0] + cosines[1]) / 2)
        if config.scores.margin_mse or config.scores.divergence:
            scores = torch.cat([positive[:, None], _own_negatives(unit, samples, rows)], dim=1)
            teacher = _required(samples.scores, "scores")[rows]
            total = total + config.scores.margin_mse * margin_mse(scores, teacher)
            total = total + config.scores.divergence * score_divergence(scores, teacher, config.scores.temperature)
        if config.cosent.weight:
            every = (unit[samples.queries] * unit[samples.positives]).sum(dim=-1)
            labels = _required(samples.labels, "labels")
            total = total + config.cosent.weight * cosent(every, labels, config.cosent.temperature)
        return total

    def _contrasts(self, samples: Samples, rows: slice) -> list[Contrast]:
        """What is told apart from what: the same at every prefix."""
        documents = torch.cat([samples.positives, samples.negatives[samples.negatives != NO_TEXT]]).unique()
        own_query = torch.arange(rows.start, rows.stop, device=documents.device)
        own_document = torch.searchsorted(documents, samples.positives[rows])
        sides = {
            "query_to_document": (samples.queries, documents, own_document),
            "document_to_query": (samples.positives, samples.queries, own_query),
            "query_to_query": (samples.queries, samples.queries, own_query),
            "document_to_document": (samples.positives, documents, own_document),
        }
        # Samples with the same query, or the same positive: what answers one of them answers the other.
        alike = (samples.queries[rows][:, None] == samples.queries) | (
            samples.positives[rows][:, None] == samples.positives
        )
        columns = torch.searchsorted(documents, samples.positives).expand_as(alike)
        answers = torch.zeros(len(alike), len(documents), dtype=torch.uint8, device=documents.device)
        answers = answers.scatter_reduce(1, columns, alike.to(torch.uint8), "amax").bool()
        if samples.answers is not None and len(samples.answers):
            asked, answering = samples.answers.T
            answers |= _linked(samples.queries[rows], asked, answering, documents)
            alike = alike | _linked(samples.positives[rows], answering, asked, samples.queries)
        contrasts = []
        for direction in self.config.info_nce.directions:
            left, right, own = sides[direction]
            masked = (answers if right is documents else alike) | (left[rows][:, None] == right)
            if self.config.guide:
                masked |= self._masked(left[rows], right, samples, rows, self.config.guide)
            between = direction in ("query_to_document", "document_to_query")
            contrasts.append(Contrast(left[rows], right, own, masked, between))
        return contrasts

    def _masked(
        self, left: torch.Tensor, right: torch.Tensor, samples: Samples, rows: slice, config: GuideConfig
    ) -> torch.Tensor:
        rating = _required(samples.guide, "guide")
        positive = (rating[samples.queries[rows]] * rating[samples.positives[rows]]).sum(dim=-1)
        return likely_positives(positive, rating[left] @ rating[right].T, config.margin, config.kind)

    def _distil(self, dim: int, unit: torch.Tensor, samples: Samples, rows: slice) -> torch.Tensor:
        teacher = _required(samples.teacher, "teacher")
        queries, positives = samples.queries[rows], samples.positives[rows]
        losses = []
        for texts, targets in ((queries, queries), (positives, queries if self.config.distil.two_views else positives)):
            student = unit[texts]
            if str(dim) in self.projections:
                student = functional.normalize(self.projections[str(dim)](student), dim=-1)
                target = teacher[targets]
            else:
                target = teacher[targets][:, :dim]
            # A prefix of a unit vector is none: it is normalised anew at each width.
            losses.append(squared_error(student, functional.normalize(target, dim=-1)))
        return torch.stack(losses).mean(dim=0)


def _linked(left: torch.Tensor, ends: torch.Tensor, others: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Whether a pair of `ends` and `others` (pairs,) joins a text of `left` and one of `right`, (left, right)."""
    # By text: a large batch knows far too many pairs to compare each with all of `right`.
    rows, pairs = (left[:, None] == ends).nonzero(as_tuple=True)
    linked = torch.zeros(len(left), 1 + int(max(others.max(), right.max())), dtype=torch.bool, device=left.device)
    linked[rows, others[pairs]] = True
    return linked[:, right]


def _own_negatives(unit: torch.Tensor, samples: Samples, rows: slice) -> torch.Tensor:
    """Cosines (rows, most negatives) of queries and their own negatives, −inf where there are fewer."""
    negatives = samples.negatives[rows]
    cosines = torch.einsum("sd,snd->sn", unit[samples.queries[rows]], unit[negatives.clamp(min=0)])
    return cosines.masked_fill(negatives == NO_TEXT, -torch.inf)


def _required(values: torch.Tensor | None, name: str) -> torch.Tensor:
    if values is None:
        raise ValueError(f"the objective needs {name}; the samples have none")
    return values
