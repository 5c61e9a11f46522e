"""Contrastive training: embedlib's step against sentence-transformers' trainer, and what a large batch costs.

    python -m benchmarks.train [--quick] [--json OUT] [--pairs FILE] [--batch-size N]

Both sides start from the same student, see the same pairs in the same batches and minimise the same loss (InfoNCE over
the batch, temperature 0.05) in the same arithmetic, sentence-transformers by `CachedMultipleNegativesRankingLoss`. Its
dropout stays on, as its documentation has it, so embedlib's is switched on where the two are compared; without it, as
embedlib trains by default, has a ratio of its own (`train_vs_st_cached_mnrl_no_dropout`). Then the peak memory is taken
as the batch grows, and a step's time with the graph of the whole batch kept and without (GradCache). Every run has a
process of its own, variants take turns, and a rate leaves the first steps out. The trainer cuts texts into tokens
within its steps, embedlib before them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import PrinterCallback

from benchmarks.command import benchmark_parser, write_result
from benchmarks.distill import CORPUS_TEXTS, STUDENT, Clock, read_corpus, rows_in_order, write_untrained
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from benchmarks.mine import distinct_pairs
from embedlib import training
from embedlib.contrastive import ContrastiveConfig, batch_plan, contrast, load_encoder, start_contrast
from embedlib.dataset import ContrastiveSet
from embedlib.encoder import Encoder, default_device

LEARNING_RATE, TEMPERATURE = 2e-5, 0.05
MEMORY_BATCHES, QUICK_MEMORY_BATCHES = (256, 1024, 4096, 8192), (64, 256)
MEMORY_TOKENS, MEMORY_STEPS = 16, 2
SETTLED_PAIRS = 4096
"""After so many, a process' memory grows no further, whatever its batch: fewer would flatter small ones."""
STEP_COST_BATCH = 256
MINI_BATCH = 64


class Settings(NamedTuple):
    """What is measured."""

    batch_size: int
    num_steps: int
    warmup_steps: int
    """First steps of a run that no rate counts."""
    num_runs: int


class Variant(NamedTuple):
    """One way to take the same steps."""

    name: str
    library: str
    dtype: str
    dropout: bool


VARIANTS = (
    Variant("st_cached_mnrl", "sentence-transformers", "bfloat16", dropout=True),
    Variant("st_cached_mnrl_fp32", "sentence-transformers", "float32", dropout=True),
    Variant("embedlib", "embedlib", "bfloat16", dropout=False),
    Variant("embedlib_dropout", "embedlib", "bfloat16", dropout=True),
    Variant("embedlib_dropout_fp32", "embedlib", "float32", dropout=True),
)
RATIOS = {
    "train_vs_st_cached_mnrl": ("embedlib_dropout", "st_cached_mnrl"),
    "train_vs_st_cached_mnrl_no_dropout": ("embedlib", "st_cached_mnrl"),
    "train_vs_st_cached_mnrl_fp32": ("embedlib_dropout_fp32", "st_cached_mnrl_fp32"),
}


class Run(NamedTuple):
    """What one process measured of one variant."""

    variant: str
    pairs_per_s: float
    losses: list[float]


