"""The main job: compress a teacher, distil it into the student, and report what was lost and gained.

    python jobs/distill.py                                  the demo (jobs/runs/demo.yaml)
    python jobs/distill.py jobs/runs/me5s.yaml --distillation.epochs 2
    python jobs/distill.py my.yaml --student artifacts/small/student_initial      what jobs/compress.py made
    ray job submit --working-dir . -- python jobs/distill.py

Stages: corpus → student_initial → texts → vectors → dataset → training → student → report. Each is a directory with a
fingerprint of what it was made from; a rerun skips what is finished and goes on with what is not.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator
from rich.console import Console

from embedlib.artifact import (
    MANIFEST_NAME,
    fingerprint,
    is_finished,
    manifest_of,
    mark_of,
    model_fingerprint,
    new_artifact,
    read_manifest,
)
from embedlib.batching import TokenIds
from embedlib.compression import CompressionConfig, known_prompts
from embedlib.config import Config
from embedlib.corpus import READ_ROWS, choose_texts, short_texts
from embedlib.dataset import DistillationSet, write_tokens, write_vectors
from embedlib.distillation import (
    DistillationConfig,
    Plan,
    Rates,
    distil,
    load_student,
    measure_rates,
    new_state,
    plan_within,
    resolve_dtype,
    validation_cosine,
    write_trained,
)
from embedlib.embedding import VectorsConfig
from embedlib.encoder import Encoder, with_prompts
from embedlib.errors import ConfigError
from embedlib.evaluation.comparison import HeldOut, Paths, compare, draw
from embedlib.evaluation.report import Report, Training, print_table, read_report, render_html, write_json
from embedlib.model_directory import read_prompts
from embedlib.pretrained import EMBEDDED_TEACHER, EMBEDDED_TEACHER_NAME, pretrained_directory
from embedlib.storage import UserModel, UserPath
from embedlib.training import freeze_blocks
from jobs.compress import CompressJob, loaded_teacher, make_corpus, make_student, probe_texts, teacher_of
from jobs.embed import EmbedConfig, embed, read_parts
from jobs.runtime import connect, format_seconds
from jobs.trainer import Trained, WorkersConfig, fit, read_history, run_worker, start_worker

DEMO_RUN = Path(__file__).parent / "runs" / "demo.yaml"
VALIDATION = "validation_cosine"
VALIDATION_TEXTS = 1000
MIN_PART_ROWS, NUM_PARTS = 512, 32


class DistillConfig(CompressJob):
    """Everything that decides a run."""

    output: Path = Path("demo")
    """Directory of all that is made; a relative one lies below $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    student: UserModel | None = None
    """The student to start from, made before: directory or hub id. Its tokenizer cuts the texts, and of `compression`
    only `prompts` counts; none: one is made of the teacher."""
    workers: WorkersConfig = WorkersConfig()
    """How the steps are spread over the cluster."""
    max_texts: int | None = Field(default=None, ge=1)
    """At most so many training texts."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for teacher vectors and training: takes fewer texts, or more epochs, as this machine's rates ask."""
    language_temperature: float = Field(default=0.7, ge=0, le=1)
    """Where not all texts are taken, a language weighs (its share)**temperature."""
    sts: list[UserPath] = Field(default_factory=list)
    """Directories or files of STS sets to score all three models on."""
    plots: bool = True
    """Draw the UMAP of the languages and the other plots of report.html."""

    @model_validator(mode="after")
    def _student_is_given_or_made(self) -> Self:
        made, default = self.compression, CompressionConfig(prompts=self.compression.prompts)
        if self.student and made != default:
            given = [key for key in CompressionConfig.model_fields if getattr(made, key) != getattr(default, key)]
            raise ValueError(f"compression: {given} given, but so is student, {self.student!r}; expected prompts alone")
        return self


class TrainJob(Config):
    """What a training worker needs to know."""

    student: Path
    """Model directory of the student as it starts."""
    dataset: Path
    """Directory of the training samples; `validation` below it holds those for validation."""
    log: Path
    """Directory of history.jsonl and of the logs of sample ids."""
    distillation: DistillationConfig
    """How the student learns."""
    workers: WorkersConfig
    """How the steps are kept safe."""


def train_worker(values: dict[str, Any]) -> None:
    """One training process: go on from the last checkpoint to the end."""
    job = TrainJob.model_validate(values)
    device = start_worker()
    dataset, validation = DistillationSet.open(job.dataset), DistillationSet.open(job.dataset / "validation")
    dtype = resolve_dtype(job.distillation.dtype, device)
    student = load_student(job.student, device)
    freeze_blocks(student, job.distillation.optimizer.frozen_blocks)
    trained = Trained(
        student,
        start=lambda model: new_state(model, len(dataset), job.distillation),
        steps=lambda state: distil(state, dataset, job.distillation),
        validate=lambda state: validation_cosine(state.model, validation, dtype),
        metric=VALIDATION,
    )
    run_worker(trained, job.workers, job.log, "distill")


