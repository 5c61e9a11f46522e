"""Building a corpus: every row accounted for, time and memory by rows, against polars and against Ray Data's groupby.

    python -m benchmarks.corpus [--quick] [--json OUT] [--corpus FILE.parquet] [--sizes 1000000,5000000,20000000]

The rows are real texts, each made one of its own by a number, with duplicates, evaluation texts and texts that are too
short at known places: what comes out is known, and counted to the last row. polars does the same normalisation,
filters, deduplication and decontamination in one process; Ray Data groups by the text alone.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, read_rows, write_result
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from embedlib.quality import BOILERPLATE, REASONS, QualityConfig, normalise, reasons
from jobs.corpus import SPLITS, BuildConfig, build_corpus
from jobs.runtime import connect

SIZES, QUICK_SIZES = (1_000_000, 5_000_000, 20_000_000), (20_000, 40_000, 80_000)
PEER_ROWS, QUICK_PEER_ROWS = 2_000_000, 40_000
GROUPBY_ROWS, QUICK_GROUPBY_ROWS = 200_000, 10_000
REAL_TEXTS, EVALUATION_TEXTS = 300_000, 5_000
FILE_ROWS, GROUP_ROWS = 1_000_000, 65_536
# Of 1000 rows so many are copies of earlier ones, evaluation texts in capitals, or too short.
COPIES, CONTAMINATED, SHORT = 100, 5, 3
LATIN = {"de", "en", "es", "fr", "id", "it", "pl", "pt", "vi"}
NATIVE = {
    "ar": r"\p{Arabic}",
    "bn": r"\p{Bengali}",
    "hi": r"\p{Devanagari}",
    "ja": r"[\p{Han}\p{Hiragana}\p{Katakana}]",
    "ko": r"[\p{Hangul}\p{Han}]",
    "ru": r"\p{Cyrillic}",
    "th": r"\p{Thai}",
    "zh": r"\p{Han}",
}


class Texts(NamedTuple):
    """What rows are made of."""

    texts: list[str]
    langs: list[str]
    evaluation: list[str]
    evaluation_langs: list[str]


class Growth(NamedTuple):
    """One size of corpus."""

    rows: int
    seconds: float
    """From reading the input to the manifest, processes up and modules loaded."""
    peak_rss: int
    """Bytes of the driver and of all workers together."""
    kept: int


def main() -> None:
    """Measure all, print and write."""
    options = parse_arguments(sys.argv[1:])
    console = Console(width=110)
    machine = in_fresh_process(describe_machine)
    num_runs = options.runs or (1 if options.quick else 3)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-", dir=options.work) as folder:
        work = Path(folder)
        texts = real_texts(options.corpus, REAL_TEXTS if not options.quick else 20_000)
        write_evaluation(work, texts)
        growth = []
        for rows in options.sizes or (QUICK_SIZES if options.quick else SIZES):
            source = write_rows(work / f"rows-{rows}", texts, rows)
            growth.append(in_fresh_process(measure_growth, work, source, rows, options.workers))
            console.print(f"{rows:,} rows: {growth[-1].seconds:.1f} s, {growth[-1].peak_rss / 2**30:.2f} GiB")
            shutil.rmtree(source)
        peer_rows = options.peer_rows or (QUICK_PEER_ROWS if options.quick else PEER_ROWS)
        group_rows = options.groupby_rows or (QUICK_GROUPBY_ROWS if options.quick else GROUPBY_ROWS)
        peers = compare(
            work, write_rows(work / "peers", texts, peer_rows), peer_rows, num_runs, "polars", options.workers
        )
        console.print_json(json.dumps(peers))
        groups = compare(
            work, write_rows(work / "groups", texts, group_rows), group_rows, 1, "groupby", options.workers
        )
        console.print_json(json.dumps(groups))
    fit = linear_fit(growth)
    result = {
        "machine": machine,
        "runs": {"growth": [point._asdict() for point in growth], "polars": peers, "groupby": groups},
        "ratios": {
            "dedup_vs_polars": median(run["job_s"] for run in peers) / median(run["peer_s"] for run in peers),
            "rss_vs_polars": max(run["job_rss"] for run in peers) / max(run["peer_rss"] for run in peers),
            "dedup_vs_groupby": groups[0]["peer_s"] / groups[0]["job_s"],
        },
        "linear_fit": fit,
        "linear_r2": fit["r2"],
        "peak_rss_gib": max(point.peak_rss for point in growth) / 2**30,
    }
    console.print(growth_table(growth))
    console.print_json(json.dumps({key: result[key] for key in ("ratios", "linear_fit", "peak_rss_gib")}))
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("jobs/corpus.py: correctness, time and memory by rows, peers.", "few rows and one run")
    parser.add_argument("--sizes", type=sizes, metavar="N,N,N", help="rows of the corpora; none: 1, 5 and 20 million")
    parser.add_argument("--peer-rows", type=int, metavar="N", help="rows that polars does, too; none: 2 million")
    parser.add_argument("--groupby-rows", type=int, metavar="N", help="rows that groupby does, too; none: 200,000")
    parser.add_argument("--workers", type=int, help="processes of the job; none: one a core")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the rows are written, about 300 bytes each")
    return parser.parse_args(arguments)


def sizes(value: str) -> tuple[int, ...]:
    """`1000,2000` as numbers."""
    return tuple(int(part) for part in value.split(","))


def real_texts(corpus: Path | None, num_texts: int) -> Texts:
    """Distinct real texts that are good sentences, and some apart that stand for an evaluation set."""
    rows = read_rows(corpus, 3 * num_texts)
    # With room for a number of eight digits.
    config = QualityConfig(min_characters=40, max_characters=1000, max_signs=0.1)
    clean = normalise(pa.array([row["text"] for row in rows], pa.large_string()))
    langs = pa.array([row["lang"] for row in rows])
    fine = reasons(clean, langs, config) == REASONS.index("")
    lang_of = {
        text: lang
        for text, lang, is_fine in zip(clean.to_pylist(), langs.to_pylist(), fine.tolist(), strict=True)
        if is_fine and lang in LATIN | NATIVE.keys()
    }
    texts = list(lang_of)[:num_texts]
    # Those that stay the same text in capitals.
    steady = [text for text in texts if text.upper().lower() == text.lower()]
    evaluation = set(steady[: min(EVALUATION_TEXTS, len(texts) // 4)])
    texts, apart = [text for text in texts if text not in evaluation], sorted(evaluation)
    return Texts(texts, [lang_of[text] for text in texts], apart, [lang_of[text] for text in apart])


def write_evaluation(work: Path, texts: Texts) -> None:
    """The evaluation set."""
    pq.write_table(pa.table({"text": texts.evaluation}), work / "evaluation.parquet")


def place_of(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """Which rows are copies, evaluation texts, too short; and the row that each copies, itself if it copies none."""
    turn = rows * 7 % 1000
    is_copy = (turn < COPIES) & (rows >= 1000)
    is_evaluation = (turn >= COPIES) & (turn < COPIES + CONTAMINATED)
    is_short = (turn >= COPIES + CONTAMINATED) & (turn < COPIES + CONTAMINATED + SHORT)
    # Row 500 of every 1000 is none of the three.
    origin = np.where(is_copy, (rows - 1000) // (1 + rows % 3) // 1000 * 1000 + 500, rows)
    return is_copy, is_evaluation, is_short, origin


def write_rows(directory: Path, texts: Texts, num_rows: int) -> Path:
    """`num_rows` rows as Parquet files."""
    directory.mkdir()
    some, langs = pa.array(texts.texts, pa.large_string()), pa.array(texts.langs)
    evaluation = pa.array([text.upper() + " !" for text in texts.evaluation], pa.large_string())
    evaluation_langs = pa.array(texts.evaluation_langs)
    for first in range(0, num_rows, FILE_ROWS):
        rows = np.arange(first, min(first + FILE_ROWS, num_rows))
        _, is_evaluation, is_short, origin = place_of(rows)
        chosen = pa.array(origin % len(texts.texts))
        numbers = pa.array(origin).cast(pa.large_string())
        space = pa.scalar(" ", pa.large_string())
        numbered = pc.binary_join_element_wise(some.take(chosen), numbers, space)
        asked = pa.array(rows % len(texts.evaluation))
        contaminated = evaluation.take(asked)
        column = pc.if_else(pa.array(is_evaluation), contaminated, numbered)
        column = pc.if_else(pa.array(is_short), pa.scalar("ok", pa.large_string()), column)
        spoken = pc.if_else(pa.array(is_evaluation), evaluation_langs.take(asked), langs.take(chosen))
        table = pa.table({"text": column, "lang": spoken})
        pq.write_table(table, directory / f"{first // FILE_ROWS:04}.parquet", row_group_size=GROUP_ROWS)
    return directory


def build_config(work: Path, source: Path, output: Path, workers: int | None) -> BuildConfig:
    """The job's configuration."""
    values = {
        "output": str(output),
        "sources": [{"name": "rows", "path": str(source)}],
        "evaluation": [str(work / "evaluation.parquet")],
        "repair": False,  # which polars cannot
        "num_workers": workers,
    }
    return BuildConfig.model_validate(values)


