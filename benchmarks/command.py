"""What every benchmark takes and gives: its command line, real lines of text, a JSON file of results."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from embedlib.artifact import whole_directory
from embedlib.demo_corpus import build_demo_corpus
from embedlib.wheels import cache_directory

if TYPE_CHECKING:  # every process that measures something imports this module
    import pandas as pd


def benchmark_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `quick` says what --quick leaves out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: shows that it works")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write machine, runs and ratios")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="Parquet with `text`; none: the demo corpus")
    parser.add_argument("--runs", type=int, help="runs of every contestant; none: 5, or 1 with --quick")
    return parser


def read_rows(corpus: Path | None, num_rows: int) -> list[dict[str, str]]:
    """At most `num_rows` texts with their `lang` (none: `und`) in an order of chance, the same on every machine."""
    path = corpus or demo_lines()
    columns = [name for name in ("text", "lang") if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=columns)
    order = np.random.default_rng(0).permutation(len(table))[:num_rows]
    rows = (row for row in table.take(order).to_pylist() if row["text"] and row["text"].strip())
    return [row | {"lang": row.get("lang") or "und"} for row in rows]


def read_texts(corpus: Path | None, num_texts: int) -> list[str]:
    """At most `num_texts` distinct lines of real text, the same on every machine."""
    return list(dict.fromkeys(row["text"] for row in read_rows(corpus, 2 * num_texts)))[:num_texts]


def short_rows(table: pa.Table, text: str, max_characters: int, langs: Sequence[str]) -> "pd.DataFrame":
    """The rows whose `lang` is one of these and whose `text` is short, in an order of chance, the same everywhere."""
    short = pc.less_equal(pc.utf8_length(table[text]), max_characters)
    table = table.filter(pc.and_(short, pc.is_in(table["lang"], pa.array(langs, table["lang"].type))))
    return table.take(np.random.default_rng(0).permutation(len(table))).to_pandas()


def demo_lines() -> Path:
    """The demo corpus' lines, built once and kept."""
    home = cache_directory() / "bench-corpus"
    if not home.exists():
        with whole_directory(home) as scratch:
            build_demo_corpus(scratch, cache_directory())
    return home / "train.parquet"


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write machine, runs and ratios where --json asks for it."""
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")


def table_of(title: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """A row for each model: scores by task, means and standard deviations where it has several runs."""
    tasks = list(next(iter(runs.values()))[0])
    table = Table("", *tasks, title=f"{title}, mean ± standard deviation")
    for model, scores in runs.items():
        values = np.array([[of_run[task] for task in tasks] for of_run in scores])
        spread = [f" ± {by:.2f}" for by in values.std(axis=0, ddof=1)] if len(scores) > 1 else [""] * len(tasks)
        table.add_row(model, *(f"{mean:.2f}{by}" for mean, by in zip(values.mean(axis=0), spread, strict=True)))
    return table
