"""Hard negatives by `jobs/mine.py` against sentence-transformers' miner, and its shards against one index.

    python benchmarks/mine.py [--quick] [--json OUT] [--pairs FILE] [--model MODEL] [--layers N] [--sizes N …]

Both miners get the same model, pairs and rule, each in a process of its own, whose clock begins before it imports
sentence-transformers; what they find is compared negative by negative. Then vectors of the largest corpus are searched
by plain FAISS and by 1, 2, 4 and 8 shards.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, demo_lines, write_result
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from embedlib.negatives import NegativeRule
from embedlib.pairs import PairColumns
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.schemas import vectors_of
from embedlib.storage import Store
from embedlib.topk import Hits, recall
from jobs.metrics import RunReport
from jobs.mine import MineConfig, mine
from jobs.runtime import connect
from jobs.shards import (
    RECALL_AT,
    ROWS_A_LIST,
    SearchConfig,
    ShardPlan,
    gated,
    plan_shards,
    search_shards,
    start_shards,
    vector_files,
)

SIZES, QUICK_SIZES = (50_000, 200_000), (1_000,)
QUERIES = 20_000
RULE = {"max_negatives": 7, "range_max": 50, "relative_margin": 0.05}
# As the peer computes, so that negatives can be compared one by one; and as jobs/mine.py does if it is told nothing.
ARITHMETICS: dict[str, dict[str, Any]] = {
    "float32": {"backend": "torch-float32", "vector_dtype": "float32"},
    "default": {},
}
SHARDS = (1, 2, 4, 8)
SEARCHED_QUERIES, SAMPLED_QUERIES, BLOCK = 8192, 256, 4096
TIE = 1e-5
LABELLED = ("queries", "corpus", "qrels")
MARGINS = {"without a margin": None, "95 % of the positive": 0.05}


class Mined(NamedTuple):
    """What a miner took, and found: queries with their negatives and scores."""

    seconds: float
    peak_bytes: int
    negatives: dict[str, list[tuple[str, float]]]


class Texts(NamedTuple):
    """What both miners get."""

    pairs: Path
    """Parquet with `query` and `passage`, all distinct."""
    corpus: Path
    """Parquet with the `text` of further passages."""


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments(sys.argv[1:])
    console = Console(width=110)
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        model = shallow(pretrained_directory(options.model), work / "model", options.layers)
        miners = []
        for size in sizes:
            texts = write_texts(options.pairs, work / f"texts-{size}", size, options.queries)
            output, with_faiss = work / f"ours-{size}", size == sizes[0]
            miners.append(against_peer(output, model, texts, options.runs or 1, console, with_faiss))
        vectors = work / f"ours-{sizes[-1]}-float32-0" / "work" / "vectors"
        shards = in_fresh_process(against_plain_index, work / "shards", vectors, options.runs or 3)
        console.print_json(json.dumps(shards))
        labels = {
            name: in_fresh_process(false_negatives, work / f"labelled-{number}", model, options.labelled, margin)
            for number, (name, margin) in enumerate(MARGINS.items())
            if options.labelled
        }
    last = miners[-1]
    result = {
        "machine": in_fresh_process(describe_machine),
        "runs": {"miners": miners, "shards": shards, "false_negatives": labels},
        "ratios": {
            "speed_vs_st": last["peer_seconds"] / last["seconds"],
            "default_speed_vs_st": last["peer_seconds"] / last["default_seconds"],
            "memory_vs_st": last["peak_bytes"] / last["peer_peak_bytes"],
            "sharding_overhead": shards["exact"]["shard_seconds"][1] / shards["exact"]["plain_seconds"] - 1,
            "most_sharding_overhead": max(shards["exact"]["shard_seconds"].values()) / shards["exact"]["plain_seconds"]
            - 1,
        },
        "recall_at_10": shards["ivf"]["recall_at_10"][SHARDS[-1]],
    }
    console.print(table_of(miners))
    console.print_json(
        json.dumps({key: result[key] for key in ("ratios", "recall_at_10")} | {"false_negatives": labels})
    )
    write_result(options.json, result)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser("jobs/mine.py against other miners.", "a thousand passages and one run")
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="Parquet with `query` and `passage`, or `en` and `xx`; none: demo texts",
    )
    parser.add_argument("--model", default=EMBEDDED_TEACHER, help="what embeds")
    parser.add_argument(
        "--layers", type=int, default=1, help="only so many of its first layers, to leave time for the search; 1"
    )
    parser.add_argument("--labelled", type=Path, metavar="DIR", help="corpus, queries and qrels, to find answers mined")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of passages; {SIZES}")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"queries at most; {QUERIES}")
    return parser.parse_args(arguments)


def shallow(model: Path, directory: Path, num_layers: int) -> Path:
    """The model with its first layers alone."""
    # Not above: the process of our miner would hold what it has no use for.
    from sentence_transformers import SentenceTransformer

    from embedlib.compress.layers import keep_layers
    from embedlib.torch_model import body_of

    shutil.copytree(model, directory)
    keep_layers(body_of(SentenceTransformer(str(model), device="cpu")), range(num_layers)).save_pretrained(directory)
    return directory


def against_peer(
    output: Path, model: Path, texts: Texts, num_runs: int, console: Console, with_faiss: bool
) -> dict[str, Any]:
    """Both miners in turn: medians, and how far they agree; `with_faiss` also the peer's other way to search, once."""
    runs: dict[str, list[Mined]] = {name: [] for name in ARITHMETICS}
    peers = []
    num_passages = sum(pq.read_metadata(file).num_rows for file in texts)
    for run in range(num_runs):
        for name, values in ARITHMETICS.items():
            home = output.with_name(f"{output.name}-{name}-{run}")
            mined = in_fresh_process(mine_ours, home, model, texts, values)
            runs[name].append(mined)
            console.print(
                f"{num_passages:,} passages, {name}: {mined.seconds:,.0f} s, {mined.peak_bytes / 2**20:,.0f} MiB"
            )
        peers.append(in_fresh_process(mine_peer, model, texts, False))
        console.print(f"  sentence-transformers {peers[-1].seconds:,.0f} s, {peers[-1].peak_bytes / 2**20:,.0f} MiB")
    ours, default = runs["float32"], runs["default"]
    found = {
        "passages": num_passages,
        "pairs": pq.read_metadata(texts.pairs).num_rows,
        "seconds": median(run.seconds for run in ours),
        "peak_bytes": median(run.peak_bytes for run in ours),
        "default_seconds": median(run.seconds for run in default),
        "default_shared": shared(default[0].negatives, peers[0].negatives),
        "peer_seconds": median(run.seconds for run in peers),
        "peer_peak_bytes": median(run.peak_bytes for run in peers),
    }
    if with_faiss:
        other = in_fresh_process(mine_peer, model, texts, True)
        found |= {"peer_faiss_seconds": other.seconds, "peer_faiss_peak_bytes": other.peak_bytes}
    return found | agreement(ours[0].negatives, peers[0].negatives)


