"""How fast a student learns from cached teacher vectors: embedlib's step against sentence-transformers' own trainer.

    python benchmarks/distill.py [--quick] [--json OUT] [--corpus FILE.parquet] [--batch-size N] [--device-batch N]

Both sides start from the same student and see the same texts with the same labels in the same batches, with the same
learning rate, schedule and optimiser, and both minimise the squared error to the teacher's vectors before
normalisation (`MSELoss` takes its mean over dimensions, embedlib its sum; AdamW does not feel the factor). The trainer
stands as its documentation shows it, in float32 and in bfloat16, and once more with embedlib's allocator settings,
since what a page fault costs differs from machine to machine. Its dropout stays on: without it PyTorch picks a fused
attention that is slower backwards on CPUs. Every run has a process of its own, variants take turns, and a rate leaves
the first steps out.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MSELoss
from sentence_transformers.sentence_transformer.modules import Normalize
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from benchmarks.command import benchmark_parser, read_rows, write_result
from benchmarks.machine import describe_machine, in_fresh_process
from embedlib.compress.layers import LayerConfig
from embedlib.compression import CompressionConfig, compress, known_prompts, write_student
from embedlib.dataset import DistillationSet, write_tokens, write_vectors
from embedlib.distillation import (
    DistillationConfig,
    Step,
    distil,
    load_student,
    new_state,
)
from embedlib.encoder import Encoder, default_device, with_prompts
from embedlib.losses import LossConfig
from embedlib.memory import keep_freed_memory
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.training import OptimizerConfig, SampleOrder

OPTIMIZER = OptimizerConfig(learning_rate=2e-4, warmup_fraction=0.2)
CORPUS_TEXTS = 40_000
"""Texts the student's vocabulary is chosen on, the training texts among them."""

STUDENT, DATASET, TEXTS = "student", "dataset", "texts.json"


class Settings(NamedTuple):
    """What is measured."""

    batch_size: int
    """Samples of one optimiser step."""
    device_batch: int
    """Samples that the trainer holds at once; it accumulates gradients up to `batch_size`."""
    num_steps: int
    """Steps of one run."""
    warmup_steps: int
    """First steps of a run that no rate counts."""
    num_runs: int
    """Runs of every variant."""

    @property
    def num_samples(self) -> int:
        """Samples of one run, each seen once."""
        return self.batch_size * self.num_steps


class Variant(NamedTuple):
    """One way to take the same steps."""

    name: str
    trainer: str
    """`sentence-transformers` or `embedlib`."""
    dtype: str
    """Arithmetic of forward and backward: `float32`, `bfloat16` or `auto`."""
    keeps_memory: bool = False
    """Whether the trainer's process gets `embedlib.memory.keep_freed_memory`, which embedlib's always has on CPUs."""


VARIANTS = (
    Variant("st_trainer", "sentence-transformers", "float32"),
    Variant("st_trainer_bf16", "sentence-transformers", "bfloat16"),
    Variant("st_trainer_bf16_memory", "sentence-transformers", "bfloat16", keeps_memory=True),
    Variant("embedlib_fp32", "embedlib", "float32"),
    Variant("embedlib", "embedlib", "auto"),
)
RATIOS = {
    "distill_vs_st_trainer": ("embedlib", "st_trainer"),
    "distill_vs_st_trainer_bf16": ("embedlib", "st_trainer_bf16"),
    "distill_vs_st_trainer_bf16_memory": ("embedlib", "st_trainer_bf16_memory"),
    "distill_fp32_vs_st_trainer": ("embedlib_fp32", "st_trainer"),
}
"""Which median rate is divided by which."""