def measure_growth(work: Path, source: Path, rows: int, workers: int | None) -> Growth:
    """Build a corpus, watch its memory and count its rows."""
    seconds, peak, kept = run_job(work, source, rows, workers)
    return Growth(rows, seconds, peak, kept)


def run_job(work: Path, source: Path, rows: int, workers: int | None) -> tuple[float, int, int]:
    """Seconds, peak memory and kept rows of the job on a cluster of its own, all of them counted."""
    connect()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        warm_up(work, Path(folder), workers)
        with watched_memory(job_rss) as peak:
            start = time.perf_counter()
            manifest = build_corpus(build_config(work, source, Path(folder) / "out", workers))
            seconds = time.perf_counter() - start
        require_exact(Path(folder) / "out", manifest.measurements, rows)
    ray.shutdown()
    return seconds, peak[0], manifest.measurements["kept"]


def warm_up(work: Path, folder: Path, workers: int | None) -> None:
    """A small corpus of many parts, so that all processes are up."""
    table = pa.table({"text": [f"A sentence to begin with, number {row}." for row in range(640)], "lang": ["en"] * 640})
    pq.write_table(table, folder / "few.parquet", row_group_size=10)
    config = build_config(work, folder / "few.parquet", folder / "few", workers)
    build_corpus(config.model_copy(update={"rows_per_part": 10, "rows_per_partition": 40}))


