"""Merge models trained from one base: `python jobs/merge.py --base B --models '["M1", "M2"]' --output merged`.

`--method self_positioning` finds the weights on a probe set of several tasks: `--probe.data '[{"path": …}, …]'`, as
jobs/train.py takes datasets, and scores what it found beside base, parts and uniform merge on a share of it that the
search did not see. All other methods take the weights given, or equal ones.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
from collections.abc import Sequence
from math import isclose
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from embedlib.artifact import fingerprint, is_finished, manifest_of, mark_of, model_fingerprint, new_artifact
from embedlib.config import Config
from embedlib.contrastive import (
    ContrastiveConfig,
    contrast,
    load_encoder,
    scores_by_dataset,
    start_contrast,
    validation_metric,
)
from embedlib.dataset import ContrastiveSet
from embedlib.distillation import load_student, write_trained
from embedlib.errors import ConfigError
from embedlib.merging import SelfPositioning, Weights, linear, slerp, task_arithmetic, ties
from embedlib.model_directory import read_prompts, trained_dimensions, write_trained_dimensions
from embedlib.objective import InfoNCEConfig, ObjectiveConfig
from embedlib.pretrained import pretrained_directory
from embedlib.storage import Store, UserModel
from embedlib.training import OptimizerConfig
from embedlib.training_texts import TrainingData
from jobs.metrics import RunReport
from jobs.runtime import artifacts_directory, connect
from jobs.train import TrainConfig, make_dataset, make_texts, require_needs

UNIFORM, FOUND = "uniform merge", "found merge"
TOKENIZER, POOLING = "tokenizer.json", "1_Pooling/config.json"
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")
# Of TIES, where none is given.
DENSITY = 0.2


class ProbeConfig(Config):
    """How Self Positioning searches."""

    data: list[TrainingData] = Field(default_factory=list)
    """Samples of the tasks that the merged model is for; few thousand are enough. Best are some that no model was
    trained on: on its own samples each looks better than it is."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Of the merge weights."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the samples."""
    batch_size: int = Field(default=64, ge=2)
    """Samples of a step."""
    temperature: float = Field(default=0.05, gt=0)
    """Of InfoNCE, which is minimised on data without an `objective`."""
    sampling_temperature: float = Field(default=0.0, ge=0, le=1)
    """A dataset weighs (its samples)**sampling_temperature: at 0 all tasks count alike, whatever their size."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of each dataset's queries, at most 1000 of all together, that the search does not see; with labels at least
    10, or half where there are fewer than 20. Base, parts, uniform and found merge are scored on it: by Spearman where
    there are labels, else by MRR@10."""
    seed: int = 0
    """Decides the order of the samples."""

    @property
    def training(self) -> ContrastiveConfig:
        """The search as training: the gradient of the weights is not cut, since it is not they that move."""
        return ContrastiveConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            objective=ObjectiveConfig(info_nce=InfoNCEConfig(temperature=self.temperature)),
            optimizer=OptimizerConfig(learning_rate=self.learning_rate, max_grad_norm=1e9),
            sampling_temperature=self.sampling_temperature,
            seed=self.seed,
        )

    @property
    def objectives(self) -> list[ObjectiveConfig]:
        """What is minimised on each dataset."""
        return [data.objective or self.training.objective for data in self.data]


class MergeConfig(Config):
    """Which models are merged, and how."""

    output: Path
    """Directory of the merged model, `model`, and of a probe set; a relative one lies below $EMBEDLIB_ARTIFACTS, else
    below ./artifacts."""
    models: list[UserModel] = Field(min_length=2)
    """Hub ids or directories."""
    base: UserModel | None = None
    """What all of them were trained from; task arithmetic, TIES and Self Positioning need it."""
    method: Literal["linear", "task_arithmetic", "slerp", "ties", "self_positioning"] = "linear"
    """How weights are put together."""
    weights: list[float] | None = None
    """One for each model; none: equal ones that add up to 1. SLERP takes the second's; of TIES', whose mean they weigh,
    only the ratios matter."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Share of each task vector's largest entries that TIES keeps; none: 0.2."""
    probe: ProbeConfig = ProbeConfig()
    """What Self Positioning searches with."""

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        if self.method in ("task_arithmetic", "ties", "self_positioning") and self.base is None:
            raise ValueError(f"base: none; expected what the models were trained from, for {self.method}")
        if self.method == "slerp" and len(self.models) != 2:
            raise ValueError(f"models: {len(self.models)}; SLERP takes two")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights: {len(self.weights)}; expected one for each of {len(self.models)} models")
        if self.weights is not None and self.method == "self_positioning":
            raise ValueError(f"weights: {self.weights}; expected none, since Self Positioning finds them")
        if self.method in ("linear", "slerp") and self.weights and not isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise ValueError(f"weights: {self.weights} add up to {sum(self.weights):g}; expected 1 for {self.method}")
        if self.density is not None and self.method != "ties":
            raise ValueError(f"density: {self.density}; expected none for {self.method}, which trims nothing")
        self._require_a_probe_that_can_be()
        return self

    def _require_a_probe_that_can_be(self) -> None:
        """ValueError where there is a probe that nothing searches on, none, or one that asks for what is not there."""
        data = self.probe.data
        if self.method != "self_positioning" and data:
            raise ValueError(f"probe.data: {[each.path for each in data]}; expected none for {self.method}")
        if self.method == "self_positioning" and not data:
            raise ValueError("probe.data: none; Self Positioning searches on it")
        for number, objective in enumerate(self.probe.objectives):
            if asked := sorted(objective.needs & {"guide", "teacher"}):
                raise ValueError(
                    f"probe.data.{number}.objective: has a term that needs a {asked[0]}; expected none, a probe has "
                    "neither guide nor teacher"
                )
        require_needs("probe.data", data, self.probe.training.objective, {}, "InfoNCE")

    @property
    def directory(self) -> Path:
        """Where all that is made lies."""
        return artifacts_directory() / self.output


