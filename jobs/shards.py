"""A corpus of vectors cut into shards, each searched by a Ray actor: what mining and pair finding have in common."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field

from embedlib.artifact import MANIFEST_NAME, Manifest, read_manifest
from embedlib.config import Config
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.gpu_index import ID_BYTES, build_knows_gpus, has_kernels
from embedlib.index import Assignment, assign, code_size, new_index, save_index, train_index
from embedlib.schemas import vectors_of
from embedlib.shard import Chunk, Shard, build_shard
from embedlib.sources import Part, read_rows
from embedlib.storage import Store
from embedlib.topk import Hits, merge, recall
from jobs.metrics import RunReport
from jobs.parts import is_part
from jobs.runtime import SOME_CPU, own_errors, present_gpus, working_nodes

# Below this many rows brute force is quick, and exact.
EXACT_ROWS = 1_000_000
# Vectors for which a GPU of 16 GB has room; brute force over them is quicker than lists of bytes there, or any on CPUs.
GPU_BYTES = 8 << 30
ROWS_A_LIST = 512
MAX_LISTS = 1 << 18
MAX_GRAPH_SEARCH = 4096
RECALL_AT = 10
ROUGH_CANDIDATES = 1024
# Shards of several are asked for more than their share, since they are not alike.
SHARE = 1.25
# Memory of a shard's index at most, where the number of shards is not given.
SHARD_BYTES = 8 << 30
# What `auto` came to, beside the shards.
KIND_NAME = "index.txt"
RAISE = 1.5
# Of a call to a process that died: chance kills it once or twice, what kills it every time is to be told.
RETRIES = 10
# The one column that is read of vectors whose texts are known already.
VECTORS = {"vector": "vector"}


class SearchConfig(Config):
    """How the corpus is searched."""

    index: str = "auto"
    """exact: brute force; a kind of index as faiss.index_factory names it, such as IVF4096,SQ8; auto: exact up to a
    million rows, or 8 GiB of vectors a GPU, then inverted lists of about 512 rows as 4-bit codes, or as bytes where the
    index is to be merged."""
    candidates: int | None = Field(default=None, ge=1)
    """Rows that the index gives a query, over all shards, for their own vectors to be compared; none: 1024 for kinds
    that keep product-quantised codes, which order rows but roughly, else no more than are needed."""
    shards: int | None = Field(default=None, ge=1)
    """Pieces of the corpus, each with a process; none: one a node, or a GPU where there are more of them, and so many
    that none has an index of more than 8 GiB."""
    nprobe: int = Field(default=16, ge=1)
    """Lists that a query looks into, or how widely it searches a graph."""
    min_recall: float = Field(default=0.95, ge=0, le=1)
    """Share of the exact ten best that the index must find for a sample of the queries."""
    raise_nprobe: bool = True
    """Raise nprobe, by half, until min_recall is met, rather than refuse."""
    recall_queries: int = Field(default=256, ge=1)
    """Queries of the sample."""
    block_rows: int = Field(default=32768, ge=1)
    """Vectors that brute force holds at a time as float32, in every shard."""
    training_vectors: int | None = Field(default=None, ge=1)
    """Vectors that the index is trained on at most, which one process holds as float32; none: 64 a list, an eighth of
    the corpus until there are 262,144 lists."""
    merged: bool = False
    """Also write index.faiss over all shards, for kinds with inverted lists, and index-rows.parquet, which says what
    passage each of its numbers is."""


class ShardPlan(NamedTuple):
    """A corpus in shards, as their processes must know it."""

    work: str
    """Where shards, and the empty trained index, lie; every node sees it under the same path."""
    search: dict[str, Any]
    chunks: list[list[Part]]
    """The rows of each shard."""
    columns: dict[str, str]
    """Columns of the vector files by what they mean here."""
    id_type: pa.DataType
    num_own_rows: int
    """Rows that have an id of the corpus; those after them have none."""
    factory: str | None
    """Kind of index; none: brute force."""
    nprobe: int
    num_gpus: int
    """GPUs that search the shards; 0: CPUs do."""
    judge: list[list[Part]]
    """The rows of each shard once more, with the vectors of a second model; empty where there is none."""

    @property
    def num_rows(self) -> int:
        """Rows of all shards, copies included."""
        last = self.chunks[-1][-1]
        return last.first_row + last.num_rows

    @property
    def trained(self) -> Path:
        """The empty, trained index; no file where search is exact."""
        return Path(self.work) / "trained.faiss"

    def trained_index(self) -> faiss.Index | None:
        """The empty, trained index; none where search is exact."""
        return faiss.read_index(str(self.trained)) if self.trained.exists() else None

    @property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """The first row of each shard."""
        return np.array([parts[0].first_row for parts in self.chunks])

    def directory(self, number: int) -> Path:
        """Where shard `number` lies."""
        return Path(self.work) / f"{number:03}-of-{len(self.chunks):03}"


class IndexShard:
    """Ray actor: one shard of the corpus, built on its node if it is not there."""

    def __init__(self, plan: ShardPlan, number: int, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self.plan, self.number = plan, number
        search = SearchConfig.model_validate(plan.search)
        self.block_rows = search.block_rows
        self.num_candidates = candidates_a_shard(search, len(plan.chunks), plan.factory)
        self.opened: Shard | None = None

    @property
    def shard(self) -> Shard:
        """The shard; DataError for vectors that cannot be."""
        if self.opened is None:
            directory = self.plan.directory(self.number)
            on_gpu = bool(ray.get_gpu_ids()) and (self.plan.factory is None or build_knows_gpus())
            if not directory.exists():
                build_shard(
                    lambda: shard_chunks(self.plan, self.number),
                    directory,
                    self.plan.trained_index(),
                    (lambda: read_chunks(self.plan.judge[self.number], VECTORS)) if self.plan.judge else None,
                    on_gpu,
                )
            self.opened = Shard.open(directory, on_gpu)
            if self.plan.num_gpus and self.opened.resident is None and self.opened.gpu_index is None:
                reason = "its GPU has no room for it" if on_gpu else "no GPU, or a FAISS without kernels for one"
                print(f"shard {self.number}: {reason}; CPUs search it", flush=True)
        return self.opened

    def num_rows(self) -> int:
        """How many rows it holds."""
        return len(self.shard.rows)

    def rows(self) -> npt.NDArray[np.int64]:
        """The rows it holds, which are those of distinct texts."""
        return np.asarray(self.shard.rows)

    def search(
        self, queries: npt.NDArray[np.float32], k: int, nprobe: int, assignment: Assignment | None, exact: bool
    ) -> Hits:
        """The best `k` for `queries` (queries, dim), by brute force where `exact`."""
        shard = self.shard._replace(faiss_index=None) if exact else self.shard
        return shard.search(queries, k, self.block_rows, nprobe, assignment, self.num_candidates)

    def at(self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Hits:
        """What queries score with given rows."""
        return self.shard.at(queries, rows)

    def judged(self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What the second model's queries score with given rows, -inf for those of other shards."""
        return self.shard.judged(queries, rows)

    def texts(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """`id` and `text` of given rows."""
        return self.shard.texts_of(rows)


def plan_shards(
    work: Path,
    search: SearchConfig,
    own: Sequence[Path],
    others: Sequence[Path],
    columns: dict[str, str],
    judge: Sequence[Path] = (),
) -> ShardPlan:
    """Cut the rows of vector files, `own` with ids and `others` without, into shards, and train their index.

    They are to lie below `work`. `judge` are files of the same rows with a second model's vectors.
    """
    whole = whole_files([*own, *others])
    num_gpus = present_gpus()
    factory = kind_beside(work, factory_of(search, whole, num_gpus))
    if search.merged and not mergeable(factory):
        raise ConfigError(
            f"search.merged: with {factory or 'exact search'}; expected an index of inverted lists that are not "
            "fast-scan codes, such as IVF4096,SQ8"
        )
    if not (factory is None or has_kernels(new_index(dim_of(whole[0]), factory))):
        num_gpus = 0
    searchers = num_gpus or working_nodes()
    num_shards = search.shards or max(searchers, -(-index_bytes(factory, whole) // SHARD_BYTES))
    plan = ShardPlan(
        work=str(work),
        search=search.model_dump(),
        chunks=cut(whole, num_shards),
        factory=factory,
        judge=cut(whole_files(judge), num_shards) if judge else [],
        columns={"id": "id", "vector": "vector"} | columns,
        id_type=pq.read_schema(own[0]).field("id").type if own else pa.int64(),
        num_own_rows=sum(pq.read_metadata(file).num_rows for file in own),
        nprobe=search.nprobe,
        num_gpus=num_gpus,
    )
    if plan.factory and not plan.trained.exists():
        train_on_cluster(plan.chunks, plan.factory, plan.trained, search.training_vectors)
    return plan


def kind_beside(work: Path, kind: str | None) -> str | None:
    """The kind of index that shards in `work` have had since they were begun, else `kind`; GPUs come and go."""
    note = work / KIND_NAME
    if note.exists():
        return note.read_text() or None
    Store.at(str(note)).write((kind or "").encode())
    return kind


def vector_files(directory: Store) -> list[Path]:
    """The part files of a vector directory in order."""
    return [Path(file.path) for file in directory.files() if is_part(file)]


def read_chunks(parts: Sequence[Part], columns: dict[str, str]) -> Iterator[Chunk]:
    """Rows of vector files, a batch at a time, under the names that a shard knows."""
    for part in parts:
        file = pq.ParquetFile(part.file)
        chosen = {name: column for name, column in columns.items() if column in file.schema_arrow.names}
        row = part.first_row
        for batch in read_rows(file, list(chosen.values()), part.start, part.num_rows):
            yield Chunk(row, pa.table({name: batch[column] for name, column in chosen.items()}))
            row += len(batch)


def shard_chunks(plan: ShardPlan, number: int) -> Iterator[Chunk]:
    """The rows of shard `number`, those of positives without an id."""
    for chunk in read_chunks(plan.chunks[number], plan.columns):
        ids = chunk.rows["id"].combine_chunks()
        if chunk.first_row >= plan.num_own_rows:
            ids = pa.nulls(len(chunk.rows), plan.id_type)
        yield chunk._replace(rows=chunk.rows.set_column(0, "id", [ids]))


def vectors_manifest(directory: Path, kind: str = "vectors", job: str = "jobs/embed.py") -> Manifest:
    """What a directory of some kind says of itself; ArtifactError where it is none, or its job has not finished it."""
    manifest = read_manifest(directory)
    if manifest is None or manifest.kind != kind:
        found = f"holds {manifest.kind}" if manifest else f"no {MANIFEST_NAME}"
        raise ArtifactError(f"{directory}: {found}; expected {kind} that {job} finished")
    return manifest


def check_vectors(files: Sequence[Path], columns: Sequence[str], hint: str) -> None:
    """DataError where vector files are not all of one form, or have not kept what is needed of their texts."""
    expected = None
    for file in files:
        schema = pq.read_schema(file)
        if missing := [name for name in ("id", "vector", *columns) if name not in schema.names]:
            raise DataError(
                f"{file}: no column {missing[0]!r}; embed {hint or 'it'} with --columns.keep '{json.dumps([*columns])}'"
            )
        kind = schema.field("vector").type
        if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
            raise DataError(f"{file}: vectors are {kind}; expected float16 or float32")
        expected = expected or kind
        if kind != expected:
            raise DataError(f"{file}: vectors are {kind}, others {expected}; expected one model and one number type")


def ids_of(files: Sequence[Path]) -> pa.ChunkedArray:
    """The ids of all rows of at least one vector file."""
    return pa.concat_tables([pq.read_table(file, columns=["id"]) for file in files])["id"]


def require_distinct(files: Sequence[Path]) -> None:
    """DataError where two rows of vector files have one id."""
    if not files:
        return
    ids = ids_of(files)
    counts = ids.value_counts().flatten()
    if len(counts[0]) < len(ids):
        twice = counts[0].filter(pc.greater(counts[1], 1))
        raise DataError(f"corpus: id {twice[0]} and {len(twice) - 1} more are those of several rows; expected one")


def require_same_rows(files: Sequence[Path], judge: Sequence[Path]) -> None:
    """DataError where a second model has not made vectors of exactly the same rows."""
    ours, theirs = ids_of(files), ids_of(judge)
    if len(ours) != len(theirs) or not ours.equals(theirs):
        raise DataError(
            f"judge: made vectors of {len(theirs)} passages; expected the {len(ours)} that the model made vectors of"
        )


def whole_files(files: Sequence[Path]) -> list[Part]:
    """All rows of each file that has some, numbered from 0 over all of them."""
    whole: list[Part] = []
    first = 0
    for file in files:
        if num_rows := pq.read_metadata(file).num_rows:
            whole.append(Part(str(file), 0, num_rows, first))
            first += num_rows
    return whole


def cut(whole: Sequence[Part], num_shards: int) -> list[list[Part]]:
    """All rows of `whole_files` in `num_shards` runs of equal length."""
    total = rows_of(whole)
    if num_shards > total:
        raise ConfigError(f"search.shards: {num_shards} of {total} passages; expected fewer")
    edges = [total * number // num_shards for number in range(num_shards + 1)]
    return [[piece for part in whole if (piece := between(part, *run)).num_rows > 0] for run in pairwise(edges)]


def between(part: Part, begin: int, end: int) -> Part:
    """The rows of `part` from number `begin` up to `end`."""
    first = max(begin, part.first_row)
    last = min(end, part.first_row + part.num_rows)
    return Part(part.file, part.start + first - part.first_row, last - first, first)


def factory_of(search: SearchConfig, parts: Sequence[Part], num_gpus: int) -> str | None:
    """What faiss.index_factory is to make over these rows; none: brute force."""
    if search.index != "auto":
        return None if search.index == "exact" else search.index
    num_rows = rows_of(parts)
    held = GPU_BYTES * min(search.shards or num_gpus, num_gpus)
    if num_rows <= EXACT_ROWS or (not search.merged and vector_bytes(parts) <= held):
        return None
    dim = dim_of(parts[0])
    # FAISS cannot merge lists of 4-bit codes on disk.
    return f"IVF{num_lists(num_rows)},SQ8" if search.merged or dim % 2 else f"IVF{num_lists(num_rows)},PQ{dim // 2}x4fs"


def num_lists(num_rows: int) -> int:
    """How many inverted lists so many rows get."""
    return min(MAX_LISTS, 1 << max(0, round(math.log2(num_rows / ROWS_A_LIST))))


def candidates_a_shard(search: SearchConfig, num_shards: int, factory: str | None) -> int:
    """How many rows the index of a shard is asked for."""
    rough = factory is not None and re.search("PQ|RaBitQ", factory) is not None
    wanted = search.candidates or (ROUGH_CANDIDATES if rough else 0)
    return wanted if num_shards == 1 else math.ceil(SHARE * wanted / num_shards)


def index_bytes(factory: str | None, parts: Sequence[Part]) -> int:
    """Memory that the codes and ids of these rows take in such an index; brute force holds none, but reads files."""
    if factory is None:
        return 0
    return rows_of(parts) * (code_size(factory, dim_of(parts[0])) + ID_BYTES)


def rows_of(parts: Sequence[Part]) -> int:
    """How many rows the parts have."""
    return sum(part.num_rows for part in parts)


def vector_bytes(parts: Sequence[Part]) -> int:
    """Memory that the vectors of these rows take as they are stored."""
    kind = pq.read_schema(parts[0].file).field("vector").type
    return rows_of(parts) * int(kind.list_size) * int(kind.value_type.bit_width) // 8


def dim_of(part: Part) -> int:
    """Elements of the vectors of a part."""
    return int(pq.read_schema(part.file).field("vector").type.list_size)


def mergeable(factory: str | None) -> bool:
    """Whether FAISS can merge the lists of such indexes on disk."""
    # What turns vectors before they come to lists, as in OPQ8,IVF8,SQ8, stands between FAISS and the lists.
    return factory is not None and factory.startswith("IVF") and "fs" not in factory


def train_on_cluster(runs: Sequence[Sequence[Part]], factory: str, path: Path, most: int | None = None) -> None:
    """Have a worker train the empty index of all parts, on a GPU where there is one."""
    parts = [part for run in runs for part in run]
    remote = ray.remote(num_cpus=1, num_gpus=min(1, present_gpus()))(train_on_worker)
    with own_errors():
        ray.get(remote.remote(parts, factory, path, most))


def train_on_worker(parts: Sequence[Part], factory: str, path: Path, most: int | None) -> None:
    """Ray task: the empty index that all shards begin with, trained on a sample of all parts, of `most` vectors."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # nothing else is at work yet

    def some(num_rows: int) -> npt.NDArray[np.float32]:
        return sample(parts, min(num_rows, most or num_rows))

    on_gpu = bool(ray.get_gpu_ids()) and build_knows_gpus()
    save_index(train_index(some, dim_of(parts[0]), factory, on_gpu), path)


def sample(parts: Sequence[Part], num_rows: int) -> npt.NDArray[np.float32]:
    """About `num_rows` vectors of all parts alike, (rows, dim)."""
    chance = np.random.default_rng(0)
    share = min(1.0, num_rows / rows_of(parts))
    found = []
    for part in parts:
        chosen = np.sort(chance.choice(part.num_rows, math.ceil(part.num_rows * share), replace=False)) + part.start
        found.append(vectors_of(pq.read_table(part.file, columns=["vector"])["vector"].take(pa.array(chosen))))
    return np.concatenate(found).astype(np.float32)


def start_shards(plan: ShardPlan, report: RunReport, num_corpora: int = 1) -> list[Any]:
    """The shards' actors, spread over the nodes, each with its share of a node's cores; ready to search.

    Those of `num_corpora` are to find room on the GPUs side by side. Only as many are built at a time as there are
    cores, since one that is built holds its whole index in memory.
    """
    cores = (os.cpu_count() or 1) * working_nodes()
    threads = max(1, cores // len(plan.chunks))
    remote = ray.remote(
        num_cpus=SOME_CPU,
        num_gpus=share_of_gpu(len(plan.chunks), min(plan.num_gpus, present_gpus()), num_corpora),
        # What is asked for is what a node must have free, or an autoscaler start.
        memory=index_bytes(plan.factory, max(plan.chunks, key=rows_of)),
        max_restarts=-1,
        max_task_retries=RETRIES,
        scheduling_strategy="SPREAD",
    )
    actor: Any = remote(IndexShard)
    shards = [actor.remote(plan, number, threads) for number in range(len(plan.chunks))]
    report.begin("index", len(shards), "shards")
    ready, building, coming = 0, list[Any](), iter(shards)
    while ready < len(shards):
        building += [shard.num_rows.remote() for shard in islice(coming, cores // threads - len(building))]
        done, building = ray.wait(building)
        with own_errors():
            ray.get(done)
        ready += len(done)
        report.update(ready)
    return shards


def share_of_gpu(num_shards: int, num_gpus: int, num_corpora: int = 1) -> float:
    """What each shard takes of a GPU if they are spread as evenly as can be; Ray counts in ten-thousandths."""
    shards_a_gpu = num_corpora * -(-num_shards // num_gpus) if num_gpus else 0
    return math.floor(1e4 / shards_a_gpu) / 1e4 if shards_a_gpu else 0.0


def search_shards(
    plan: ShardPlan,
    shards: Sequence[Any],
    queries: npt.NDArray[np.float32],
    k: int,
    trained: faiss.Index | None = None,
) -> Hits:
    """The best `k` of all shards for `queries` (queries, dim); exact ones where no `trained` index is given.

    What lists to look into is found once for all shards, but by each GPU for itself.
    """
    assignment = assign(trained, queries, plan.nprobe) if trained and not plan.num_gpus else None
    sent = ray.put(queries)
    asked = [shard.search.remote(sent, k, plan.nprobe, assignment, trained is None) for shard in shards]
    return merge(ray.get(asked), k)


def gated(plan: ShardPlan, shards: Sequence[Any], queries: npt.NDArray[np.float32]) -> tuple[ShardPlan, dict[str, Any]]:
    """The plan with an nprobe that finds enough of the exact neighbours of some queries, and what was measured.

    Raises ConfigError if there is none. Where search is exact, nothing is measured.
    """
    index = plan.trained_index()
    if index is None:
        return plan, {}
    config = SearchConfig.model_validate(plan.search)
    most = index.nlist if isinstance(index, faiss.IndexIVF) else MAX_GRAPH_SEARCH
    exact = search_shards(plan, shards, queries, RECALL_AT)
    nprobe, measured = plan.nprobe, {}
    while True:
        found = search_shards(plan._replace(nprobe=nprobe), shards, queries, RECALL_AT, index)
        measured[nprobe] = recall(found.rows, exact.rows)
        print(f"recall@{RECALL_AT} with nprobe {nprobe}: {measured[nprobe]:.3f} of {len(queries)} queries", flush=True)
        if measured[nprobe] >= config.min_recall:
            return plan._replace(nprobe=nprobe), {"recall_at_10": measured[nprobe], "nprobe": nprobe}
        if not config.raise_nprobe or nprobe >= most:
            raise ConfigError(
                f"search.nprobe: {nprobe} finds {measured[nprobe]:.3f} of the exact {RECALL_AT} best; expected "
                f"search.min_recall {config.min_recall}. Raise nprobe, or choose an index that forgets less"
            )
        nprobe = min(math.ceil(RAISE * nprobe), most)


def texts_of(plan: ShardPlan, shards: Sequence[Any], rows: npt.NDArray[np.int64]) -> pa.Table:
    """`row`, `id` and `text` of rows, which are ascending."""
    owners = np.searchsorted(plan.first_rows, rows, "right") - 1
    tables = ray.get([shard.texts.remote(rows[owners == number]) for number, shard in enumerate(shards)])
    return pa.concat_tables(tables).add_column(0, "row", [pa.array(rows)])
