"""Find what belongs together in embedded corpora: translations in two, paraphrases or near-duplicates in one.

    python jobs/bitext.py --source vectors-en --target vectors-de --output pairs
    python jobs/bitext.py --source vectors --output duplicates --retrieval all --margin absolute --threshold 0.97

Every row's nearest neighbours are found on the shards that mining searches, a part file of rows at a time; after a
crash a rerun searches just the parts that are missing.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field, model_validator
from ray.util import ActorPool

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint
from embedlib.config import Config
from embedlib.errors import ArtifactError, ConfigError
from embedlib.margin import (
    Margin,
    Neighbours,
    Pairs,
    Retrieval,
    all_partners,
    best_partners,
    first_of_group,
    matched,
)
from embedlib.schemas import vector_column, vectors_of
from embedlib.storage import Store, user_path
from embedlib.topk import NO_ROW, Hits
from jobs.metrics import RunReport
from jobs.parts import claim, missing_parts, part_name, write_parquet
from jobs.runtime import SOME_CPU, connect, own_errors, working_nodes
from jobs.shards import (
    RETRIES,
    SearchConfig,
    ShardPlan,
    check_vectors,
    gated,
    plan_shards,
    require_distinct,
    sample,
    search_shards,
    start_shards,
    texts_of,
    vector_files,
    vectors_manifest,
)

QUERIES_AT_ONCE = 4096
RATIO_THRESHOLD = 1.06
PAIRS_A_PART = 262_144


class BitextConfig(Config):
    """Which corpora, and which of their rows belong together."""

    source: str
    """Directory that jobs/embed.py made, keeping its text column."""
    target: str | None = None
    """Another one, by the same model; none: the source itself."""
    output: str
    """Directory of the pairs: part files, manifest.json, and work/ with neighbours and shards. Every node must see it
    under the same path."""
    text: str = "text"
    """The text column."""
    neighbours: int = Field(default=4, ge=1)
    """Rows that a row is compared with."""
    margin: Margin = "ratio"
    """What a pair scores: its cosine by the mean cosine to both rows' neighbours (ratio), less it (distance), or the
    cosine itself (absolute)."""
    threshold: float | None = None
    """Pairs score at least this; none: 1.06, what bitext by ratio is usually cut at. Other margins need one."""
    retrieval: Retrieval = "max"
    """The best partner of every source row (forward), those best in both directions (intersect), the highest margins of
    both with each row in one pair at most (max), or every neighbour (all), which also writes kept.parquet: the rows
    of source, without their vectors, that are left when the first alone stays of all that are linked."""
    search: SearchConfig = SearchConfig()
    """How the corpora are searched."""

    @model_validator(mode="after")
    def _has_a_threshold(self) -> Self:
        if self.threshold is None and self.margin != "ratio":
            raise ValueError(f"threshold: none with margin {self.margin}; expected one, such as 0.95 for absolute")
        return self

    @property
    def least(self) -> float:
        """What pairs score at least."""
        return RATIO_THRESHOLD if self.threshold is None else self.threshold


class Finder:
    """Ray actor: finds the neighbours of the rows of one vector file."""

    def __init__(self, plan: ShardPlan, shards: list[Any], output: Path, neighbours: int, is_own: bool) -> None:
        self.plan, self.shards, self.output = plan, shards, output
        self.neighbours, self.is_own = neighbours, is_own
        self.trained = plan.trained_index()

    def find(self, number: int, file: Path, first_row: int) -> None:
        """Write the neighbours of the rows of `file`, the first of which has number `first_row`."""
        vectors = vectors_of(pq.read_table(file, columns=["vector"])["vector"]).astype(np.float32)
        found = [
            self.nearest(vectors[begin : begin + QUERIES_AT_ONCE], first_row + begin)
            for begin in range(0, len(vectors), QUERIES_AT_ONCE)
        ]
        columns = {
            name: vector_column(np.concatenate(parts))
            for name, parts in zip(Neighbours._fields, zip(*found, strict=True), strict=True)
        }
        write_parquet(Store.at(str(self.output)) / part_name(number), pa.table(columns))

    def nearest(self, queries: npt.NDArray[np.float32], first_row: int) -> Neighbours:
        """The neighbours of consecutive rows; where they search their own corpus, without themselves."""
        k = self.neighbours + self.is_own
        hits = search_shards(self.plan, self.shards, queries, k, self.trained)
        if self.is_own:
            hits = without_row(hits, first_row + np.arange(len(queries)), self.neighbours)
        missing = ((0, 0), (0, self.neighbours - hits.rows.shape[1]))
        rows = np.pad(hits.rows, missing, constant_values=NO_ROW)
        return Neighbours(rows, np.where(rows == NO_ROW, 0, np.pad(hits.scores, missing)).astype(np.float32))


def without_row(hits: Hits, rows: npt.NDArray[np.int64], k: int) -> Hits:
    """The best `k` of each query but the row it is."""
    order = np.argsort(hits.rows == rows[:, None], axis=1, kind="stable")
    return hits.masked(hits.rows == rows[:, None]).take(order[:, :k])


class Corpus(NamedTuple):
    """An embedded corpus in shards."""

    files: list[Path]
    plan: ShardPlan
    shards: list[Any]


def bitext(config: BitextConfig) -> Manifest:
    """Find what is missing on the cluster joined before."""
    output = Store.at(config.output)
    if not output.is_local:
        raise ConfigError(f"output: {config.output} is no directory of this machine; FAISS maps files alone")
    directories = {"source": config.source} | ({"target": config.target} if config.target else {})
    makers = {name: vectors_manifest(Path(directory)) for name, directory in directories.items()}
    models = {name: maker.parents.get("model", "") for name, maker in makers.items()}
    if len(set(models.values())) > 1:
        raise ArtifactError(
            f"target: made by model {models['target'][:12]}; expected {models['source'][:12]}, which made source"
        )
    parents = {name: maker.fingerprint for name, maker in makers.items()}
    values = config.model_dump(mode="json", exclude={"source", "target", "output"})
    mark = fingerprint(**parents, **values | {"search": {**values["search"], "shards": 0, "block_rows": 0}})
    if finished := claim(output, mark, "pairs"):
        return finished
    work = Path(output.path) / "work"
    report = RunReport("bitext", mark, output, config.model_dump(mode="json"))
    # All are planned before any has shards, which hold GPUs: a plan may train its index on one.
    planned = {name: planned_corpus(config, directory, work / name) for name, directory in directories.items()}
    corpora = {name: opened(config, corpus, report, len(planned)) for name, corpus in planned.items()}
    source, target = corpora["source"], corpora.get("target", corpora["source"])
    forward = neighbours(config, source, target, work / "forward", report)
    backward = forward if target is source else neighbours(config, target, source, work / "backward", report)
    pairs = above(config, forward, backward, source)
    for number, begin in enumerate(range(0, len(pairs.rows), PAIRS_A_PART)):
        some = Pairs._make(field[begin : begin + PAIRS_A_PART] for field in pairs)
        write_parquet(output / part_name(number), described(some, source, target))
    measurements: dict[str, Any] = {"pairs": len(pairs.rows)}
    measurements["rows"] = {name: corpus.plan.num_rows for name, corpus in corpora.items()}
    if config.retrieval == "all":
        is_first = first_of_group(pairs.rows, source.plan.num_rows) == np.arange(source.plan.num_rows)
        write_kept(Path(output.path) / "kept.parquet", source.files, is_first)
        measurements["kept"] = int(is_first.sum())
    manifest = Manifest(
        kind="pairs",
        fingerprint=mark,
        parents=parents,
        config=config.model_dump(mode="json"),
        measurements=measurements,
    )
    (output / MANIFEST_NAME).write(manifest.model_dump_json(indent=2).encode())
    report.finish()
    return manifest


def planned_corpus(config: BitextConfig, directory: str, work: Path) -> Corpus:
    """A vector directory, checked and cut into shards that are still to be started."""
    files = vector_files(Store.at(directory))
    check_vectors(files, [config.text], directory)
    require_distinct(files)
    return Corpus(files, plan_shards(work, config.search, files, [], {"text": config.text}), [])


def opened(config: BitextConfig, corpus: Corpus, report: RunReport, num_corpora: int) -> Corpus:
    """The same with its shards, ready to be searched; those of so many corpora share the GPUs."""
    shards = start_shards(corpus.plan, report, num_corpora)
    parts = [part for run in corpus.plan.chunks for part in run]
    plan, measured = gated(corpus.plan, shards, sample(parts, config.search.recall_queries))
    if measured:
        report.measure({"recall": measured["recall_at_10"]})
    return corpus._replace(plan=plan, shards=shards)


def neighbours(config: BitextConfig, here: Corpus, there: Corpus, output: Path, report: RunReport) -> Neighbours:
    """The neighbours in one corpus of all rows of another, (rows, k)."""
    missing = missing_parts(Store.at(str(output)), len(here.files))
    remote = ray.remote(num_cpus=SOME_CPU, max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD")(
        Finder
    )
    arguments = (there.plan, there.shards, output, config.neighbours, here is there)
    pool = ActorPool([remote.remote(*arguments) for _ in range(min(len(missing), working_nodes() + 1))])
    firsts = np.append(0, np.cumsum([pq.read_metadata(file).num_rows for file in here.files])).tolist()
    for number in missing:
        pool.submit(lambda finder, part: finder.find.remote(part, here.files[part], firsts[part]), number)
    report.begin(f"search {output.name}", len(here.files), "files", len(here.files) - len(missing))
    for done in range(1, len(missing) + 1):
        with own_errors():
            pool.get_next_unordered()
        report.update(len(here.files) - len(missing) + done)
    tables = [pq.read_table(output / part_name(number)) for number in range(len(here.files))]
    found = [np.concatenate([vectors_of(table[name]) for table in tables]) for name in Neighbours._fields]
    return Neighbours(*found)


def above(config: BitextConfig, forward: Neighbours, backward: Neighbours, source: Corpus) -> Pairs:
    """The pairs that the retrieval keeps and whose score is high enough."""
    if config.retrieval == "all":
        pairs = all_partners(forward, backward.means, config.margin)
    else:
        # Cut before they are matched: what is too low takes no partner from what is not.
        pairs = matched(
            high_enough(best_partners(forward, backward.means, config.margin), config.least),
            high_enough(best_partners(backward, forward.means, config.margin), config.least),
            config.retrieval,
        )
    kept = pairs.scores >= config.least
    if backward is forward:
        kept &= pairs.rows[:, 0] < pairs.rows[:, 1]
    if config.retrieval != "all":
        # A text that comes again has the partner of the first.
        kept &= np.isin(pairs.rows[:, 0], np.concatenate(ray.get([shard.rows.remote() for shard in source.shards])))
    return Pairs(pairs.rows[kept], pairs.scores[kept])


def high_enough(pairs: Pairs, least: float) -> Pairs:
    """The pairs that score at least so much."""
    kept = pairs.scores >= least
    return Pairs(pairs.rows[kept], pairs.scores[kept])


def described(pairs: Pairs, source: Corpus, target: Corpus) -> pa.Table:
    """Pairs with their ids and texts, in order."""
    columns: dict[str, Any] = {"score": pairs.scores}
    for side, name, corpus in ((0, "source", source), (1, "target", target)):
        rows, places = np.unique(pairs.rows[:, side], return_inverse=True)
        texts = texts_of(corpus.plan, corpus.shards, rows).take(pa.array(places))
        columns |= {f"{name}_row": pairs.rows[:, side], f"{name}_id": texts["id"], name: texts["text"]}
    return pa.table(columns)


def write_kept(path: Path, files: list[Path], kept: npt.NDArray[np.bool_]) -> None:
    """Write those rows of vector files that are kept, without their vectors: a corpus that jobs can read."""
    schema = pq.read_schema(files[0])
    schema = schema.remove(schema.get_field_index("vector")).remove_metadata()
    scratch = path.with_name(f".{path.name}")
    first = 0
    with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
        for file in files:
            rows = pq.read_table(file, columns=schema.names).replace_schema_metadata()
            writer.write_table(rows.filter(pa.array(kept[first : first + len(rows)])))
            first += len(rows)
    scratch.replace(path)


def main(config: BitextConfig) -> Manifest:
    """Join or start a cluster, find pairs, and say how many."""
    connect()
    given = config.model_dump(include={"source", "target", "output"}, exclude_none=True)
    manifest = bitext(config.model_copy(update={name: user_path(value) for name, value in given.items()}))
    print(f"{config.output}: " + ", ".join(f"{name} {value}" for name, value in manifest.measurements.items()))
    return manifest


if __name__ == "__main__":
    run_job(BitextConfig, main)