def require_exact(output: Path, measured: dict[str, Any], num_rows: int) -> None:
    """Every injected row is gone, every other row is there, once."""
    rows = np.arange(num_rows)
    is_copy, is_evaluation, is_short, _ = place_of(rows)
    expected = {
        "duplicate": int(is_copy.sum()),
        "in evaluation data": int(is_evaluation.sum()),
        "too short": int(is_short.sum()),
    }
    assert measured["reasons"] == {reason: count for reason, count in expected.items() if count}, measured["reasons"]
    assert measured["quarantined"] == {}
    seen = np.zeros(num_rows, np.int8)
    for split in SPLITS:
        for path in (output / split).glob("*.parquet"):
            for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
                numbers = pc.struct_field(pc.extract_regex(batch["text"], r" (?P<row>\d+)$"), "row")
                np.add.at(seen, np.asarray(numbers.cast(pa.int64())), 1)
    assert np.array_equal(seen, ~(is_copy | is_evaluation | is_short)), "rows lost, or there twice"


def job_rss() -> int:
    """Bytes of this process and of the Ray workers below it now."""
    me = psutil.Process()
    total = me.memory_info().rss
    for process in me.children(recursive=True):
        try:
            if "ray::" in " ".join(process.cmdline()):
                total += process.memory_info().rss - process.memory_info().shared
        except psutil.NoSuchProcess:
            continue
    return int(total)


def compare(
    work: Path, source: Path, rows: int, num_runs: int, peer: str, workers: int | None
) -> list[dict[str, float]]:
    """The job and a peer on the same rows, in turn."""
    runs = []
    for _ in range(num_runs):
        job_s, job_peak, kept = in_fresh_process(run_job, work, source, rows, workers)
        peer_s, peer_peak, peer_kept = in_fresh_process(run_polars if peer == "polars" else run_groupby, work, source)
        # polars' expressions come near to the rules, but are not the same: runs of letters, placeholders.
        assert peer == "groupby" or abs(peer_kept - kept) <= 1e-3 * kept, f"{peer} keeps {peer_kept}, the job {kept}"
        runs.append({"job_s": job_s, "peer_s": peer_s, "job_rss": job_peak, "peer_rss": peer_peak})
    return runs