def main() -> None:
    """Prepare once, run every variant in turn, print and write what was measured."""
    options = parse_arguments(sys.argv[1:])
    # For the processes to come: the trainer would ask the hub about its model, and progress bars would cut the output.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    quick = options.quick
    num_steps, warmup_steps, num_runs = (4, 1, 1) if quick else (10, 3, 5)
    settings = Settings(options.batch_size or (64 if quick else 512), num_steps, warmup_steps, options.runs or num_runs)
    sizes = QUICK_MEMORY_BATCHES if quick else MEMORY_BATCHES
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        most = MEMORY_STEPS * sizes[-1]
        in_fresh_process(prepare, work, options.pairs, max(settings.batch_size * num_steps, most))
        runs = []
        for number in range(settings.num_runs):
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                runs.append(in_fresh_process(RUNNERS[variant.library], work, settings, variant))
                console.print(
                    f"run {number + 1}/{settings.num_runs} · {variant.name}: {runs[-1].pairs_per_s:,.1f} pairs/s"
                )
        memory = {}
        for size in sizes:
            steps = max(MEMORY_STEPS, min(SETTLED_PAIRS, most) // size)
            memory[size] = in_fresh_process(peak_of_steps, work, size, steps, sizes[0] * MEMORY_TOKENS)
        costs = [in_fresh_process(step_cost, work, min(STEP_COST_BATCH, sizes[-1])) for _ in range(settings.num_runs)]
    rates = {
        variant.name: median(run.pairs_per_s for run in runs if run.variant == variant.name) for variant in VARIANTS
    }
    ratios = {name: rates[ours] / rates[theirs] for name, (ours, theirs) in RATIOS.items()}
    ratios["gradcache_memory"] = max(memory.values()) / min(memory.values())
    ratios["gradcache_step_cost"] = median(twice / whole for whole, twice in costs)
    console.print(table_of(rates, memory))
    console.print_json(json.dumps(ratios))
    found = {"trained": [run._asdict() for run in runs], "peak_bytes": memory, "step_seconds": costs}
    machine = in_fresh_process(describe_machine)
    write_result(options.json, {"machine": machine, "runs": found | {"settings": settings._asdict()}, "ratios": ratios})
    if stuck := sorted({run.variant for run in runs if not all(np.isfinite(run.losses))}):
        sys.exit(f"the loss is not finite: {', '.join(stuck)}; the rates compare nothing")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("Contrastive training against sentence-transformers' trainer.", "one run of few steps")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="Parquet with `query` and `passage`, or `en` and `xx`; none: demo"
    )
    parser.add_argument("--batch-size", type=int, help="pairs of one optimiser step; none: 512, or 64 with --quick")
    return parser.parse_args(arguments)


def prepare(work: Path, source: Path | None, num_pairs: int) -> None:
    """Write the student and the pairs, tokenised and as texts, that every run shares."""
    write_untrained(work, read_corpus(None, CORPUS_TEXTS)[0])
    pairs = distinct_pairs(source, num_pairs, "the benchmark")
    encoder = Encoder.load(work / STUDENT)
    sides = {name: pairs[name].to_pylist() for name in ("query", "passage")}
    prompted = {name: [encoder.prompt(name) + text for text in texts] for name, texts in sides.items()}
    (work / "pairs.json").write_text(json.dumps(prompted))
    tokens = [ids for texts in prompted.values() for ids in encoder.tokenise(texts)]
    np.savez(work / "tokens.npz", tokens=np.concatenate(tokens), lengths=[len(ids) for ids in tokens])