class Sources(NamedTuple):
    """What is merged."""

    directories: list[Path]
    models: list[Weights]
    base: Weights | None
    base_directory: Path | None


def merge(config: MergeConfig) -> Path:
    """The directory of the merged model, made unless it is finished."""
    directories = [pretrained_directory(model) for model in config.models]
    base_directory = pretrained_directory(config.base) if config.base else None
    every = [*directories, *([base_directory] if base_directory else [])]
    marks = [model_fingerprint(directory) for directory in directories]
    base_mark = model_fingerprint(base_directory) if base_directory else None
    probe = make_probe(config, every[-1]) if config.method == "self_positioning" else None
    values = config.model_dump(mode="json", exclude={"output", "models", "base", "probe"})
    # What is held out decides the probe set, and so its mark.
    values["probe"] = config.probe.model_dump(mode="json", exclude={"data", "held_out_share"})
    if probe:
        values["objectives"] = [objective.model_dump(mode="json") for objective in config.probe.objectives]
    mark = fingerprint(models=marks, base=base_mark, probe=mark_of(probe) if probe else None, config=values)
    target = config.directory / "model"
    if is_finished(target, mark):
        return target
    require_same_tokenizer(every)
    require_same_use(every)
    models = [weights_of(directory) for directory in directories]
    base = weights_of(base_directory) if base_directory else None
    require_same_shapes(every, [*models, *([base] if base else [])])
    parents = {f"model_{number}": each for number, each in enumerate(marks)}
    parents |= {"model_base": base_mark} if base_mark else {}
    report = RunReport("merge", mark, Store.at(str(config.directory)), config.model_dump(mode="json"))
    with new_artifact(target, "model", mark, parents=parents, config=config.model_dump(mode="json")) as (
        scratch,
        found,
    ):
        if probe:
            merged, told = searched(config, every[-1], base or {}, models, probe, report)
            found |= told
        else:
            merged = combined(config, base or {}, models)
        write_trained(scratch, every[-1], merged)
        # Only what every model was trained for holds of what they make up.
        write_trained_dimensions(scratch, set.intersection(*(set(trained_dimensions(each)) for each in directories)))
    report.finish()
    return target


