"""Mining at size: a whole corpus in an index, memory under two settings, time a query as the corpus grows.

    python -m benchmarks.mine_scale --corpus sentences.parquet --pairs pairs.parquet [--quick] [--json OUT] [--plot OUT]

`--pairs` has translations, `en` and `xx`: the first is a query, the second its answer. The encoder is the embedded
teacher without any of its layers, whose vectors cost next to nothing; embedding is not counted. Memory is what the
processes of a job hold for themselves and in Ray's object store; pages of mapped files, which the kernel takes back
when it needs them, are told apart.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.command import benchmark_parser, demo_lines, write_result
from benchmarks.machine import describe_machine, in_fresh_process, watched_memory
from benchmarks.mine import read_pairs, search_blocks, shallow
from embedlib import pairs
from embedlib.pairs import PairColumns
from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory
from embedlib.schemas import vectors_of
from embedlib.storage import Store
from jobs.embed import EmbedConfig, embed
from jobs.metrics import RunReport
from jobs.mine import MineConfig, mine_blocks, prepare, sample_queries
from jobs.runtime import connect
from jobs.shards import SearchConfig, gated, plan_shards, start_shards, vector_files

QUERIES, QUICK_QUERIES, QUICK_ROWS = 200_000, 2000, 20_000
PART_ROWS = 32768
SHARDS = 2
# Queries a block: what bounds memory, since the candidates of a block are scored anew from their own vectors.
SETTINGS = (4096, 512)
# A block takes what it takes, however many follow: the second setting mines a part of the queries.
SECOND_SHARE = 8
SHARES = (0.25, 0.5, 1.0)
TIMED_QUERIES, DEPTH = 8192, 72


class Mined(NamedTuple):
    """What a run under one setting took."""

    queries_per_block: int
    rows: int
    queries: int
    index_s: float
    mine_s: float
    own_bytes: int
    """The most that its processes held for themselves at a time."""
    mapped_bytes: int
    """The most pages of files in memory."""
    recall_at_10: float
    nprobe: int


class Searched(NamedTuple):
    """How long a query took in a corpus of some size."""

    rows: int
    ms_a_query: float
    recall_at_10: float


def main() -> None:
    """Measure, print and write."""
    parser = benchmark_parser("jobs/mine.py over a large corpus.", "few rows and queries")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="Parquet with `en` and `xx`; none: demo texts")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="where to draw time a query by rows")
    options = parser.parse_args(sys.argv[1:])
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="embedlib-bench-") as folder:
        work = Path(folder)
        model = shallow(pretrained_directory(EMBEDDED_TEACHER), work / "model", 0)
        write_corpus(options.corpus, work / "corpus.parquet", QUICK_ROWS if options.quick else None)
        write_pairs(options.pairs, work / "pairs.parquet", QUICK_QUERIES if options.quick else QUERIES)
        in_fresh_process(embed_corpus, work, model)
        mined = []
        for setting in SETTINGS:
            mined.append(in_fresh_process(mine_under, work, model, setting))
            console.print(mined[-1])
        searched = in_fresh_process(search_grown, work, mined[0].nprobe)
    console.print(table_of(mined, searched))
    result = {
        "machine": in_fresh_process(describe_machine),
        "runs": {"mined": [run._asdict() for run in mined], "searched": [point._asdict() for point in searched]},
        "ratios": {
            "memory_by_setting": mined[1].own_bytes / mined[0].own_bytes,
            "query_time_by_growth": searched[-1].ms_a_query / searched[0].ms_a_query,
        },
        "recall_at_10": mined[0].recall_at_10,
    }
    console.print_json(json.dumps({key: result[key] for key in ("ratios", "recall_at_10")}))
    write_result(options.json, result)
    if options.plot:
        draw(searched, options.plot)


def write_corpus(source: Path | None, path: Path, num_rows: int | None) -> None:
    """The texts in an order of chance, so that a first part of them is a sample of all."""
    texts = pq.read_table(source or demo_lines(), columns=["text"])
    order = np.random.default_rng(0).permutation(len(texts))[:num_rows]
    pq.write_table(texts.take(pa.array(order)), path, row_group_size=PART_ROWS)


def write_pairs(source: Path | None, path: Path, num_queries: int) -> None:
    """Distinct queries with an answer each."""
    table = read_pairs(source)
    order = np.random.default_rng(0).permutation(len(table))
    frame = table.take(order).to_pandas().drop_duplicates("query").head(num_queries)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)


def embed_corpus(work: Path, model: Path) -> None:
    """Vectors of the corpus, as `jobs/embed.py` makes them."""
    connect()
    values: dict[str, Any] = {"input": str(work / "corpus.parquet"), "output": str(work / "vectors")}
    values |= {"model": str(model)}
    values |= {"prompts": ["document"], "columns": {"keep": ["text"]}, "rows_per_part": PART_ROWS}
    embed(EmbedConfig.model_validate(values))
    ray.shutdown()


def mine_under(work: Path, model: Path, queries_per_block: int) -> Mined:
    """Mine all queries, in the steps of `jobs.mine.mine`, and watch the memory from the first shard on."""
    output = work / f"mined-{queries_per_block}"
    config = MineConfig(
        pairs=str(work / "pairs.parquet"),
        vectors=str(work / "vectors"),
        output=str(output),
        model=str(model),
        columns=PairColumns(positive="passage"),
        search=SearchConfig(index="auto" if num_rows(work) > PART_ROWS else "IVF64,PQ192x4fs", shards=SHARDS),
        queries_per_block=queries_per_block,
    )
    connect()
    plan = prepare(config, model, pairs.read_pairs(config.pairs, config.columns, config.max_characters), output)
    report = RunReport("mine", "benchmark", Store.at(str(output)), {})
    with watched_memory(own_bytes) as own, watched_memory(mapped_bytes) as mapped:
        begun = time.perf_counter()
        shards = start_shards(plan.shards, report)
        indexed = time.perf_counter()
        searched, measured = gated(plan.shards, shards, sample_queries(plan, config.search.recall_queries))
        gate_passed = time.perf_counter()
        blocks = range(plan.num_blocks if queries_per_block == SETTINGS[0] else -(-plan.num_blocks // SECOND_SHARE))
        mine_blocks(plan._replace(shards=searched), shards, blocks, report, measured["recall_at_10"])
        done = time.perf_counter()
    ray.shutdown()
    return Mined(
        queries_per_block=queries_per_block,
        rows=plan.shards.num_rows,
        queries=min(pq.read_metadata(config.pairs).num_rows, len(blocks) * queries_per_block),
        index_s=indexed - begun,
        mine_s=done - gate_passed,
        own_bytes=own[0],
        mapped_bytes=mapped[0],
        recall_at_10=measured["recall_at_10"],
        nprobe=measured["nprobe"],
    )


def search_grown(work: Path, nprobe: int) -> list[Searched]:
    """Seconds a query in growing parts of the corpus, with lists of one length and as many of them looked into."""
    connect()
    files = vector_files_of(work / "vectors")
    queries = np.concatenate(
        [
            vectors_of(pq.read_table(file)["vector"])
            for file in vector_files_of(work / f"mined-{SETTINGS[0]}/work/vectors/queries")
        ]
    )[:TIMED_QUERIES].astype(np.float32)
    found = []
    for share in SHARES:
        some = files[: max(1, round(share * len(files)))]
        rows = sum(pq.read_metadata(file).num_rows for file in some)
        index = f"IVF{max(64, 1 << round(np.log2(rows / 512)))},PQ192x4fs"
        search = SearchConfig(index=index, nprobe=nprobe, min_recall=0, shards=1)
        plan = plan_shards(work / f"grown-{share}", search, some, [], {"text": "text"})
        shards = start_shards(plan, RunReport("mine", "benchmark", Store.at(plan.work), {}))
        plan, measured = gated(plan, shards, queries[: search.recall_queries])
        trained = plan.trained_index()
        search_blocks(queries[:256], DEPTH, plan, shards, trained)  # pages of the index come in
        begun = time.perf_counter()
        search_blocks(queries, DEPTH, plan, shards, trained)
        seconds = time.perf_counter() - begun
        found.append(Searched(rows, 1000 * seconds / len(queries), measured["recall_at_10"]))
        for shard in shards:
            ray.kill(shard)
    ray.shutdown()
    return found


def vector_files_of(directory: Path) -> list[Path]:
    """The part files of a vector directory."""
    return vector_files(Store.at(str(directory)))


def num_rows(work: Path) -> int:
    """Rows of the corpus."""
    return int(pq.read_metadata(work / "corpus.parquet").num_rows)


def own_bytes() -> int:
    """What this process and those below it hold for themselves and in shared memory."""
    return proportional(("Pss_Anon", "Pss_Shmem"))


def mapped_bytes() -> int:
    """Pages of files that they have in memory."""
    return proportional(("Pss_File",))


def proportional(fields: Sequence[str]) -> int:
    """The sum of these fields of Linux's smaps_rollup over this process and those below it."""
    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.split(":")[0] in fields) * 1024
    return total


