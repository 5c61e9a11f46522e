"""Hard negatives by `jobs/mine.py` against sentence-transformers' miner, and its shards against one index.

    python benchmarks/mine.py [--quick] [--json OUT] [--pairs FILE] [--model MODEL] [--layers N] [--sizes N …]

Both miners get the same model, pairs and rule, each in a process of its own; what they find is compared negative by
negative. Then vectors of the largest corpus are searched by plain FAISS and by 1, 2, 4 and 8 shards.
"""

import argparse
import json
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
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from benchmarks.command import benchmark_parser, demo_lines, write_result
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from embedlib.compress.layers import keep_layers
from embedlib.index import assign
from embedlib.pairs import read_pairs
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.schemas import vectors_of
from embedlib.topk import Hits, merge, recall
from jobs.mine import MineConfig, mine, prepare
from jobs.runtime import connect
from jobs.shards import RECALL_AT, ROWS_A_LIST, gated, start_shards

SIZES, QUICK_SIZES = (50_000, 200_000), (1_000,)
RULE = {"max_negatives": 7, "range_max": 50, "relative_margin": 0.05}
SHARDS = (1, 2, 4, 8)
SEARCHED_QUERIES, SAMPLED_QUERIES, BLOCK = 8192, 256, 2048
TIE = 1e-5
LABELLED = ("queries", "corpus", "qrels")
MARGINS = {"without a margin": None, "95 % of the positive": 0.05}


class Mined(NamedTuple):
    """What a miner took, and found: queries with their negatives and scores."""

    seconds: float
    peak_bytes: int
    negatives: dict[str, list[tuple[str, float]]]


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments(sys.argv[1:])
    console = Console(width=110)
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        model = pretrained_directory(options.model)
        if options.layers:
            model = shallow(model, work / "model", options.layers)
        miners = [against_peer(work, model, options.pairs, size, options.runs or 1, console) for size in sizes]
        largest = sizes[-1]
        shards = in_fresh_process(
            against_plain_index, work / f"ours-{largest}-0", work / f"pairs-{largest}.parquet", options.runs or 3
        )
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
            "memory_vs_st": last["peak_bytes"] / last["peer_peak_bytes"],
            "sharding_overhead": shards["exact"]["shard_seconds"][SHARDS[1]] / shards["exact"]["plain_seconds"] - 1,
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
    parser = benchmark_parser("jobs/mine.py against other miners.", "a thousand pairs and one run")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="Parquet with `query` and `passage`; none: demo texts"
    )
    parser.add_argument("--model", default=EMBEDDED_TEACHER, help="what embeds")
    parser.add_argument("--layers", type=int, help="only so many of its first layers, to leave time for the search")
    parser.add_argument("--labelled", type=Path, metavar="DIR", help="corpus, queries and qrels, to find answers mined")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of pairs")
    return parser.parse_args(arguments)


def shallow(model: Path, directory: Path, num_layers: int) -> Path:
    """The model with its first layers alone."""
    encoder = SentenceTransformer(str(model), device="cpu")
    keep_layers(encoder[0].auto_model, range(num_layers))
    encoder.save(str(directory))
    return directory


def against_peer(
    work: Path, model: Path, source: Path | None, num_pairs: int, num_runs: int, console: Console
) -> dict[str, Any]:
    """Both miners in turn on the first pairs of `source`: medians, and how far they agree."""
    pairs = work / f"pairs-{num_pairs}.parquet"
    write_pairs(source, pairs, num_pairs)
    ours, peers = [], []
    for run in range(num_runs):
        ours.append(in_fresh_process(mine_ours, work / f"ours-{num_pairs}-{run}", model, pairs))
        console.print(f"{num_pairs:,} pairs: {ours[-1].seconds:,.0f} s, {ours[-1].peak_bytes / 2**20:,.0f} MiB")
        peers.append(in_fresh_process(mine_peer, model, pairs))
        console.print(f"  sentence-transformers {peers[-1].seconds:,.0f} s, {peers[-1].peak_bytes / 2**20:,.0f} MiB")
    return {
        "pairs": num_pairs,
        "seconds": median(run.seconds for run in ours),
        "peak_bytes": median(run.peak_bytes for run in ours),
        "peer_seconds": median(run.seconds for run in peers),
        "peer_peak_bytes": median(run.peak_bytes for run in peers),
    } | agreement(ours[0].negatives, peers[0].negatives)