class Mark(NamedTuple):
    """The state of a process at the end of a step."""

    seconds: float
    """Its clock."""
    page_faults: int
    """Pages of memory it had to ask the kernel for, so far: what an allocator pays that hands freed memory back."""

    @classmethod
    def now(cls) -> "Mark":
        """This process, now."""
        return cls(time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


class Run(NamedTuple):
    """What one process measured of one variant."""

    variant: str
    step_ends: list[Mark]
    """One for each step."""
    losses: list[float]
    """Squared error of each step's batch, averaged over dimensions."""


def main() -> None:
    """Prepare once, run every variant in turn, print and write what was measured."""
    options = parse_arguments(sys.argv[1:])
    # For the processes to come: the trainer would ask the hub about its model, and progress bars would cut the output.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    settings = settings_of(options)
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        machine = in_fresh_process(describe_machine)
        console.print_json(json.dumps(machine))
        prepared = in_fresh_process(prepare, work, settings, options.corpus)
        console.print_json(json.dumps(prepared))
        runs = []
        for number in range(settings.num_runs):
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                runs.append(in_fresh_process(RUNNERS[variant.trainer], work, settings, variant))
                rate = samples_per_s(runs[-1].step_ends, settings)
                console.print(f"run {number + 1}/{settings.num_runs} · {variant.name}: {rate:,.1f} samples/s")
        breakdown = in_fresh_process(profile_step, work, settings)
    console.print(rates_table(runs, settings, prepared), breakdown_table(breakdown))
    result = {
        "machine": machine,
        "settings": settings._asdict() | {"optimizer": OPTIMIZER.model_dump(mode="json"), "data": prepared},
        "runs": [describe_run(run, settings) for run in runs],
        "ratios": ratios_of(rates_of(runs, settings)),
        "step_seconds_by_kind": breakdown,
    }
    console.print_json(json.dumps(result["ratios"]))
    write_result(options.json, result)
    if stuck := sorted({run.variant for run in runs if not falls(run.losses)}):
        sys.exit(f"the loss did not fall: {', '.join(stuck)}; the rates compare nothing")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("Distillation throughput against sentence-transformers' trainer.", "one run of few steps")
    parser.add_argument("--batch-size", type=int, default=128, help="samples of one optimiser step")
    parser.add_argument("--device-batch", type=int, help="samples the trainer holds at once; none: the whole batch")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What the command line asks to measure; ends the process where the batches do not divide."""
    device_batch = options.device_batch or options.batch_size
    if options.batch_size % device_batch:
        sys.exit(f"--device-batch {device_batch}: expected a divisor of --batch-size {options.batch_size}")
    num_steps, warmup_steps, num_runs = (8, 3, 1) if options.quick else (24, 6, 5)
    return Settings(options.batch_size, device_batch, num_steps, warmup_steps, options.runs or num_runs)


def prepare(work: Path, settings: Settings, corpus: Path | None) -> dict[str, Any]:
    """Write the student, the texts and the samples that every run shares; return what is worth knowing of them."""
    by_language, texts = read_corpus(corpus, settings.num_samples)
    teacher, num_parameters = write_untrained(work, by_language)
    prompts = known_prompts(teacher, CompressionConfig().prompts)
    texts = with_prompts(texts, prompts)
    start = time.perf_counter()
    tokens = Encoder.load(work / STUDENT).tokenise(texts)
    tokenise_s = time.perf_counter() - start
    vectors = teacher.encode_tokens(teacher.tokenise(texts), normalise=False).astype(np.float16)
    (work / DATASET).mkdir()
    write_tokens(work / DATASET, len(texts), [tokens])
    write_vectors(work / DATASET, len(texts), vectors.shape[1], [(np.arange(len(texts)), vectors)])
    (work / TEXTS).write_text(json.dumps(texts))
    lengths = np.array([len(sequence) for sequence in tokens])
    return {
        "corpus": corpus.name if corpus else "demo",
        "samples": len(texts),
        "languages": len(by_language),
        "student_params": num_parameters,
        "tokens_a_sample": float(lengths.mean()),
        "tokens_a_sample_with_padding": padding_by_trainer(lengths, settings),
        "tokenise_s_a_sample": tokenise_s / len(texts),
    }


def write_untrained(work: Path, by_language: dict[str, list[str]]) -> tuple[Encoder, int]:
    """Compress the embedded teacher into a student below `work`; the teacher, and the student's number of weights."""
    directory = pretrained_directory(EMBEDDED_TEACHER)
    teacher = Encoder.load(directory)
    student = compress(teacher, by_language, CompressionConfig(layers=LayerConfig(greedy=False)))
    (work / STUDENT).mkdir()
    write_student(work / STUDENT, student.body, student.tokenizer, directory, teacher.max_seq_length)
    return teacher, sum(parameter.numel() for parameter in student.body.parameters())


def read_corpus(corpus: Path | None, num_training: int) -> tuple[dict[str, list[str]], list[str]]:
    """Texts by language to choose a vocabulary on, and the training texts among them."""
    rows = read_rows(corpus, max(CORPUS_TEXTS, num_training))
    if len(rows) < num_training:
        sys.exit(f"{corpus}: {len(rows)} texts; a run needs {num_training}")
    by_language: dict[str, list[str]] = {}
    for row in rows:
        by_language.setdefault(row["lang"], []).append(row["text"])
    return by_language, [row["text"] for row in rows[:num_training]]


def padding_by_trainer(lengths: npt.NDArray[np.int64], settings: Settings) -> dict[str, float]:
    """Tokens that each trainer's linear layers compute for a sample, padding included; embedlib packs."""
    at_once = settings.device_batch
    cut = [rows[start : start + at_once] for rows in sample_order(settings) for start in range(0, len(rows), at_once)]
    return {"sentence-transformers": padded_tokens(lengths, cut) / len(lengths), "embedlib": float(lengths.mean())}


def padded_tokens(lengths: npt.NDArray[np.int64], batches: Iterable[npt.NDArray[np.int64]]) -> int:
    """Tokens that a forward of each of the `batches` (row numbers) computes: rows times the longest."""
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def sample_order(settings: Settings) -> list[npt.NDArray[np.int64]]:
    """The samples of every step, as embedlib draws them; the trainer gets its rows laid out in this order."""
    return list(SampleOrder(settings.num_samples, settings.batch_size, 0).batches(0, settings.num_steps))


def run_embedlib(work: Path, settings: Settings, variant: Variant) -> Run:
    """All steps with `embedlib.distillation`."""
    dataset = DistillationSet.open(work / DATASET)
    step_ends, step_losses = [], []
    for step in embedlib_steps(work, settings, variant.dtype):
        step_ends.append(Mark.now())
        step_losses.append(step.result.loss / dataset.vectors.shape[1])
    return Run(variant.name, step_ends, step_losses)


def embedlib_steps(work: Path, settings: Settings, dtype: str) -> Iterable[Step]:
    """The steps of one run, each taken when it is asked for."""
    dataset = DistillationSet.open(work / DATASET)
    student = load_student(work / STUDENT, default_device())
    config = DistillationConfig.model_validate(
        {
            "epochs": 1,
            "batch_size": settings.batch_size,
            "loss": LossConfig(mse=1, cosine=0),
            "optimizer": OPTIMIZER,
            "dtype": dtype,
        }
    )
    return distil(new_state(student, len(dataset), config), dataset, config)


class Clock(TrainerCallback):
    """Notes when the trainer's steps end and what loss it logs."""

    def __init__(self) -> None:
        self.step_ends: list[Mark] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called after the optimiser's step."""
        self.step_ends.append(Mark.now())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Called after every step, as `logging_steps` asks."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def run_sentence_transformers(work: Path, settings: Settings, variant: Variant) -> Run:
    """All steps with `SentenceTransformerTrainer` and `MSELoss` on cached labels."""
    if variant.keeps_memory:
        keep_freed_memory()
    model = SentenceTransformer(str(work / STUDENT), device=str(default_device()), local_files_only=True)
    # Without its last module the model gives the vectors that embedlib compares, before normalisation.
    model = SentenceTransformer(modules=[module for module in model.children() if not isinstance(module, Normalize)])
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=trainer_arguments(work, settings, variant.dtype),
        train_dataset=labelled_texts(work, settings),
        loss=MSELoss(model),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Run(variant.name, clock.step_ends, clock.losses)


def trainer_arguments(work: Path, settings: Settings, dtype: str) -> SentenceTransformerTrainingArguments:
    """The trainer's defaults, with what both sides must share and without what has nothing to do with training."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(work / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=settings.device_batch,
        gradient_accumulation_steps=settings.batch_size // settings.device_batch,
        learning_rate=OPTIMIZER.learning_rate,
        weight_decay=OPTIMIZER.weight_decay,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=OPTIMIZER.warmup_fraction,
        bf16=dtype == "bfloat16",
        use_cpu=default_device().type == "cpu",
        dataloader_pin_memory=default_device().type == "cuda",
        batch_sampler=rows_in_order,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def rows_in_order(dataset: Any, **options: Any) -> DefaultBatchSampler:
    """A batch sampler that takes the rows as they lie."""
    return DefaultBatchSampler(SequentialSampler(dataset), **options)


def labelled_texts(work: Path, settings: Settings) -> datasets.Dataset:
    """The texts with the teacher's vectors, in the order in which embedlib sees them."""
    texts = json.loads((work / TEXTS).read_text())
    vectors = DistillationSet.open(work / DATASET).vectors
    order = np.concatenate(sample_order(settings))
    columns = {"text": [texts[row] for row in order], "label": list(vectors[order].astype(np.float32))}
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.Value("float32"), length=vectors.shape[1])}
    )
    return datasets.Dataset.from_dict(columns, features=features).with_format("torch")