def take_student(config: DistillConfig, teacher: Path) -> Path:
    """Stage `student_initial`: a copy of the student that is given.

    Raises ConfigError where it cannot learn from this teacher.
    """
    directory = config.directory / "student_initial"
    source = pretrained_directory(str(config.student))
    parents = {"teacher": model_fingerprint(teacher), "model": model_fingerprint(source)}
    mark = fingerprint(**parents)
    require_prompts(config, teacher, source)
    if is_finished(directory, mark):
        return directory
    width, wanted = Encoder.load(source).embedding_dim, loaded_teacher(teacher).embedding_dim
    if width != wanted:
        raise ConfigError(
            f"student {config.student}: its vectors have {width} dimensions, the teacher's {wanted}; expected as many. "
            "jobs/train.py learns from a teacher of another width: objective.distil"
        )
    with new_artifact(directory, "student_initial", mark, parents=parents) as (scratch, measurements):
        shutil.copytree(source, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME))
        if (made := read_manifest(source)) and made.kind == "student_initial":
            measurements |= made.measurements
    return directory


def require_prompts(config: DistillConfig, teacher: Path, student: Path) -> None:
    """ConfigError where texts would reach student and teacher under different prompts, unless the run says which."""
    asked = config.compression.prompts
    theirs, own = (
        {name: prompt for name, prompt in read_prompts(directory).items() if name in asked}
        for directory in (teacher, student)
    )
    told = bool(config.teacher_prompts) and theirs.keys() == own.keys()
    # An empty prompt is none.
    if theirs != own and any([*theirs.values(), *own.values()]) and not told:
        raise ConfigError(
            f"student {config.student}: of the prompts {asked} it has {own}, the teacher {theirs}; expected the same, "
            f"or teacher_prompts that names what goes before the teacher's texts for each of {sorted(own)}"
        )


def make_plan(config: DistillConfig, teacher_directory: Path, corpus: Path, student: Path) -> Plan:
    """How many texts and epochs: as configured, or what fits into `minutes`.

    Stage `rates`: what this machine was measured to do, once, so that a resumed run keeps to its plan.
    """
    available = int(short_texts(corpus / "train.parquet", config.max_text_characters).sum())
    plan = Plan(min(config.max_texts or available, available), config.distillation.epochs)
    if config.minutes is None:
        return plan
    directory = config.directory / "rates"
    mark = fingerprint(
        student=mark_of(student),
        distillation=config.distillation.model_dump(mode="json"),
        max_text_characters=config.max_text_characters,
    )
    if not is_finished(directory, mark):
        teacher = loaded_teacher(teacher_directory)
        with new_artifact(directory, "rates", mark) as (_, measurements):
            probe = probe_texts(config, teacher, corpus)
            measurements |= measure_rates(teacher, student, probe, config.distillation)._asdict()
    return plan_within(config.minutes, Rates(**manifest_of(directory).measurements), plan.num_texts, plan.epochs)


def make_texts(config: DistillConfig, corpus: Path, num_texts: int) -> Path:
    """Stage `texts`: the training texts that are taken."""
    directory = config.directory / "texts"
    values = {
        "num_texts": num_texts,
        "language_temperature": config.language_temperature,
        "seed": config.seed,
        "max_text_characters": config.max_text_characters,
    }
    parents = {"corpus": mark_of(corpus)}
    mark = fingerprint(**parents, config=values)
    if not is_finished(directory, mark):
        with new_artifact(directory, "texts", mark, parents=parents, config=values) as (scratch, measurements):
            measurements["texts"] = choose_texts(
                corpus / "train.parquet",
                scratch,
                num_texts,
                config.language_temperature,
                config.seed,
                config.max_text_characters,
            )
    return directory