def read_pairs(source: Path | None) -> pa.Table:
    """`query` and `passage` of a file with them, or with the translations `en` and `xx`; none: of the demo corpus."""
    if source is None:
        return demo_pairs()
    columns = ["en", "xx"] if "en" in pq.read_schema(source).names else ["query", "passage"]
    return pq.read_table(source, columns=columns).rename_columns(["query", "passage"])


def demo_pairs() -> pa.Table:
    """English messages of the demo corpus and what translates them."""
    rows = pq.read_table(demo_lines(), columns=["text", "lang", "group"]).to_pandas()
    english = rows[rows.lang == "en"].rename(columns={"text": "query"})
    others = rows[rows.lang != "en"].rename(columns={"text": "passage"})
    return pa.Table.from_pandas(english.merge(others, on="group")[["query", "passage"]], preserve_index=False)


def distinct_pairs(source: Path | None, num_pairs: int, asked_by: str) -> pa.Table:
    """`query` and `passage`, each text once, in an order of chance; ends the process where there are too few."""
    table = read_pairs(source)
    order = np.random.default_rng(0).permutation(len(table))
    frame = table.take(order).to_pandas().drop_duplicates("query").drop_duplicates("passage").head(num_pairs)
    if len(frame) < num_pairs:
        raise SystemExit(
            f"{source or 'the demo corpus'} has {len(frame)} distinct pairs; {asked_by} asks for {num_pairs}"
        )
    return pa.Table.from_pandas(frame, preserve_index=False)


def write_texts(source: Path | None, directory: Path, num_passages: int, num_queries: int) -> Texts:
    """Distinct pairs, and further distinct passages, in an order of chance, the same on every machine."""
    pairs = distinct_pairs(source, num_passages, "--sizes")
    directory.mkdir()
    texts = Texts(directory / "pairs.parquet", directory / "corpus.parquet")
    pq.write_table(pairs.slice(0, num_queries), texts.pairs)
    pq.write_table(pairs.slice(num_queries).select(["passage"]).rename_columns(["text"]), texts.corpus)
    return texts