RUNNERS: dict[str, Callable[[Path, Settings, Variant], Run]] = {
    "sentence-transformers": run_sentence_transformers,
    "embedlib": run_embedlib,
}


def profile_step(work: Path, settings: Settings) -> dict[str, float]:
    """Seconds of one embedlib step on one core by kind of work, averaged over the steps after the first ones.

    On several cores a step is dealt to threads, which the profiler does not follow.
    """
    torch.set_num_threads(1)
    steps = iter(embedlib_steps(work, settings, "auto"))
    for _ in range(settings.warmup_steps):
        next(steps)
    on_gpu = default_device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    num_steps = min(5, settings.num_steps - settings.warmup_steps)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(num_steps):
            next(steps)
        wall = time.perf_counter() - start
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events():
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of_work(call_path(event))] += own_us / 1e6 / num_steps
    seconds["Python and waiting"] = wall / num_steps - sum(seconds.values())
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def call_path(event: Any) -> list[str]:
    """The names of a profiled operation and of those that called it, innermost first."""
    path = []
    while event is not None:
        path.append(event.name)
        event = event.cpu_parent
    return path


KINDS = {
    "attention": ("bmm", "softmax", "scaled_dot_product"),
    "matmul": ("addmm", "mm", "linear"),
    "LayerNorm and GELU": ("layer_norm", "gelu"),
    "copies and casts": ("copy_", "_to_copy"),
}
"""Parts of operations' names by kind of work; the first that fits counts."""