def demo_pairs() -> pa.Table:
    """English messages of the demo corpus and what translates them."""
    rows = pq.read_table(demo_lines(), columns=["text", "lang", "group"]).to_pandas()
    english = rows[rows.lang == "en"].rename(columns={"text": "query"})
    others = rows[rows.lang != "en"].rename(columns={"text": "passage"})
    return pa.Table.from_pandas(english.merge(others, on="group")[["query", "passage"]], preserve_index=False)


def write_pairs(source: Path | None, path: Path, num_pairs: int) -> None:
    """Pairs of distinct queries and distinct passages in an order of chance, the same on every machine."""
    table = pq.read_table(source, columns=["query", "passage"]) if source else demo_pairs()
    order = np.random.default_rng(0).permutation(len(table))
    frame = table.take(order).to_pandas().drop_duplicates("query").drop_duplicates("passage").head(num_pairs)
    if len(frame) < num_pairs:
        raise SystemExit(f"{source or 'the demo corpus'} has {len(frame)} distinct pairs; --sizes asks for {num_pairs}")
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)


def mine_ours(output: Path, model: Path, pairs: Path) -> Mined:
    """`jobs/mine.py` in float32 throughout, from joining a cluster to the manifest."""
    with watched_memory(held) as peak:
        start = time.perf_counter()
        connect()
        mine(ours(output, model, pairs))
        seconds = time.perf_counter() - start
    ray.shutdown()
    table = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])
    rows = table.select(["query", "negatives", "negative_scores"]).to_pylist()
    return Mined(
        seconds,
        peak[0],
        {row["query"]: [*zip(row["negatives"], row["negative_scores"], strict=True)] for row in rows},
    )


def ours(output: Path, model: Path, pairs: Path, **search: Any) -> MineConfig:
    """Our configuration of the rule."""
    return MineConfig.model_validate(
        {
            "pairs": str(pairs),
            "output": str(output),
            "model": str(model),
            "columns": {"positive": "passage"},
            "rule": RULE,
            "backend": "torch-float32",
            "vector_dtype": "float32",
            "search": {"index": "exact"} | search,
        }
    )


