"""What the embedding job costs beside its encoder, and whether its memory stays flat while its input grows.

    python benchmarks/embed_job.py [--quick] [--json OUT] [--corpus FILE.parquet] [--model MODEL] [--runs N]

First `jobs/embed.py` and a bare loop over the same encoder take turns on the same texts; starting processes and loading
models is told apart. Then an encoder of one tiny layer embeds ever more rows, so that the pipeline is measured and not
the forward: peak resident memory of all its processes, and seconds by rows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.command import benchmark_parser, read_texts, write_result
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from embedlib.encoder import Encoder
from embedlib.model_directory import write_body, write_head, write_tokenizer
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from jobs.embed import EmbedConfig, embed
from jobs.runtime import connect, encoder_processes

LOOP_TEXTS, QUICK_LOOP_TEXTS = 16_000, 1000
ROWS, QUICK_ROWS = (200_000, 1_000_000, 5_000_000), (20_000, 40_000, 80_000)
PART_ROWS = 2048


class Growth(NamedTuple):
    """One input size."""

    rows: int
    seconds: float
    """Embedding alone, processes up and models loaded."""
    peak_rss: int
    """Bytes of all processes of the job together: driver and encoders."""


def main() -> None:
    """Measure both, print and write."""
    options = parse_arguments(sys.argv[1:])
    console = Console(width=110)
    machine = in_fresh_process(describe_machine)
    num_runs = options.runs or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        texts = read_texts(options.corpus, ROWS[0])
        pairs = job_and_loop(work, options.model, texts[: QUICK_LOOP_TEXTS if options.quick else LOOP_TEXTS], num_runs)
        for pair in pairs:
            console.print(
                f"job {pair['job']:,.1f} texts/s, loop {pair['loop']:,.1f}, start-up {pair['startup_s']:.1f} s"
            )
        tiny = write_tiny_encoder(work / "tiny")
        growth = []
        for rows in QUICK_ROWS if options.quick else ROWS:
            growth.append(in_fresh_process(measure_growth, work, tiny, texts, rows))
            console.print(f"{rows:,} rows: {growth[-1].seconds:.1f} s, {growth[-1].peak_rss / 2**20:,.0f} MiB")
    ratios = {
        "job_vs_loop": median(pair["job"] for pair in pairs) / median(pair["loop"] for pair in pairs),
        "rss_5m_vs_200k": growth[-1].peak_rss / growth[0].peak_rss,
    }
    result = {
        "machine": machine,
        "runs": {"job_and_loop": pairs, "growth": [point._asdict() for point in growth]},
        "ratios": ratios,
        "linear_fit": linear_fit(growth),
    }
    console.print(growth_table(growth))
    console.print_json(json.dumps({key: result[key] for key in ("ratios", "linear_fit")}))
    write_result(options.json, result)
    if options.plot:
        plot_growth(growth, options.plot)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("Overhead, memory and linearity of jobs/embed.py.", "few rows and one run")
    parser.add_argument("--model", default=EMBEDDED_TEACHER, help="what the job and the loop encode with")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="where to draw seconds and memory by rows")
    return parser.parse_args(arguments)


def job_and_loop(work: Path, model: str, texts: list[str], num_runs: int) -> list[dict[str, float]]:
    """Rates of the job and of the bare loop, in turn, and the seconds the job needed before its first part."""
    corpus = work / "texts.parquet"
    pq.write_table(pa.table({"text": texts}), corpus, row_group_size=PART_ROWS)
    directory = str(pretrained_directory(model))
    pairs = []
    for number in range(num_runs):
        rates = in_fresh_process(run_job, str(corpus), str(work / f"job-{number}"), directory)
        pairs.append(rates | {"loop": run_loop(directory, texts)})
    return pairs


def run_job(corpus: str, output: str, model: str) -> dict[str, float]:
    """One run of the job on a cluster of its own."""
    start = time.perf_counter()
    connect()
    result = embed(EmbedConfig(input=corpus, output=output, model=model, rows_per_part=PART_ROWS))
    seconds = time.perf_counter() - start
    ray.shutdown()
    rows = int(result.manifest.measurements["rows"])
    return {"job": result.texts_per_s, "startup_s": seconds - rows / result.texts_per_s}


def run_loop(model: str, texts: list[str]) -> float:
    """Texts/s of the encoder in as many processes of as many threads as the job has, with nothing around them."""
    num_parts = -(-len(texts) // PART_ROWS)
    num_processes = min(encoder_processes(), num_parts) if not torch.cuda.is_available() else 1
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        shares = [texts[number::num_processes] for number in range(num_processes)]
        return sum(pool.map(encode_share, [model] * num_processes, shares, [num_processes] * num_processes))


def encode_share(model: str, texts: list[str], num_processes: int) -> float:
    """Texts/s of one of so many processes."""
    if not torch.cuda.is_available():
        torch.set_num_threads((os.cpu_count() or 1) // num_processes)
    encoder = Encoder.load(Path(model))
    encoder.encode(texts[:64])
    start = time.perf_counter()
    for first in range(0, len(texts), PART_ROWS):
        encoder.encode(texts[first : first + PART_ROWS])
    return len(texts) / (time.perf_counter() - start)


def write_tiny_encoder(directory: Path) -> Path:
    """A model of one layer, 32 wide, with the embedded teacher's tokenizer."""
    directory.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(pretrained_directory(EMBEDDED_TEACHER), local_files_only=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    write_body(directory, BertModel(config, add_pooling_layer=False))
    write_tokenizer(directory, tokenizer.backend_tokenizer, 128)
    write_head(directory, 32, "mean_tokens", {})
    return directory


def write_rows(path: Path, texts: Sequence[str], num_rows: int) -> None:
    """`num_rows` distinct texts: real ones, told apart by a number where they come again."""
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        for first in range(0, num_rows, 100_000):
            rows = range(first, min(first + 100_000, num_rows))
            varied = [texts[row % len(texts)] + (f" {row // len(texts)}" if row >= len(texts) else "") for row in rows]
            writer.write_table(pa.table({"text": varied}), row_group_size=32768)


def measure_growth(work: Path, model: Path, texts: list[str], num_rows: int) -> Growth:
    """Embed `num_rows` rows and watch the memory of the job's processes."""
    corpus = work / f"rows-{num_rows}.parquet"
    write_rows(corpus, texts, num_rows)
    connect()
    with watched_memory(job_rss) as peak:
        result = embed(EmbedConfig(input=str(corpus), output=str(work / f"vectors-{num_rows}"), model=str(model)))
    ray.shutdown()
    return Growth(num_rows, num_rows / result.texts_per_s, peak[0])


def job_rss() -> int:
    """Bytes of this process and of the encoders' processes now."""
    total = psutil.Process().memory_info().rss
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or [])
        if "MapWorker" in title or "EmbedPart" in title:
            total += process.info["memory_info"].rss
    return total