def kind_of_work(path: Sequence[str]) -> str:
    """What an operation is for, by its name and its callers' (innermost first).

    >>> kind_of_work(["aten::mm", "AddmmBackward0", "autograd::engine::evaluate_function: AddmmBackward0"])
    'matmul, backward'
    >>> kind_of_work(["aten::_fused_adamw_", "Optimizer.step#AdamW.step"])
    'optimiser'
    """
    if "linalg_vector_norm" in path[0] or any(name.startswith("Optimizer.") for name in path):
        return "optimiser"
    if any("EmbeddingBackward" in name or name == "aten::to_dense" for name in path):
        return "embedding gradient"
    kind = next((kind for kind, parts in KINDS.items() if any(part in path[0] for part in parts)), "other")
    if kind != "matmul":
        return kind
    backward = any(name.startswith("autograd::engine") for name in path)
    return "matmul, backward" if backward else "matmul, forward"


def samples_per_s(step_ends: Sequence[Mark], settings: Settings) -> float:
    """Samples a second over the steps after the first `warmup_steps`."""
    counted = step_ends[settings.warmup_steps - 1 :]
    return settings.batch_size * (len(counted) - 1) / (counted[-1].seconds - counted[0].seconds)


def page_faults_a_step(step_ends: Sequence[Mark], settings: Settings) -> float:
    """Page faults of the same steps, averaged."""
    counted = step_ends[settings.warmup_steps - 1 :]
    return (counted[-1].page_faults - counted[0].page_faults) / (len(counted) - 1)


def rates_of(runs: Sequence[Run], settings: Settings) -> dict[str, list[float]]:
    """Samples a second of every run, by variant."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        rates.setdefault(run.variant, []).append(samples_per_s(run.step_ends, settings))
    return rates


def ratios_of(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median rates divided as RATIOS says."""
    return {name: median(rates[ours]) / median(rates[peer]) for name, (ours, peer) in RATIOS.items()}


def ends_of(step_losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the first and of the last quarter of a run."""
    quarter = max(1, len(step_losses) // 4)
    return fmean(step_losses[:quarter]), fmean(step_losses[-quarter:])


def falls(step_losses: Sequence[float]) -> bool:
    """Whether a run learned: the last quarter's loss is below the first's."""
    first, last = ends_of(step_losses)
    return last < first


def describe_run(run: Run, settings: Settings) -> dict[str, Any]:
    """One run for the JSON file."""
    return {
        "variant": run.variant,
        "samples_per_s": samples_per_s(run.step_ends, settings),
        "page_faults_a_step": page_faults_a_step(run.step_ends, settings),
        "step_s": np.diff([mark.seconds for mark in run.step_ends]).tolist(),
        "losses": run.losses,
    }


def rates_table(runs: Sequence[Run], settings: Settings, prepared: Mapping[str, Any]) -> Table:
    """Rates, what they come from, and losses, by variant."""
    table = Table(title=f"Distillation in batches of {settings.batch_size}, median of {settings.num_runs} run(s)")
    for column in ("variant", "samples/s", "ratio", "tokens a sample", "page faults a step", "MSE first → last"):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    rates = rates_of(runs, settings)
    for variant in VARIANTS:
        own, of_variant = rates[variant.name], [run for run in runs if run.variant == variant.name]
        first, last = ends_of([fmean(values) for values in zip(*(run.losses for run in of_variant), strict=True)])
        table.add_row(
            variant.name,
            f"{median(own):,.1f} ({min(own):,.0f} – {max(own):,.0f})",
            f"{median(own) / median(rates[VARIANTS[0].name]):.2f}",
            f"{prepared['tokens_a_sample_with_padding'][variant.trainer]:.1f}",
            f"{median(page_faults_a_step(run.step_ends, settings) for run in of_variant):,.0f}",
            f"{first:.5f} → {last:.5f}",
        )
    return table


def breakdown_table(seconds: Mapping[str, float]) -> Table:
    """Where the time of a step goes."""
    table = Table(title="One embedlib step on one core, profiled")
    table.add_column("kind of work")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for kind, value in seconds.items():
        table.add_row(kind, f"{1000 * value:,.1f}", f"{value / sum(seconds.values()):.1%}")
    return table


if __name__ == "__main__":
    main()