def combined(config: MergeConfig, base: Weights, models: Sequence[Weights]) -> Weights:
    """Merged by a method that needs no data."""
    equal = [1 / len(models)] * len(models)
    match config.method:
        case "task_arithmetic":
            return task_arithmetic(base, models, config.weights or equal)
        case "slerp":
            return slerp(models[0], models[1], (config.weights or equal)[1])
        case "ties":
            return ties(base, models, config.weights or equal, config.density or DENSITY)
        case _:
            return linear(models, config.weights or equal)


def make_probe(config: MergeConfig, base: Path) -> Path:
    """The probe set, tokenised for the base, as a directory of arrays."""
    job = TrainConfig(
        output=config.output / "probe",
        model=str(base),
        datasets=config.probe.data,
        training=config.probe.training,
        validation_share=config.probe.held_out_share,
    )
    texts = make_texts(job, "probe.data", "probe.held_out_share")
    return make_dataset(job, {"model": base}, {"model": model_fingerprint(base)}, texts)


def searched(
    config: MergeConfig,
    base_directory: Path,
    base: Weights,
    models: Sequence[Weights],
    probe: Path,
    report: RunReport,
) -> tuple[Weights, dict[str, Any]]:
    """What Self Positioning comes to on a probe set, and the measurements: merge weights and held-out scores."""
    merged, weights = self_positioned(config, base_directory, base, models, ContrastiveSet.open(probe), report)
    uniform = task_arithmetic(base, models, [1 / len(models)] * len(models))
    candidates = [("base", base), *zip(config.models, models, strict=True), (UNIFORM, uniform), (FOUND, merged)]
    held_out = held_out_scores(base_directory, candidates, ContrastiveSet.open(probe / "validation"))
    return merged, {"weights": weights, "held_out": held_out}


def self_positioned(
    config: MergeConfig,
    base_directory: Path,
    base: Weights,
    models: Sequence[Weights],
    probe: ContrastiveSet,
    report: RunReport,
) -> tuple[Weights, list[float]]:
    """Weights after the search, and the merge weights it found."""
    training = config.probe.training
    model = load_encoder(base_directory, torch.device("cpu"), training)
    state = start_contrast(model, probe, training, config.probe.objectives)
    optimizer = SelfPositioning(dict(model.named_parameters()), base, models, training.optimizer.learning_rate)
    state.optimizer = optimizer
    report.begin("position", state.total_steps, "steps")
    for step in contrast(state, probe, training):
        at = ", ".join(f"{weight:.3f}" for weight in optimizer.weights.tolist())
        report.update(step.step, f"loss {step.result.loss:.4f} · weights {at}", {"loss": step.result.loss})
    return dict(model.state_dict()), optimizer.weights.tolist()


def held_out_scores(
    base_directory: Path, candidates: Sequence[tuple[str, Weights]], held_out: ContrastiveSet
) -> dict[str, Any]:
    """What each of the candidates, weights by name, scores on each dataset of a probe, and the mean over them."""
    model = load_student(base_directory, torch.device("cpu"))
    scores = []
    for name, weights in candidates:
        model.load_state_dict(weights, strict=False)  # weights know no buffers
        by_dataset = list(scores_by_dataset(model, held_out, torch.float32).values())
        scores.append({"model": name, "mean": sum(by_dataset) / len(by_dataset), "datasets": by_dataset})
    return {"metric": validation_metric(held_out), "samples": len(held_out), "scores": scores}


def held_out_table(held_out: dict[str, Any]) -> Table:
    """What `held_out_scores` gives, a row for each candidate."""
    scores = held_out["scores"]
    table = Table(title=f"{held_out['metric']} on {held_out['samples']:,} samples that the search did not see")
    for column in ("model", "mean", *(f"probe.data.{number}" for number in range(len(scores[0]["datasets"])))):
        table.add_column(column, justify="left" if column == "model" else "right")
    for each in scores:
        table.add_row(each["model"], *(f"{score:.4f}" for score in (each["mean"], *each["datasets"])))
    return table


def warning_of(held_out: dict[str, Any]) -> str | None:
    """A line where the search came to nothing that the uniform merge had not."""
    mean = {each["model"]: each["mean"] for each in held_out["scores"]}
    if mean[FOUND] > mean[UNIFORM]:
        return None
    return (
        f"warning: on what the search did not see the found merge scores {mean[FOUND]:.4f}, the uniform one "
        f"{mean[UNIFORM]:.4f}; take --method linear, or a larger probe"
    )


