"""What ingredients of contrastive training are worth: stages with and without each, from one model, on several seeds.

    python -m benchmarks.ablations --model artifacts/demo/student --root SETS \
        --questions query_passage.parquet --pairs pairs.parquet

Stages are trained on short questions of four languages and scored, in nDCG@10, on others of the same kind and on XQuAD;
merges also on FLORES. A seed decides the order of the samples, which negatives are drawn and which pairs are wrong.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.command import benchmark_parser, short_rows, table_of, write_result
from benchmarks.evaluate import mean_scores
from benchmarks.machine import describe_machine
from embedlib.negatives import NegativeRule
from embedlib.pairs import PairColumns
from embedlib.pretrained import EMBEDDED_TEACHER
from jobs.evaluate import EvaluateConfig
from jobs.merge import MergeConfig, merge
from jobs.mine import MineConfig, mine
from jobs.runtime import connect
from jobs.train import TrainConfig, train

LANGS = ("en", "de", "es", "ru")
FLORES = ("deu_Latn", "spa_Latn", "rus_Cyrl")
MAX_CHARACTERS = 200
NEGATIVES = 2
POOL = 6
"""Passages to mine, and to draw by chance, for each question that is trained on."""
WRONG = 0.4
"""Share of the pairs that are wrong, where noise is the subject."""
DIMENSIONS = (256, 128, 64)
# What is told besides the tables: how much better than the second the first is on the questions kept apart.
GAINS = {
    "mined_vs_random": ("negatives", "and mined ones", "and random ones"),
    "guide_mined_vs_random": ("negatives", "and those the guide mined", "and random ones"),
    "guided_vs_plain": ("noise", "wrong pairs, guided", "wrong pairs"),
    "guided_vs_plain_of_right": ("noise", "right pairs, guided", "right pairs"),
    "self_positioning_vs_equal": ("merge", "Self Positioning", "equal weights"),
    "prefixes_vs_whole_at_64": ("prefixes", "prefixes cut to 64", "whole cut to 64"),
}
# What a stage of jobs/train.py is given here, but for what an ingredient changes.
TRAINING: dict[str, Any] = {"batch_size": 64, "optimizer": {"learning_rate": 1.0e-4}}


class Questions(NamedTuple):
    """`query`, `passage` and `lang`, no text twice."""

    trained: pa.Table
    probe: pa.Table
    """For the weights of merges."""
    scored: pa.Table
    passages: pa.Table
    """Further passages, which answer none of them, searched as well."""
    pool: pa.Table
    """Other such passages, for negatives."""


class Setting(NamedTuple):
    """What all stages have in common."""

    work: Path
    model: str
    guide: str
    questions: Questions
    mined: dict[str, pa.Table]
    """For the table of negatives: the trained questions with what `model` took for answers, and with what `guide`
    did."""


Score = dict[str, float]
Models = dict[str, str]


def parse() -> Namespace:
    """The command line."""
    parser: ArgumentParser = benchmark_parser(__doc__ or "", "few questions, one seed")
    parser.add_argument("--model", required=True, help="what every stage begins with: hub id or directory")
    parser.add_argument("--guide", default=EMBEDDED_TEACHER, help="what masks answers among negatives")
    parser.add_argument("--questions", type=Path, required=True, help="Parquet with query, passage, lang")
    parser.add_argument("--pairs", type=Path, required=True, help="Parquet with en, xx, lang")
    parser.add_argument("--root", type=Path, required=True, help="evaluation sets: xquad_retrieval, sib200_flores")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="only these tables")
    parser.add_argument("--seeds", type=int, help="none: 3, or 1 with --quick")
    return parser.parse_args()


def read_questions(path: Path, per_language: int) -> Questions:
    """Short questions of four languages in an order of chance, as many of each."""
    table = pq.read_table(path, columns=["query", "passage", "lang"])
    frame = short_rows(table, "passage", MAX_CHARACTERS, LANGS)
    groups = frame.drop_duplicates("query").drop_duplicates("passage").groupby("lang")
    quarter = per_language // 4
    edges = np.cumsum([0, per_language, quarter, quarter, per_language, POOL * per_language])
    if (fewest := groups.size().min()) < edges[-1]:
        raise SystemExit(f"{path}: {fewest} short questions in one of {LANGS}; expected {edges[-1]} in each")
    parts = [groups.nth(list(range(first, last))).reset_index(drop=True) for first, last in pairwise(edges.tolist())]
    return Questions(*(pa.Table.from_pandas(part, preserve_index=False) for part in parts))


def write_pairs(source: Path, target: Path, per_language: int) -> None:
    """Short translations into three of the languages, to train on; as many, a quarter, for the weights of merges."""
    table = pq.read_table(source, columns=["en", "xx", "lang"])
    groups = short_rows(table, "en", MAX_CHARACTERS // 2, LANGS[1:]).groupby("lang")
    for name, rows in (("pairs", range(per_language)), ("probe-pairs", range(per_language, per_language * 5 // 4))):
        part = groups.nth(list(rows)).reset_index(drop=True)
        pq.write_table(pa.Table.from_pandas(part, preserve_index=False), target / f"{name}.parquet")


def write_set(root: Path, questions: Questions) -> dict[str, Any]:
    """The questions kept apart as an evaluation set, among all passages of their language; its task."""
    root.mkdir(parents=True)
    scored, passages = questions.scored, questions.passages
    numbers = [str(number) for number in range(len(scored))]
    ids = pa.array([*numbers, *(f"other-{number}" for number in range(len(passages)))])
    every = pa.concat_tables([scored, passages])
    corpus = {"_id": ids, "text": every["passage"], "lang": every["lang"]}
    pq.write_table(pa.table(corpus), root / "corpus.parquet")
    pq.write_table(
        pa.table({"_id": numbers, "text": scored["query"], "lang": scored["lang"]}), root / "queries.parquet"
    )
    qrels = {"query-id": numbers, "corpus-id": numbers, "score": [1] * len(numbers), "lang": scored["lang"]}
    pq.write_table(pa.table(qrels), root / "qrels.parquet")
    return {"type": "retrieval", "path": str(root)}


def trained(
    setting: Setting,
    name: str,
    rows: pa.Table,
    seed: int,
    objective: Mapping[str, Any] | None = None,
    guide: str | None = None,
    document_prompt: str = "document",
) -> str:
    """A stage of jobs/train.py on `rows`, made once for all tables that want it: the directory of its model."""
    data = setting.work / f"{name}.parquet"
    pq.write_table(rows, data)
    dataset = {"path": str(data), "positive": "passage", "lang": "lang", "document_prompt": document_prompt}
    if "negatives" in rows.column_names:
        dataset["negatives"] = "negatives"
    config = {
        "output": setting.work / name,
        "model": setting.model,
        "guide": guide,
        "datasets": [dataset],
        "training": TRAINING | {"seed": seed, "objective": objective or {}},
    }
    return str(train(TrainConfig.model_validate(config)))


def with_random(rows: pa.Table, pool: pa.Table, seed: int) -> pa.Table:
    """The questions with passages of their own language, drawn by chance, as negatives."""
    rng = np.random.default_rng(seed)
    langs = np.array(pool["lang"].to_pylist())
    texts = np.array(pool["passage"].to_pylist(), object)
    drawn = [rng.choice(texts[langs == lang], NEGATIVES, replace=False).tolist() for lang in rows["lang"].to_pylist()]
    return rows.append_column("negatives", pa.array(drawn))


def with_mined(rows: pa.Table, pool: pa.Table, model: str, home: Path) -> pa.Table:
    """The questions with passages of their own language that `model` takes for answers, by NV-Retriever's rule."""
    home.mkdir()
    pq.write_table(rows, home / "pairs.parquet")
    others = pool.select(["passage", "lang"]).rename_columns(["text", "lang"])
    pq.write_table(others, home / "corpus.parquet")
    config = MineConfig(
        pairs=str(home / "pairs.parquet"),
        corpus=str(home / "corpus.parquet"),
        output=str(home / "negatives"),
        model=model,
        columns=PairColumns(positive="passage", lang="lang"),
        rule=NegativeRule(max_negatives=NEGATIVES, language="same", short="random"),
    )
    mine(config)
    found = pa.concat_tables([pq.read_table(file) for file in sorted((home / "negatives").glob("part-*.parquet"))])
    negatives = dict(zip(found["query"].to_pylist(), found["negatives"].to_pylist(), strict=True))
    return rows.append_column("negatives", pa.array([negatives[query] for query in rows["query"].to_pylist()]))