def mine_ours(output: Path, model: Path, texts: Texts, arithmetic: dict[str, Any]) -> Mined:
    """`jobs/mine.py` from joining a cluster to the manifest."""
    config = MineConfig(
        pairs=str(texts.pairs),
        corpus=str(texts.corpus),
        output=str(output),
        model=str(model),
        columns=PairColumns(positive="passage"),
        rule=NegativeRule.model_validate(RULE),
        search=SearchConfig(index="exact"),
        **arithmetic,
    )
    with watched_memory(held) as peak:
        start = time.perf_counter()
        connect()
        mine(config)
        seconds = time.perf_counter() - start
    ray.shutdown()
    table = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])
    rows = table.select(["query", "negatives", "negative_scores"]).to_pylist()
    return Mined(
        seconds,
        peak[0],
        {row["query"]: [*zip(row["negatives"], row["negative_scores"], strict=True)] for row in rows},
    )


def mine_peer(model: Path, texts: Texts, use_faiss: bool) -> Mined:
    """sentence-transformers' miner as its documentation has it, with the same rule."""
    with watched_memory(held) as peak:
        start = time.perf_counter()
        # As the processes that embed for us do, while the clock runs.
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import mine_hard_negatives

        found = mine_hard_negatives(
            Dataset.from_parquet(str(texts.pairs)),
            SentenceTransformer(str(model), device="cpu"),
            corpus=pq.read_table(texts.corpus)["text"].to_pylist(),
            num_negatives=RULE["max_negatives"],
            range_max=RULE["range_max"] + 1,  # embedlib looks one deeper, since a query's own text may be there
            relative_margin=RULE["relative_margin"],
            output_format="labeled-list",
            output_scores=True,
            use_faiss=use_faiss,
            verbose=False,
        )
        seconds = time.perf_counter() - start
    negatives = {row["query"]: [*zip(row["passage"][1:], row["scores"][1:], strict=True)] for row in found.to_list()}
    return Mined(seconds, peak[0], negatives)


def agreement(
    ours: dict[str, list[tuple[str, float]]], peers: dict[str, list[tuple[str, float]]]
) -> dict[str, int | float]:
    """How many queries got the same negatives, how many differ among ties alone, and the widest gap of scores."""
    same = ties = others = 0
    farthest = 0.0
    for query in ours.keys() | peers.keys():
        here, there = dict(ours.get(query, [])), dict(peers.get(query, []))
        # A tie: what only one of them has scores what the other has in its place.
        only_here = sorted(here[text] for text in here.keys() - there.keys())
        only_there = sorted(there[text] for text in there.keys() - here.keys())
        gap = max(map(abs, np.subtract(only_here, only_there)), default=0.0) if len(here) == len(there) else np.inf
        same += not only_here and not only_there
        ties += bool(only_here and gap <= TIE)
        others += bool(gap > TIE)
        farthest = max(farthest, float(gap)) if np.isfinite(gap) else farthest
    return {
        "queries": len(ours.keys() | peers.keys()),
        "same": same,
        "ties": ties,
        "others": others,
        "farthest": farthest,
    }


def shared(ours: dict[str, list[tuple[str, float]]], peers: dict[str, list[tuple[str, float]]]) -> float:
    """Share of the peer's negatives that ours are, over all queries."""
    both = sum(len(dict(ours.get(query, [])).keys() & dict(found).keys()) for query, found in peers.items())
    return both / sum(map(len, peers.values()))