def mine_peer(model: Path, pairs: Path) -> Mined:
    """sentence-transformers' miner as its documentation has it, with the same rule."""
    with watched_memory(held) as peak:
        start = time.perf_counter()
        found = mine_hard_negatives(
            Dataset.from_parquet(str(pairs)),
            SentenceTransformer(str(model), device="cpu"),
            num_negatives=RULE["max_negatives"],
            range_max=RULE["range_max"] + 1,  # embedlib looks one deeper, since a query's own text may be there
            relative_margin=RULE["relative_margin"],
            output_format="labeled-list",
            output_scores=True,
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
        ties += bool(only_here) and gap <= TIE
        others += bool(gap > TIE)
        farthest = max(farthest, float(gap)) if np.isfinite(gap) else farthest
    return {
        "queries": len(ours.keys() | peers.keys()),
        "same": same,
        "ties": ties,
        "others": others,
        "farthest": farthest,
    }


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


def against_plain_index(mined: Path, pairs: Path, num_runs: int) -> dict[str, Any]:
    """Seconds of the search alone, exact and with inverted lists, by plain FAISS and by shards; medians."""
    model = Path(json.loads((mined / "manifest.json").read_text())["config"]["model"])
    vectors, queries = (read_vectors(mined / "work" / "vectors" / name) for name in ("positives", "queries"))
    queries = queries[:SEARCHED_QUERIES]
    k = ours(mined, model, pairs).rule.depth(1)
    connect()
    found: dict[str, Any] = {"vectors": len(vectors), "queries": len(queries)}
    exact: list[Hits] = []
    for kind in ("exact", f"IVF{max(4, len(vectors) // ROWS_A_LIST)},Flat"):
        output = mined.with_name(f"{mined.name}-{kind}")
        (output / "work").mkdir(parents=True)
        (output / "work" / "vectors").symlink_to(mined / "work" / "vectors")
        seconds, agree = {}, {}
        for num_shards in SHARDS:
            config = ours(output, model, pairs, index=kind, shards=num_shards)
            plan = prepare(config, model, read_pairs(str(pairs), config.columns, config.max_characters), output)
            shards = start_shards(plan.shards)
            searched, _ = gated(plan.shards, shards, queries[:SAMPLED_QUERIES])
            trained = faiss.read_index(str(searched.trained)) if searched.trained.exists() else None
            seconds[num_shards] = timed(num_runs, search_shards, queries, k, shards, trained, searched.nprobe)
            hits = search_shards(queries, k, shards, trained, searched.nprobe)
            exact = exact or hits
            agree[num_shards] = recall(rows_of(hits)[:, :RECALL_AT], rows_of(exact)[:, :RECALL_AT])
            for shard in shards:
                ray.kill(shard)
        plain = plain_index(vectors, trained, searched.nprobe)
        found[kind.partition(",")[0].rstrip("0123456789").lower()] = {
            "plain_seconds": timed(num_runs, search_plain, queries, k, plain),
            "shard_seconds": seconds,
            "recall_at_10": agree,
            "nprobe": searched.nprobe,
        }
    ray.shutdown()
    return found


def false_negatives(output: Path, model: Path, labelled: Path, relative_margin: float | None) -> float:
    """Share of the negatives mined from a labelled set that answer their query.

    `labelled` has corpus, queries and qrels; passages that share a `par_id` are one passage in several languages, each
    an answer to the queries of any.
    """
    queries, corpus, qrels = (pq.read_table(labelled / f"{name}.parquet").to_pandas() for name in LABELLED)
    pairs = qrels.merge(queries, left_on="query-id", right_on="_id").merge(
        corpus, left_on="corpus-id", right_on="_id", suffixes=("_query", "_passage")
    )
    group = "par_id" if "par_id" in corpus else "_id"
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


def read_vectors(directory: Path) -> npt.NDArray[np.float32]:
    """All vectors of a directory, (rows, dim)."""
    files = sorted(directory.glob("part-*.parquet"))
    return np.concatenate([vectors_of(pq.read_table(file)["vector"]) for file in files]).astype(np.float32)


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


def search_shards(
    queries: npt.NDArray[np.float32], k: int, shards: Sequence[Any], trained: faiss.Index | None, nprobe: int
) -> list[Hits]:
    """All queries, a block at a time, through all shards, as a miner sends them."""
    found = []
    for first in range(0, len(queries), BLOCK):
        some = queries[first : first + BLOCK]
        sent, assignment = ray.put(some), assign(trained, some, nprobe) if trained else None
        found.append(merge(ray.get([shard.search.remote(sent, k, nprobe, assignment) for shard in shards]), k))
    return found


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
    for column in ("pairs", "embedlib, s", "peer, s", "MiB", "peer, MiB", "same", "ties", "others"):
        table.add_column(column, justify="right")
    for row in miners:
        cells = [row["pairs"], row["seconds"], row["peer_seconds"], row["peak_bytes"] / 2**20]
        cells += [row["peer_peak_bytes"] / 2**20, row["same"], row["ties"], row["others"]]
        table.add_row(*(f"{cell:,.0f}" for cell in cells))
    return table


if __name__ == "__main__":
    main()