def with_noise(rows: pa.Table, seed: int) -> pa.Table:
    """The questions, a share of which has another's passage."""
    rng = np.random.default_rng(seed)
    passages: npt.NDArray[Any] = np.array(rows["passage"].to_pylist(), object)
    wrong = rng.choice(len(passages), round(WRONG * len(passages)), replace=False)
    passages[wrong] = passages[np.roll(wrong, 1)]
    return rows.set_column(rows.column_names.index("passage"), "passage", pa.array(passages))


def own_negatives(setting: Setting, seed: int) -> Models:
    """Negatives of a question besides the batch's: none, drawn by chance, mined by the model itself or by the guide."""
    rows = setting.questions.trained
    random = with_random(rows, setting.questions.pool, seed)
    return {
        "in-batch negatives": trained(setting, f"in-batch-{seed}", rows, seed),
        "and random ones": trained(setting, f"random-{seed}", random, seed),
        "and mined ones": trained(setting, f"mined-{seed}", setting.mined["model"], seed),
        "and those the guide mined": trained(setting, f"guide-mined-{seed}", setting.mined["guide"], seed),
    }


def prefixes(setting: Setting, seed: int) -> Models:
    """Losses of prefixes, or of the whole vector alone, whose vectors are cut."""
    rows, dimensions = setting.questions.trained, list(DIMENSIONS)
    directories = {
        "whole": trained(setting, f"in-batch-{seed}", rows, seed),
        "prefixes": trained(setting, f"prefixes-{seed}", rows, seed, objective={"dimensions": dimensions}),
    }
    cuts = {"": "", **{f" cut to {dim}": f"@{dim}" for dim in dimensions}}
    return {name + cut: path + at for cut, at in cuts.items() for name, path in directories.items()}