def table_of(mined: Sequence[Mined], searched: Sequence[Searched]) -> Table:
    """Both settings, and time by rows."""
    table = Table(title=f"{mined[0].queries:,} queries over {mined[0].rows:,} passages")
    for column in ("queries a block", "queries", "index, s", "mine, s", "own, MiB", "mapped, MiB"):
        table.add_column(column, justify="right")
    table.add_column("recall@10", justify="right")
    table.add_column("nprobe", justify="right")
    for run in mined:
        cells = [f"{run.queries_per_block:,}", f"{run.queries:,}", f"{run.index_s:,.0f}", f"{run.mine_s:,.0f}"]
        cells += [f"{run.own_bytes / 2**20:,.0f}", f"{run.mapped_bytes / 2**20:,.0f}"]
        table.add_row(*cells, f"{run.recall_at_10:.3f}", str(run.nprobe))
    for point in searched:
        table.add_row(f"{point.rows:,} rows", "", "", f"{point.ms_a_query:.2f} ms a query", "", "", "", "")
    return table


def draw(searched: Sequence[Searched], path: Path) -> None:
    """Time a query by rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.rows for point in searched], [point.ms_a_query for point in searched], marker="o")
    axes.set_ylim(0)
    axes.set_xlabel("passages")
    axes.set_ylabel("ms a query")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
