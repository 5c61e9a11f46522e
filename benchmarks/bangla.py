"""The recipe after bangla-embed-e5-small, stage by stage, and its second stage without each ingredient.

    python -m benchmarks.bangla --data TRAIN --root SETS [--model M] [--teacher T] [--quick] [--json OUT]

TRAIN has pairs.parquet (en, xx, lang) and query_passage.parquet (query, passage, lang); SETS the evaluation sets of
jobs/runs/bangla_e5.yaml and kornli_xnli, whose entailments and contradictions are the triplets of the third stage.
Scores x 100: nDCG@10 of retrieval, F1 of bitext, accuracy, Spearman.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, write_result
from benchmarks.evaluate import mean_scores
from benchmarks.machine import describe_machine
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from jobs.cli import read_run
from jobs.evaluate import EvaluateConfig
from jobs.recipe import RecipeConfig, replaced, resolve, resolved_paths
from jobs.recipe import main as run_recipe
from jobs.runtime import connect

RECIPE = Path("jobs/runs/bangla_e5.yaml")
PAIRS, PAIR_CHARACTERS = 6000, 120
QUESTIONS = {"en": 1200, "hi": 200, "bn": 100}
PASSAGE_CHARACTERS = 200
TRIPLETS = 2500
QUICK_SHARE = 0.05
# Queries a language, and languages, where the recipe asks for more than a comparison needs.
LIMITS: dict[str, dict[str, Any]] = {
    "BanglaQARetrieval": {"limit": 1500},
    "XQuADRetrieval": {"limit": 150, "languages": ["en", "de", "hi"]},
}
CUTS = {"contrasted": (128, 64), "no matryoshka": (128, 64)}


def parse() -> Namespace:
    """The command line."""
    parser: ArgumentParser = benchmark_parser(__doc__ or "", "a twentieth of the samples, one small task")
    parser.add_argument("--data", type=Path, required=True, help="pairs.parquet and query_passage.parquet")
    parser.add_argument("--root", type=Path, required=True, help="the evaluation sets")
    parser.add_argument("--model", default=EMBEDDED_TEACHER, help="the base: hub id or directory")
    parser.add_argument("--teacher", default=EMBEDDED_TEACHER, help="what the first stage learns from")
    return parser.parse_args()


def write_texts(data: Path, root: Path, work: Path, share: float) -> dict[str, str]:
    """Pairs, questions and triplets of the three stages, an equal part of each; their paths by the recipe's names."""
    rng = np.random.default_rng(0)

    def some(table: pa.Table, most: int) -> pa.Table:
        return table.take(rng.permutation(len(table))[: max(8, round(share * most))])

    pairs = pq.read_table(data / "pairs.parquet", columns=["en", "xx", "lang"])
    short = pc.less_equal(pc.utf8_length(pairs["en"]), PAIR_CHARACTERS)
    pairs = pairs.filter(pc.and_(short, pc.equal(pairs["lang"], "bn")))
    asked = pq.read_table(data / "query_passage.parquet", columns=["query", "passage", "lang"])
    asked = asked.filter(pc.less_equal(pc.utf8_length(asked["passage"]), PASSAGE_CHARACTERS))
    questions = [some(asked.filter(pc.equal(asked["lang"], lang)), most) for lang, most in QUESTIONS.items()]
    tables = {
        "pairs": some(pairs, PAIRS),
        "questions": pa.concat_tables(questions),
        "triplets": some(nli_triplets(pq.read_table(root / "kornli_xnli" / "xnli_ko.parquet")), TRIPLETS),
    }
    paths = {}
    for name, table in tables.items():
        paths[name] = str(work / f"{name}.parquet")
        pq.write_table(table, paths[name])
    return paths


def nli_triplets(table: pa.Table) -> pa.Table:
    """`query`, `positive` and `negatives` from premises that entail one sentence and contradict another."""
    by_premise: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in table.to_pylist():
        by_premise[row["sentence1"]][row["gold_label"]] = row["sentence2"]
    rows = [
        {"query": premise, "positive": of["entailment"], "negatives": [of["contradiction"]]}
        for premise, of in by_premise.items()
        if {"entailment", "contradiction"} <= of.keys()
    ]
    return pa.Table.from_pylist(rows)


def with_variants(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without its evaluation, its second stage without each ingredient, and merges of other kinds."""
    stages = {name: stage for name, stage in recipe["stages"].items() if name != "scored"}
    for name in ("no_anchor", "no_mined", "no_matryoshka"):
        stages[name] = deepcopy(stages["contrasted"])
    stages["no_anchor"]["values"]["training"]["objective"]["anchor"] = 0.0
    stages["no_mined"]["values"]["datasets"][0] = {"path": "{questions}", "positive": "passage"}
    stages["no_matryoshka"]["values"]["training"]["objective"]["dimensions"] = []
    models = stages["merged"]["values"]["models"]
    stages["merged_ends"] = deepcopy(stages["merged"])
    stages["merged_ends"]["values"]["models"] = [models[0], models[-1]]
    stages["merged_equal"] = {"job": "merge", "values": {"method": "linear", "models": models}}
    stages["merged_base"] = {"job": "merge", "values": {"method": "linear", "models": ["{model}", models[-1]]}}
    return {**recipe, "stages": stages}


def main() -> None:
    """Train, merge, score, print and write."""
    options = parse()
    recipe = read_run(RECIPE)
    scored = recipe["stages"]["scored"]["values"]
    tasks = {name: task | LIMITS.get(name, {}) for name, task in scored["tasks"].items()}
    if options.quick:
        tasks = {"XQuADRetrieval": tasks["XQuADRetrieval"] | {"limit": 20, "languages": ["en"]}}
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        paths = write_texts(options.data, options.root, work, QUICK_SHARE if options.quick else 1.0)
        base = str(pretrained_directory(options.model))
        paths |= {"model": base, "teacher": options.teacher, "sets": str(options.root.absolute())}
        values = {"output": str(work / "run"), "paths": recipe["paths"] | paths}
        config = RecipeConfig.model_validate(with_variants(recipe) | values)
        connect()
        run_recipe(config)
        models = {"base": base} | {
            stage.name.replace("_", " "): str(stage.witness.parent)
            for stage in resolve(config)
            if config.stages[stage.name].job != "mine"
        }
        models |= {f"{name} cut to {dim}": f"{models[name]}@{dim}" for name, dims in CUTS.items() for dim in dims}
        tasks = replaced(tasks, resolved_paths(config), "tasks", [])
        evaluated = {"output": work / "scores", "models": models, "tasks": tasks}
        scores = mean_scores(EvaluateConfig.model_validate(evaluated))
    found = {model: {task: scores[model, task] for task in tasks} for model in models}
    table = Table("", *tasks, title="After bangla-embed-e5-small: means over languages, x 100")
    for model, row in found.items():
        table.add_row(model, *(f"{value:.1f}" for value in row.values()))
    Console(width=140).print(table)
    gains = {
        f"{model}_vs_base_{task}": found[model][task] - found["base"][task]
        for model in ("polished", "merged")
        for task in tasks
    }
    Console().print_json(json.dumps(gains))
    write_result(options.json, {"machine": describe_machine(), "runs": found, "ratios": gains})


if __name__ == "__main__":
    main()