def make_vectors(config: DistillConfig, teacher: Path, texts: Path) -> Path:
    """Stage `vectors`: the teacher's vector of every training text, before normalisation."""
    num_texts = manifest_of(texts).measurements["texts"]
    job = EmbedConfig(
        input=str(texts / "texts.parquet"),
        output=str(config.directory / "vectors"),
        model=str(teacher),
        prompts=[name for name in config.compression.prompts if name in read_prompts(teacher)],
        vectors=VectorsConfig(normalise=False),
        rows_per_part=max(MIN_PART_ROWS, min(READ_ROWS, num_texts // NUM_PARTS)),
    )
    return Path(embed(job).directory.path)


def make_dataset(
    config: DistillConfig, teacher_directory: Path, student: Path, corpus: Path, texts: Path, vectors: Path
) -> Path:
    """Stage `dataset`: the student's token ids and the teacher's vectors as arrays; the same for validation."""
    directory = config.directory / "dataset"
    parents = {"student": mark_of(student), "texts": mark_of(texts), "vectors": mark_of(vectors)}
    mark = fingerprint(**parents)
    if is_finished(directory, mark):
        return directory
    encoder = Encoder.load(student, dtype=torch.float32)
    prefixes = known_prompts(encoder, config.compression.prompts)
    with new_artifact(directory, "dataset", mark, parents=parents) as (scratch, measurements):
        num_texts = manifest_of(texts).measurements["texts"]
        teacher = loaded_teacher(teacher_directory)
        write_tokens(scratch, num_texts, tokenised(encoder, texts / "texts.parquet", prefixes))
        write_vectors(scratch, num_texts, teacher.embedding_dim, read_parts(vectors))
        measurements["tokens"] = int(np.load(scratch / "offsets.npy", mmap_mode="r")[-1])

        held = HeldOut.read(corpus / "validation.parquet", VALIDATION_TEXTS).texts
        asked = with_prompts(held, known_prompts(teacher, config.compression.prompts))
        pooled = teacher.encode_tokens(teacher.tokenise(asked), normalise=False).astype(np.float16)
        (scratch / "validation").mkdir()
        write_tokens(scratch / "validation", len(held), [encoder.tokenise(with_prompts(held, prefixes))])
        write_vectors(scratch / "validation", len(held), pooled.shape[1], [(np.arange(len(held)), pooled)])
    return directory


def tokenised(encoder: Encoder, path: Path, prefixes: list[str]) -> Iterator[list[TokenIds]]:
    """Token ids of a CORPUS file's texts in order, in batches; row n gets prefix n modulo their number."""
    first = 0
    for batch in pq.ParquetFile(path).iter_batches(READ_ROWS, columns=["text"]):
        yield encoder.tokenise(with_prompts(batch["text"].to_pylist(), prefixes, first))
        first += len(batch)


def make_trained(config: DistillConfig, plan: Plan, student: Path, dataset: Path) -> Path:
    """Stages `training` and `student`: the steps on Ray Train, then the distilled model directory."""
    directory = config.directory / "student"
    distillation = config.distillation.model_copy(update={"epochs": plan.epochs})
    values = distillation.model_dump(mode="json")
    parents = {"student_initial": mark_of(student), "dataset": mark_of(dataset)}
    mark = fingerprint(**parents, config=values)
    if is_finished(directory, mark):
        return directory
    run = config.directory / "training" / mark[:12]
    log = run / "log"
    log.mkdir(parents=True, exist_ok=True)
    job = TrainJob(student=student, dataset=dataset, log=log, distillation=distillation, workers=config.workers)
    most_workers = min(distillation.batch_size, plan.num_texts)
    weights, _ = fit(train_worker, job, config.workers, run, most_workers, VALIDATION)
    with new_artifact(directory, "student", mark, parents=parents, config=config.model_dump(mode="json")) as (
        scratch,
        measurements,
    ):
        write_trained(scratch, student, weights)
        measurements |= read_history(log, VALIDATION)
    return directory


def make_report(config: DistillConfig, paths: Paths, timings: dict[str, float]) -> Report:
    """Measure all three models; write report.json and report.html, unless they are there already."""
    directory = config.directory
    mark = fingerprint(student=mark_of(paths.student), sts=config.sts)
    report = read_report(directory / "report.json")
    if report and report.fingerprint == mark:
        return report
    name = EMBEDDED_TEACHER_NAME if config.teacher == EMBEDDED_TEACHER else config.teacher
    with timed("measure", timings):
        comparison = compare(name, paths, [Path(path) for path in config.sts])
    training = Training.model_validate(manifest_of(paths.student).measurements)
    plots = {}
    if config.plots:
        with timed("plots", timings):
            plots = draw(comparison, training)
    report = comparison.report(mark, training, manifest_of(paths.initial).measurements, timings)
    (directory / "report.html").write_text(render_html(report, plots))
    write_json(report, directory / "report.json")
    return report


@contextmanager
def timed(stage: str, timings: dict[str, float]) -> Iterator[None]:
    """Note and print the seconds that a stage took."""
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
    print(f"[{stage}] {format_seconds(timings[stage])}", flush=True)


def main(config: DistillConfig) -> Report:
    """Run the stages that are not finished, and report."""
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    timings: dict[str, float] = {}
    with timed("cluster", timings):
        connect()
    with timed("teacher", timings):
        teacher = teacher_of(config)
        given = take_student(config, teacher) if config.student else None
    with timed("corpus", timings):
        corpus = make_corpus(config)
    with timed("compress", timings):
        initial = given or make_student(config, teacher, corpus)
    with timed("plan", timings):
        plan = make_plan(config, teacher, corpus, initial)
    print(f"learning from {plan.num_texts:,} texts, {plan.epochs} epochs", flush=True)
    with timed("texts", timings):
        texts = make_texts(config, corpus, plan.num_texts)
    with timed("vectors", timings):
        vectors = make_vectors(config, teacher, texts)
    with timed("dataset", timings):
        dataset = make_dataset(config, teacher, initial, corpus, texts, vectors)
    with timed("training", timings):
        student = make_trained(config, plan, initial, dataset)
    report = make_report(config, Paths(teacher, initial, student, corpus / "held_out.parquet"), timings)
    print_table(report, Console(width=100))
    print(f"student: {student}\nreport:  {directory / 'report.html'}")
    return report


if __name__ == "__main__":
    run_job(DistillConfig, main, DEMO_RUN)