def linear_fit(growth: Sequence[Growth]) -> dict[str, float]:
    """Seconds = start + rows / rate, by least squares, and how much of the variance that explains."""
    rows, seconds = np.array([point.rows for point in growth]), np.array([point.seconds for point in growth])
    slope, start = np.polyfit(rows, seconds, 1)
    residual = seconds - (start + slope * rows)
    r2 = 1 - float((residual**2).sum() / ((seconds - seconds.mean()) ** 2).sum())
    return {"rows_per_s": 1 / float(slope), "start_s": float(start), "r2": r2}


def growth_table(growth: Sequence[Growth]) -> Table:
    """What to print."""
    table = Table(title="The pipeline alone")
    for column in ("rows", "seconds", "rows/s", "peak RSS, MiB"):
        table.add_column(column, justify="right")
    for point in growth:
        cells: list[Any] = [point.rows, point.seconds, point.rows / point.seconds, point.peak_rss / 2**20]
        table.add_row(*(f"{cell:,.0f}" for cell in cells))
    return table


def plot_growth(growth: Sequence[Growth], path: Path) -> None:
    """Seconds, and peak memory, by rows."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    rows = [point.rows / 1e6 for point in growth]
    panels = {
        "seconds": [point.seconds for point in growth],
        "peak resident memory, GiB": [point.peak_rss / 2**30 for point in growth],
    }
    for axes, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.plot(rows, values, marker="o")
        axes.set(title=title, xlabel="million rows", xlim=(0, None), ylim=(0, 1.15 * max(values)))
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