def noise(setting: Setting, seed: int) -> Models:
    """Pairs all of which are right, or a part of which is wrong, without and with a guide."""
    right, wrong = setting.questions.trained, with_noise(setting.questions.trained, seed)

    def guided(name: str, rows: pa.Table) -> str:
        return trained(setting, f"{name}-{seed}", rows, seed, objective={"guide": {}}, guide=setting.guide)

    return {
        "right pairs": trained(setting, f"in-batch-{seed}", right, seed),
        "right pairs, guided": guided("right-guided", right),
        "wrong pairs": trained(setting, f"noise-{seed}", wrong, seed),
        "wrong pairs, guided": guided("noise-guided", wrong),
    }


def merges(setting: Setting, seed: int) -> Models:
    """A model of questions and one of translations, and their merges."""
    pairs = pq.read_table(setting.work / "pairs.parquet").rename_columns(["query", "passage", "lang"])
    parts = {
        "questions": trained(setting, f"in-batch-{seed}", setting.questions.trained, seed),
        "translations": trained(setting, f"translations-{seed}", pairs, seed, document_prompt="query"),
    }
    asked, translated = setting.work / "probe-questions.parquet", setting.work / "probe-pairs.parquet"
    pq.write_table(setting.questions.probe, asked)
    probe = [
        {"path": str(asked), "positive": "passage"},
        {"path": str(translated), "query": "en", "positive": "xx", "document_prompt": "query"},
    ]
    methods: dict[str, dict[str, Any]] = {
        "equal weights": {"method": "linear"},
        "Self Positioning": {"method": "self_positioning", "probe": {"data": probe, "seed": seed}},
    }
    merged = {}
    for name, values in methods.items():
        output = setting.work / f"{values['method']}-{seed}"
        common = {"output": output, "base": setting.model, "models": list(parts.values())}
        merged[name] = str(merge(MergeConfig.model_validate(common | values)))
    return parts | merged


TABLES: dict[str, Callable[[Setting, int], Models]] = {
    "negatives": own_negatives,
    "prefixes": prefixes,
    "noise": noise,
    "merge": merges,
}


def scores_of(
    models: Models, root: Path, tasks: Mapping[str, Any], work: Path, known: dict[tuple[str, str], float]
) -> dict[str, Score]:
    """Mean score over its languages, x 100, by model and task; `known`, by directory and task, is not scored again."""
    new = {name: path for name, path in models.items() if not {(path, task) for task in tasks} <= known.keys()}
    if new:
        config = EvaluateConfig.model_validate({"output": work, "models": new, "root": str(root), "tasks": tasks})
        known |= {(new[model], task): value for (model, task), value in mean_scores(config).items()}
    return {name: {task: known[path, task] for task in tasks} for name, path in models.items()}


def gain(runs: Sequence[dict[str, Score]], better: str, worse: str) -> float:
    """Points of nDCG@10 on the questions kept apart."""
    return float(np.mean([run[better]["Questions"] - run[worse]["Questions"] for run in runs]))


def main() -> None:
    """Train, merge, score, print and write."""
    options = parse()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        questions = read_questions(options.questions, 60 if options.quick else 500)
        write_pairs(options.pairs, work, 60 if options.quick else 500)
        limit = 20 if options.quick else 200
        tasks = {
            "Questions": write_set(work / "set", questions),
            "XQuAD": {"type": "retrieval", "path": "xquad_retrieval", "split": "validation"}
            | {"languages": list(LANGS), "limit": limit},
        }
        bitext = {"type": "bitext", "path": "sib200_flores/flores_parallel.parquet", "pivot": "eng_Latn"}
        with_bitext = tasks | {"FLORES": bitext | {"languages": list(FLORES), "limit": limit}}
        connect()
        miners = {"model": options.model, "guide": options.guide} if "negatives" in options.only else {}
        mined = {
            name: with_mined(questions.trained, questions.pool, model, work / f"mining-{name}")
            for name, model in miners.items()
        }
        setting = Setting(work, options.model, options.guide, questions, mined)
        runs: dict[str, list[dict[str, Score]]] = {}
        known: dict[tuple[str, str], float] = {}
        for title in options.only:
            of_table = with_bitext if title == "merge" else tasks
            for seed in range(options.seeds or (1 if options.quick else 3)):
                models = {"untrained": options.model} | TABLES[title](setting, seed)
                scored = scores_of(models, options.root.absolute(), of_table, work / f"scores-{title}-{seed}", known)
                runs.setdefault(title, []).append(scored)
            by_model = {name: [run[name] for run in runs[title]] for name in runs[title][0]}
            console.print(table_of(f"{title}: {len(runs[title])} seeds", by_model))
    gains = {name: gain(runs[title], better, worse) for name, (title, better, worse) in GAINS.items() if title in runs}
    console.print_json(json.dumps(gains))
    write_result(options.json, {"machine": describe_machine(), "runs": runs, "ratios": gains})


if __name__ == "__main__":
    main()
