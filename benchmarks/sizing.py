"""Hours and cost of each stage by rows and machine, reckoned from what docs/benchmarks.md has measured.

    python -m benchmarks.sizing [--price L4=0.4 …]

prints the tables of docs/operations.md. All that is put in stands in sizing.yaml beside this file; nothing is measured
here. Hours are one machine's: twice the machines take half of them, at the same cost, less what `make bench-overheads`
says.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field

from embedlib.config import Config
from jobs.shards import num_lists

CONSTANTS = Path(__file__).with_suffix(".yaml")
DIM = 384
TRAINING_VECTORS_A_LIST, ROUNDS = 64, 10


class Measured(Config):
    """A number of docs/benchmarks.md."""

    value: float = Field(gt=0)
    """The number."""
    words: str
    """Where it stands."""


class Machine(Config):
    """A machine, or the share of one that goes with a GPU."""

    like: str
    """An instance of a cloud."""
    cores: int = Field(ge=1)
    """As Linux counts them."""
    tflops: int | None = None
    """Peak of its GPU, dense bfloat16; none: it has no GPU."""
    price: float = Field(ge=0)
    """US dollars an hour."""


class Constants(Config):
    """sizing.yaml."""

    measured: dict[str, Measured]
    """Numbers by name."""
    measured_cores: int
    """Cores of the machine that rates without a GPU were measured on."""
    measured_on: str
    """The machine that rates of a GPU were measured on."""
    machines: dict[str, Machine]
    """By name."""
    rows: list[int]
    """Columns of the tables."""
    samples: int
    """Samples of a distillation, if the corpus has no more rows."""
    queries: int
    """Queries that are mined for, at most."""
    shard_bytes: int
    """Codes and ids that a shard of an index holds in memory."""

    @classmethod
    def read(cls, prices: Sequence[str] = ()) -> Self:
        """The file's, with the prices of `prices` (NAME=DOLLARS); ValueError for a machine that it does not have."""
        values = yaml.safe_load(CONSTANTS.read_text())
        for name, _, price in (text.partition("=") for text in prices):
            if name not in values["machines"]:
                raise ValueError(f"--price {name}: expected one of {', '.join(values['machines'])}")
            values["machines"][name]["price"] = price
        return cls.model_validate(values)

    def rate(self, name: str) -> float:
        """A measured number."""
        return self.measured[name].value

    def cores(self, machine: Machine) -> float:
        """How many times the cores that were measured a machine has."""
        return machine.cores / self.measured_cores

    def gpu(self, machine: Machine) -> float:
        """How many times as fast as the GPU that was measured a machine's counts."""
        measured = self.machines[self.measured_on].tflops
        assert machine.tflops
        assert measured
        return machine.tflops / measured


def corpus_s(given: Constants, machine: Machine, rows: int) -> float:
    """Seconds of building a corpus."""
    return rows / (given.rate("corpus_rows_per_s") * given.cores(machine))


def vectors_s(given: Constants, machine: Machine, rows: int) -> float:
    """Seconds of the teacher's vectors: of the model, or of the pipeline before it where that is slower."""
    if not machine.tflops:
        return rows / (given.rate("teacher_texts_per_s") * given.cores(machine))
    pipeline = given.rate("pipeline_rows_per_s") * given.cores(machine)
    return rows / min(given.rate("gpu_teacher_texts_per_s") * given.gpu(machine), pipeline)


def distil_s(given: Constants, machine: Machine, rows: int) -> float:
    """Seconds of training the student."""
    if machine.tflops:
        rate = given.rate("gpu_distil_samples_per_s") * given.gpu(machine)
    else:
        rate = given.rate("distil_samples_per_s") * given.cores(machine)
    return max(given.samples, rows) / rate


def mine_s(given: Constants, machine: Machine, rows: int) -> float:
    """Seconds of mining: exact on a GPU, else lists are trained, filled, and searched as many as were measured."""
    queries = min(given.queries, rows)
    if machine.tflops:
        return 2 * DIM * rows * queries / (given.rate("gpu_search_tflops") * 1e12 * given.gpu(machine))
    lists, measured = num_lists(rows), int(given.rate("index_rows"))
    training = 2 * DIM * lists * TRAINING_VECTORS_A_LIST * lists * ROUNDS / (given.rate("gflops") * 1e9)
    filling = rows * given.rate("index_us_per_row") / 1e6
    longer = max(1.0, (rows / lists) / (measured / num_lists(measured)))
    return (training + filling + queries * given.rate("index_ms_per_query") / 1e3 * longer) / given.cores(machine)


def embed_s(given: Constants, machine: Machine, rows: int) -> float:
    """Seconds of embedding by the student in int8 on a CPU."""
    return rows / (given.rate("student_texts_per_s") * given.cores(machine))


STAGES: list[tuple[str, Callable[[Constants, Machine, int], float], bool]] = [
    ("corpus", corpus_s, False),
    ("teacher's vectors", vectors_s, True),
    ("distillation", distil_s, True),
    ("mining", mine_s, True),
    ("embedding by the student", embed_s, False),
]
"""Name, seconds, and whether GPUs do it."""


def tables(given: Constants) -> str:
    """Hours and cost, then what has to be stored, as Markdown."""
    head = [f"{rows // 10**6:,} million" for rows in given.rows]
    lines = [f"| stage | machine | {' | '.join(head)} |", f"|---|---|{'--:|' * len(head)}"]
    for stage, seconds, on_gpus in STAGES:
        for name, machine in given.machines.items():
            if on_gpus or not machine.tflops:
                hours = [seconds(given, machine, rows) / 3600 for rows in given.rows]
                cells = [f"{rounded(each)} h · ${rounded(each * machine.price)}" for each in hours]
                lines.append(f"| {stage} | {name} | {' | '.join(cells)} |")
    code, vector = (given.rate(name) for name in ("index_bytes_per_row", "vector_bytes"))
    stored = [
        ("vectors on disk", [f"{rounded(rows * vector / 1e9)} GB" for rows in given.rows]),
        ("index in memory, all shards", [f"{rounded(rows * code / 1e9)} GB" for rows in given.rows]),
        ("shards", [str(math.ceil(rows * code / given.shard_bytes)) for rows in given.rows]),
    ]
    lines += ["", f"| stored | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in stored]
    lines += ["", "| machine | like | cores | peak, TFLOP/s | $ an hour |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {each.like} | {each.cores} | {each.tflops or '–'} | {each.price:.2f} |"
        for name, each in given.machines.items()
    ]
    return "\n".join(lines)


def rounded(value: float) -> str:
    """Two digits that count, and all before the point."""
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f}" if value else "0"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", action="append", default=[], metavar="NAME=DOLLARS", help="an hour of a machine")
    print(tables(Constants.read(parser.parse_args().price)))


if __name__ == "__main__":
    main()