def weights_of(directory: Path) -> Weights:
    """The float32 weights of a model directory by name."""
    return {
        name: parameter.detach() for name, parameter in load_student(directory, torch.device("cpu")).named_parameters()
    }


def require_same_tokenizer(directories: Sequence[Path]) -> None:
    """ConfigError that says how tokenizers differ: a row of the embedding table must mean the same piece everywhere."""
    if missing := [directory for directory in directories if not (directory / TOKENIZER).is_file()]:
        raise ConfigError(f"models: {missing[0]} has no {TOKENIZER}; expected a fast tokenizer")
    # As this version writes them: an older one left out what is as usual.
    whole = [json.loads(Tokenizer.from_file(str(directory / TOKENIZER)).to_str()) for directory in directories]
    first, *others = (each["model"] for each in whole)
    for directory, other in zip(directories[1:], others, strict=True):
        if first.get("type") != other.get("type"):
            raise ConfigError(
                f"models: {directory} has a {other.get('type')} tokenizer; {directories[0]} {first.get('type')}"
            )
        here, there = pieces(first), pieces(other)
        if len(here) != len(there):
            raise ConfigError(f"models: {directory} has {len(there):,} pieces; {directories[0]} {len(here):,}")
        for number, (a, b) in enumerate(zip(here, there, strict=True)):
            if a != b:
                raise ConfigError(f"models: piece {number} of {directory} is {b!r}; of {directories[0]} {a!r}")
    parts, *others_parts = map(parts_of, whole)
    for directory, other_parts in zip(directories[1:], others_parts, strict=True):
        if unlike := [name for name in parts | other_parts if parts.get(name) != other_parts.get(name)]:
            raise ConfigError(f"models: {unlike[0]} of {directory}'s tokenizer is not that of {directories[0]}")


def require_same_use(directories: Sequence[Path]) -> None:
    """ConfigError where models pool differently, or were trained with other prompts: none of them would be meant."""
    for directory in directories[1:]:
        for what, read in (("pooling", pooling_of), ("prompts", read_prompts)):
            here, there = read(directories[0]), read(directory)
            if here != there:
                raise ConfigError(f"models: {what} of {directory}: {there}; of {directories[0]}: {here}")


def pooling_of(directory: Path) -> Any:
    """How a model makes one vector of a text's many."""
    path = directory / POOLING
    return json.loads(path.read_text()) if path.is_file() else None


def pieces(model: dict[str, Any]) -> list[Any]:
    """The pieces of a tokenizer file's model in the order of their ids."""
    vocab = model["vocab"]
    return sorted(vocab, key=vocab.__getitem__) if isinstance(vocab, dict) else [tuple(piece) for piece in vocab]


def parts_of(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What decides how a tokenizer cuts besides its pieces, by name: model.merges, model.unk_id, normalizer, …"""
    of_model = {f"model.{name}": value for name, value in tokenizer["model"].items() if name != "vocab"}
    return of_model | {name: tokenizer.get(name) for name in TOKENIZER_PARTS}


def require_same_shapes(directories: Sequence[Path], models: Sequence[Weights]) -> None:
    """ConfigError that names the first weights that do not fit."""
    for directory, model in zip(directories[1:], models[1:], strict=True):
        for name in models[0].keys() | model.keys():
            here, there = (tuple(each[name].shape) if name in each else None for each in (models[0], model))
            if here != there:
                raise ConfigError(f"models: {name} of {directory} is {there}; of {directories[0]} {here}")


def main(config: MergeConfig) -> Path:
    """Merge, on a cluster where a probe set has to be prepared."""
    if config.method == "self_positioning":
        connect()
    directory = merge(config)
    if held_out := manifest_of(directory).measurements.get("held_out"):
        Console(width=100).print(held_out_table(held_out))
        if warning := warning_of(held_out):
            print(warning)
    print(f"model: {directory}")
    return directory


if __name__ == "__main__":
    run_job(MergeConfig, main)