def held() -> int:
    """Proportional set size of this process, its children and Ray's, so that what they share counts once."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def against_plain_index(work: Path, vectors: Path, num_runs: int) -> dict[str, Any]:
    """Seconds of the search alone, exact and with inverted lists, by plain FAISS and by shards; medians."""
    files = [file for name in ("corpus", "positives") for file in vector_files(Store.at(str(vectors / name)))]
    rows, queries = (
        np.concatenate([vectors_of(pq.read_table(file)["vector"]) for file in some]).astype(np.float32)
        for some in (files, vector_files(Store.at(str(vectors / "queries"))))
    )
    queries = queries[:SEARCHED_QUERIES]
    k = NegativeRule.model_validate(RULE).depth(1)
    connect()
    found: dict[str, Any] = {"vectors": len(rows), "queries": len(queries)}
    exact: list[Hits] = []
    for kind in ("exact", f"IVF{max(4, len(rows) // ROWS_A_LIST)},Flat"):
        seconds, agree = {}, {}
        for num_shards in SHARDS:
            search = SearchConfig(index=kind, shards=num_shards)
            plan = plan_shards(work / kind, search, files, [], {"text": "text"})
            shards = start_shards(plan, RunReport("mine", "benchmark", Store.at(plan.work), {}))
            plan, _ = gated(plan, shards, queries[:SAMPLED_QUERIES])
            trained = plan.trained_index()
            seconds[num_shards] = timed(num_runs, search_blocks, queries, k, plan, shards, trained)
            hits = search_blocks(queries, k, plan, shards, trained)
            exact = exact or hits
            agree[num_shards] = recall(rows_of(hits)[:, :RECALL_AT], rows_of(exact)[:, :RECALL_AT])
            if kind == "exact":
                assert np.array_equal(rows_of(hits), rows_of(exact)), f"{num_shards} shards find other rows than one"
            for shard in shards:
                ray.kill(shard)
        plain = plain_index(rows, trained, plan.nprobe)
        found[kind.partition(",")[0].rstrip("0123456789").lower()] = {
            "plain_seconds": timed(num_runs, search_plain, queries, k, plain),
            "shard_seconds": seconds,
            "recall_at_10": agree,
            "nprobe": plan.nprobe,
        }
    ray.shutdown()
    return found


def false_negatives(output: Path, model: Path, labelled: Path, relative_margin: float | None) -> float:
    """Share of the negatives mined from a labelled set that answer their query.

    `labelled` has corpus, queries and qrels; passages that share a `par_id` are one passage in several languages, each
    an answer to the queries of any. The miner is told of that in the query's own language alone.
    """
    pairs, corpus, group = labelled_pairs(labelled)
    output.mkdir()
    files = {name: str(output / f"{name}.parquet") for name in ("pairs", "corpus")}
    texts = {"query": pairs["text_query"], "positive": pairs["text_passage"]}
    pq.write_table(pa.table(texts), files["pairs"])
    pq.write_table(pa.table({"text": corpus["text"]}), files["corpus"])
    rule = {"max_negatives": RULE["max_negatives"], "relative_margin": relative_margin}
    connect()
    mine(MineConfig.model_validate(files | {"output": str(output / "mined"), "model": str(model), "rule": rule}))
    ray.shutdown()
    group_of = dict(zip(corpus["text"], corpus[group], strict=True))
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((output / "mined").glob("part-*.parquet"))])
    answers = [
        group_of[text] in {group_of[positive] for positive in row["positives"]}
        for row in rows.select(["positives", "negatives"]).to_pylist()
        for text in row["negatives"]
    ]
    return sum(answers) / max(len(answers), 1)


def labelled_pairs(labelled: Path) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """`text_query` and `text_passage` of all labelled pairs, the corpus, and its column of what answers alike."""
    queries, corpus, qrels = (pq.read_table(labelled / f"{name}.parquet").to_pandas() for name in LABELLED)
    # Queries of several languages may share their ids.
    shared = ["lang"] if "lang" in qrels and "lang" in queries else []
    asked = qrels.merge(queries, left_on=["query-id", *shared], right_on=["_id", *shared])
    pairs = asked.merge(corpus, left_on="corpus-id", right_on="_id", suffixes=("_query", "_passage"))
    return pairs, corpus, "par_id" if "par_id" in corpus else "_id"


def plain_index(vectors: npt.NDArray[np.float32], trained: faiss.Index | None, nprobe: int) -> faiss.Index:
    """One FAISS index of the kind that the shards have."""
    index = faiss.IndexFlatIP(vectors.shape[1]) if trained is None else trained
    index.add(vectors)
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = nprobe
    return index


def search_plain(queries: npt.NDArray[np.float32], k: int, index: faiss.Index) -> None:
    """All queries, a block at a time."""
    for first in range(0, len(queries), BLOCK):
        index.search(queries[first : first + BLOCK], k)


def search_blocks(
    queries: npt.NDArray[np.float32], k: int, plan: ShardPlan, shards: Sequence[Any], trained: faiss.Index | None
) -> list[Hits]:
    """All queries, a block at a time, through all shards, as a miner sends them."""
    blocks = (queries[first : first + BLOCK] for first in range(0, len(queries), BLOCK))
    return [search_shards(plan, shards, block, k, trained) for block in blocks]


def rows_of(found: Sequence[Hits]) -> npt.NDArray[np.int64]:
    """Rows of all blocks, (queries, k)."""
    return np.concatenate([hits.rows for hits in found])


def timed(num_runs: int, function: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def table_of(miners: Sequence[dict[str, Any]]) -> Table:
    """What both miners took, and how far they agree."""
    table = Table(title="Miners, end to end")
    for column in ("passages", "float32, s", "default, s", "peer, s", "MiB", "peer, MiB", "same", "ties", "others"):
        table.add_column(column, justify="right")
    for row in miners:
        cells = [row["passages"], row["seconds"], row["default_seconds"], row["peer_seconds"]]
        cells += [row["peak_bytes"] / 2**20, row["peer_peak_bytes"] / 2**20, row["same"], row["ties"], row["others"]]
        table.add_row(*(f"{cell:,.0f}" for cell in cells))
    return table


if __name__ == "__main__":
    main()