def run_polars(work: Path, source: Path) -> tuple[float, int, int]:
    """Seconds, peak memory and rows of one process of polars."""
    with watched_memory(lambda: int(psutil.Process().memory_info().rss)) as peak:
        start = time.perf_counter()
        evaluation = pl.read_parquet(work / "evaluation.parquet").select(loose(pl.col("text")).alias("loose")).unique()
        rows = pl.read_parquet(source / "*.parquet").with_columns(
            pl.col("text").str.normalize("NFC").str.replace_all(r"[\x00-\x1F\x7F-\x9F\s]+", " ").str.strip_chars()
        )
        rows = rows.filter(polars_filters()).unique("text", keep="first", maintain_order=True)
        rows = rows.with_columns(loose(pl.col("text")).alias("loose")).join(evaluation, "loose", "anti").drop("loose")
        rows.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(work / "polars.parquet")
        seconds = time.perf_counter() - start
    return seconds, peak[0], len(rows)


def loose(text: pl.Expr) -> pl.Expr:
    """What tells a text without case, punctuation and spaces."""
    return text.str.to_lowercase().str.replace_all(r"[^\pL\pM\pN]+", "")


def polars_filters() -> pl.Expr:
    """The rules of embedlib.quality as expressions of polars."""
    text, lang = pl.col("text"), pl.col("lang")
    config = QualityConfig()
    length = text.str.len_chars()
    letters = text.str.count_matches(r"[\pL\pM]")
    dense = lang.is_in(["ko", "ja", "zh", "th"])
    least = pl.when(dense).then(config.min_characters / 2).otherwise(config.min_characters)
    words = text.str.split(" ")
    runs = "|".join(f"{letter}{{{config.max_repeats + 1},}}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789")
    native = text.str.count_matches(r"\p{Latin}")
    for name, script in NATIVE.items():
        native = pl.when(lang == name).then(text.str.count_matches(script)).otherwise(native)
    weight = lang.replace_strict({"ko": 2, "ja": 3, "zh": 3}, default=1)
    return (
        (length >= least)
        & (length <= config.max_characters)
        & (letters > 0)
        & (text.str.count_matches(r"[\pN\pP\pS]") <= config.max_signs * length)
        & ~text.str.contains(runs)
        & ((words.list.len() < 10) | (words.list.n_unique() >= config.min_distinct_words * words.list.len()))
        & (text.str.count_matches(r"%[sd]|\{\w*\}") <= config.max_placeholders)
        & ~text.str.contains(f"(?i:{BOILERPLATE})")
        & (native * weight >= letters.cast(pl.Int64) - native)
    )


def run_groupby(work: Path, source: Path) -> tuple[float, int, int]:
    """Seconds, peak memory and groups of Ray Data's groupby, which does the deduplication alone."""
    connect()
    ray.data.range(1000).groupby("id").count().materialize()  # processes up
    with watched_memory(job_rss) as peak:
        start = time.perf_counter()
        grouped = ray.data.read_parquet(str(source)).groupby("text")
        # No function of this module: Ray would look for it in its workers' own main module.
        groups = grouped.map_groups(lambda group: group.slice(0, 1), batch_format="pyarrow")
        groups.write_parquet(str(work / "groupby"))
        seconds = time.perf_counter() - start
    ray.shutdown()
    found = sum(pq.read_metadata(path).num_rows for path in (work / "groupby").glob("*.parquet"))
    return seconds, peak[0], found


def linear_fit(growth: Sequence[Growth]) -> dict[str, float]:
    """Seconds = start + rows / rate, by least squares, and how much of the variance that explains."""
    rows, seconds = np.array([point.rows for point in growth]), np.array([point.seconds for point in growth])
    slope, start = np.polyfit(rows, seconds, 1) if len(growth) > 1 else (seconds[0] / rows[0], 0.0)
    residual = seconds - (start + slope * rows)
    spread = float(((seconds - seconds.mean()) ** 2).sum())
    r2 = 1 - float((residual**2).sum()) / spread if spread else 1.0
    return {"rows_per_s": 1 / float(slope), "start_s": float(start), "r2": r2}


def growth_table(growth: Sequence[Growth]) -> Table:
    """What to print."""
    table = Table(title="Corpora")
    for column in ("rows", "kept", "seconds", "rows/s", "peak RSS, GiB"):
        table.add_column(column, justify="right")
    for point in growth:
        cells = [f"{point.rows:,}", f"{point.kept:,}", f"{point.seconds:.1f}", f"{point.rows / point.seconds:,.0f}"]
        table.add_row(*cells, f"{point.peak_rss / 2**30:.2f}")
    return table


if __name__ == "__main__":
    main()