def read_samples(work: Path, num_pairs: int, num_tokens: int | None = None) -> ContrastiveSet:
    """The first pairs as samples, their texts cut or repeated to `num_tokens`."""
    saved = np.load(work / "tokens.npz")
    texts = np.split(saved["tokens"], np.cumsum(saved["lengths"])[:-1])
    if num_tokens:
        texts = [np.resize(ids, num_tokens) for ids in texts]
    offsets = np.cumsum([0, *map(len, texts)])
    rows = np.arange(num_pairs)
    samples = np.stack([rows, (len(offsets) - 1) // 2 + rows], axis=1)
    return ContrastiveSet(np.concatenate(texts), offsets, samples, np.zeros(num_pairs, np.int64), np.ones(1))


def config_for(batch_size: int, dtype: str, dropout: bool) -> ContrastiveConfig:
    """What embedlib is told."""
    return ContrastiveConfig.model_validate(
        {
            "batch_size": batch_size,
            "objective": {"info_nce": {"temperature": TEMPERATURE}},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "dtype": dtype,
            "dropout": dropout,
        }
    )


def run_embedlib(work: Path, settings: Settings, variant: Variant) -> Run:
    """All steps with `embedlib.contrastive`."""
    samples = read_samples(work, settings.batch_size * settings.num_steps)
    config = config_for(settings.batch_size, variant.dtype, variant.dropout)
    model = load_encoder(work / STUDENT, default_device(), config)
    ends, losses = [], []
    for step in contrast(start_contrast(model, samples, config), samples, config):
        ends.append(time.perf_counter())
        losses.append(step.result.loss)
    return Run(variant.name, rate_of(ends, settings), losses)


def run_sentence_transformers(work: Path, settings: Settings, variant: Variant) -> Run:
    """All steps with `SentenceTransformerTrainer` and its cached loss."""
    model = SentenceTransformer(str(work / STUDENT), device=str(default_device()), local_files_only=True)
    samples = read_samples(work, settings.batch_size * settings.num_steps)
    config = config_for(settings.batch_size, variant.dtype, variant.dropout)
    order = np.concatenate(batch_plan(samples, config).epoch(0))  # the batches that embedlib draws
    texts = json.loads((work / "pairs.json").read_text())
    pairs = {name: [side[row] for row in order] for name, side in texts.items()}
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(work / "trainer"),
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=variant.dtype == "bfloat16",
            use_cpu=default_device().type == "cpu",
            dataloader_pin_memory=default_device().type == "cuda",
            batch_sampler=rows_in_order,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Run(variant.name, rate_of([mark.seconds for mark in clock.step_ends], settings), clock.losses)


def rate_of(ends: Sequence[float], settings: Settings) -> float:
    """Pairs a second after the first steps."""
    counted = ends[settings.warmup_steps - 1 :]
    return settings.batch_size * (len(counted) - 1) / (counted[-1] - counted[0])


def peak_of_steps(work: Path, batch_size: int, num_steps: int, micro_batch_tokens: int) -> int:
    """The most memory that a process, or its GPU, holds in steps of so many pairs.

    All texts are as long, so that every micro-batch is as full, two of them in the smallest batch, and nothing but the
    size of the batch differs; and none is small enough to keep its graph.
    """
    training.WHOLE_GRAPH_TOKENS, training.MAX_LANES = 0, 1
    samples = read_samples(work, num_steps * batch_size, MEMORY_TOKENS)
    config = config_for(batch_size, "auto", dropout=False).model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    device, process = default_device(), psutil.Process()
    with watched_memory(lambda: process.memory_info().rss) as peak:
        state = start_contrast(load_encoder(work / STUDENT, device, config), samples, config)
        for _ in contrast(state, samples, config):
            pass
    return int(torch.cuda.max_memory_allocated()) if device.type == "cuda" else peak[0]


def step_cost(work: Path, batch_size: int) -> tuple[float, float]:
    """Seconds of a step with the whole graph kept, and with the vectors made twice."""
    samples = read_samples(work, batch_size)
    config = config_for(batch_size, "auto", dropout=False).model_copy(update={"epochs": 4})
    training.MAX_LANES = 1  # the batch that is made twice is not dealt to threads, either
    seconds = []
    for most in (10**9, 0):
        training.WHOLE_GRAPH_TOKENS = most
        model = load_encoder(work / STUDENT, default_device(), config)
        ends = [time.perf_counter() for _ in contrast(start_contrast(model, samples, config), samples, config)]
        seconds.append((ends[-1] - ends[0]) / (len(ends) - 1))
    return seconds[0], seconds[1]


RUNNERS: dict[str, Any] = {"embedlib": run_embedlib, "sentence-transformers": run_sentence_transformers}


def table_of(rates: dict[str, float], memory: dict[int, int]) -> Table:
    """Rates, and memory by batch."""
    table = Table("what", "", title="Contrastive training")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.1f} pairs/s")
    for size, peak in memory.items():
        table.add_row(f"steps of {size:,} pairs", f"{peak / 2**20:,.0f} MiB")
    return table


if __name__ == "__main__":
    main()
