"""Keep a FAISS index of embedded corpora on Ray: `python jobs/index.py --vectors vectors --output index`.

    python jobs/index.py --vectors more-vectors --base index --output larger-index

The quantiser is trained once, on a sample; tasks index pieces of the corpus side by side; their inverted lists are
merged into one file that `faiss.read_index` reads and that leaves its lists on disk. A base gives its quantiser and its
lists to the larger index, and stays as it is. After a crash a rerun does just the pieces that are missing.
"""

from jobs.cli import run_job  # isort: skip (takes jobs/ off sys.path before any library is imported)

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from embedlib.artifact import MANIFEST_NAME, Manifest, fingerprint
from embedlib.config import Config
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.index import merge_indexes, read_inverted, save_index
from embedlib.schemas import vectors_of
from embedlib.shard import checked
from embedlib.sources import Part
from embedlib.storage import Store, user_path
from embedlib.topk import recall
from jobs.metrics import RunReport
from jobs.parts import claim
from jobs.runtime import connect, own_errors
from jobs.shards import (
    RECALL_AT,
    check_vectors,
    cut,
    ids_of,
    num_lists,
    read_chunks,
    require_distinct,
    rows_of,
    sample,
    train_on_cluster,
    vector_files,
    vectors_manifest,
    whole_files,
)

INDEX_NAME, TRAINED_NAME, IDS_NAME = "index.faiss", "trained.faiss", "ids.npy"


class IndexConfig(Config):
    """What to index, and how well."""

    vectors: str
    """Directory that jobs/embed.py made; its ids are integers."""
    output: str
    """Directory of the index: index.faiss, index.lists, trained.faiss, ids.npy and manifest.json."""
    base: str | None = None
    """An index to extend: a directory that this job made of other vectors by the same model."""
    factory: str = "auto"
    """Kind of index with inverted lists, as faiss.index_factory names it; auto: IVF…,SQ8 with lists of about 512. A
    base's kind stays."""
    first_id: int = Field(default=0, ge=0)
    """Added to the ids, where those of the base begin at 0 as well."""
    piece_rows: int = Field(default=1_000_000, ge=1)
    """Vectors that a task indexes in memory."""
    nprobe: int = Field(default=16, ge=1)
    """Lists that a query looks into; doubled until min_recall is met, and kept in the file."""
    min_recall: float = Field(default=0.95, ge=0, le=1)
    """Share of the exact ten best that must be found, measured on some of the vectors; 0: not measured."""
    recall_queries: int = Field(default=256, ge=1)
    """How many."""


def build(config: IndexConfig) -> Manifest:
    """Build what is missing on the cluster joined before."""
    output = Store.at(config.output)
    if not output.is_local:
        raise ConfigError(f"output: {config.output} is no directory of this machine; FAISS maps files alone")
    source = vectors_manifest(Path(config.vectors))
    parents = {"vectors": source.fingerprint, "model": source.parents.get("model", "")}
    base = base_of(config, parents["model"])
    if base:
        parents["base"] = base.fingerprint
    values = config.model_dump(mode="json", exclude={"vectors", "output", "base", "piece_rows"})
    mark = fingerprint(**parents, **values)
    if finished := claim(output, mark, "index"):
        return finished
    home = Path(output.path)
    files = vector_files(Store.at(config.vectors))
    ids = write_ids(config, files, home)
    sources = [*(base.measurements["sources"] if base else []), [str(Path(config.vectors).absolute()), config.first_id]]
    trained = home / TRAINED_NAME
    whole = whole_files(files)
    pieces = cut(whole, -(-rows_of(whole) // config.piece_rows))
    if base and not trained.exists():
        save_index(read_inverted(Path(config.base or "") / TRAINED_NAME), trained)
    elif not trained.exists():
        factory = f"IVF{num_lists(len(ids))},SQ8" if config.factory == "auto" else config.factory
        train_on_cluster(pieces, factory, trained)
    read_inverted(trained)  # before the work, a kind that cannot be merged is refused
    report = RunReport("index", mark, output, config.model_dump(mode="json"))
    indexed = index_pieces(pieces, trained, home / "work", config.first_id, report)
    merge_indexes(trained, indexed, home / INDEX_NAME, Path(config.base) / INDEX_NAME if config.base else None)
    measured = measure(config, sources, home / INDEX_NAME) if config.min_recall else {}
    if measured:
        report.measure({"recall": measured["recall_at_10"]})
    shutil.rmtree(home / "work")
    manifest = Manifest(
        kind="index",
        fingerprint=mark,
        parents=parents,
        config=config.model_dump(mode="json"),
        measurements={"vectors": len(ids), "sources": sources} | measured,
    )
    (output / MANIFEST_NAME).write(manifest.model_dump_json(indent=2).encode())
    report.finish()
    return manifest


def base_of(config: IndexConfig, model: str) -> Manifest | None:
    """What the base says of itself; ArtifactError where it is none, or of another model."""
    if not config.base:
        return None
    manifest = vectors_manifest(Path(config.base), "index", "jobs/index.py")
    if manifest.parents["model"] != model:
        raise ArtifactError(
            f"base: of vectors by model {manifest.parents['model'][:12]}; expected {model[:12]}, which made vectors"
        )
    return manifest


def write_ids(config: IndexConfig, files: Sequence[Path], home: Path) -> npt.NDArray[np.int64]:
    """All ids of the index (vectors,), ascending; DataError where two vectors have one, or one that is no integer."""
    check_vectors(files, [], config.vectors)
    require_distinct(files)
    kind = pq.read_schema(files[0]).field("id").type
    if not pa.types.is_integer(kind):
        raise DataError(f"index: ids are {kind}; expected integers. Leave columns.id out to number the rows.")
    ids = ids_of(files).to_numpy().astype(np.int64) + config.first_id
    before = np.load(Path(config.base) / IDS_NAME) if config.base else np.empty(0, np.int64)
    if len(twice := np.intersect1d(ids, before)):
        raise DataError(
            f"vectors: id {twice[0]} and {len(twice) - 1} more are in the base already; expected others. "
            f"first_id {before.max() + 1} would number the new ones behind it"
        )
    ids = np.sort(np.concatenate([before, ids]))
    np.save(home / IDS_NAME, ids)
    return ids


def index_pieces(
    pieces: Sequence[Sequence[Part]], trained: Path, work: Path, first_id: int, report: RunReport
) -> list[Path]:
    """The index files of all pieces, those that are missing made by tasks."""
    # With their number: a rerun may cut otherwise.
    paths = [work / f"piece-{number:04}-of-{len(pieces):04}.faiss" for number in range(len(pieces))]
    work.mkdir(parents=True, exist_ok=True)
    remote = ray.remote(num_cpus=1)(index_piece)
    waiting = [
        remote.remote(piece, trained, path, first_id)
        for piece, path in zip(pieces, paths, strict=True)
        if not path.exists()
    ]
    report.begin("index", len(pieces), "pieces", len(pieces) - len(waiting))
    while waiting:
        done, waiting = ray.wait(waiting)
        with own_errors():
            ray.get(done)
        report.update(len(pieces) - len(waiting))
    return paths


def index_piece(piece: Sequence[Part], trained: Path, path: Path, first_id: int) -> None:
    """Ray task: the index of one piece."""
    index = faiss.read_index(str(trained))
    for chunk in read_chunks(piece, {"id": "id", "vector": "vector"}):
        vectors = vectors_of(chunk.rows["vector"])
        checked(vectors, chunk.first_row + np.arange(len(vectors)))
        index.add_with_ids(vectors.astype(np.float32), chunk.rows["id"].to_numpy().astype(np.int64) + first_id)
    save_index(index, path)


def measure(config: IndexConfig, sources: Sequence[Sequence[Any]], path: Path) -> dict[str, Any]:
    """Raise nprobe until the index finds enough of what brute force finds, and keep it in the file.

    Raises ConfigError where no nprobe does, ArtifactError where vectors of the base are gone.
    """
    if gone := [source for source, _ in sources if not (Path(source) / MANIFEST_NAME).exists()]:
        raise ArtifactError(
            f"min_recall: the vectors of the base at {gone[0]} are gone, so that recall cannot be measured; "
            "bring them back, or give min_recall 0"
        )
    corpora = [(whole_files(vector_files(Store.at(source))), first_id) for source, first_id in sources]
    queries = sample([part for parts, _ in corpora for part in parts], config.recall_queries)
    remote = ray.remote(num_cpus=1)(exact_nearest)
    heap = faiss.ResultHeap(len(queries), RECALL_AT, keep_max=True)
    for scores, ids in ray.get([remote.remote(*corpus, queries) for corpus in corpora]):
        heap.add_result(scores, ids)
    heap.finalize()
    index = read_inverted(path)
    nprobe = config.nprobe
    while True:
        index.nprobe = nprobe
        share = recall(index.search(queries, RECALL_AT)[1], heap.I)
        print(f"recall@{RECALL_AT} with nprobe {nprobe}: {share:.3f} of {len(queries)} queries", flush=True)
        if share >= config.min_recall:
            save_index(index, path)
            return {"recall_at_10": share, "nprobe": nprobe}
        if nprobe >= index.nlist:
            raise ConfigError(
                f"min_recall: {config.min_recall}; this index finds {share:.3f} whatever lists it looks into. Lower "
                "min_recall, or choose a factory that forgets less"
            )
        nprobe = min(2 * nprobe, index.nlist)


def exact_nearest(
    parts: Sequence[Part], first_id: int, queries: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Ray task: scores and ids (queries, 10) of the best of a corpus by brute force."""
    heap = faiss.ResultHeap(len(queries), RECALL_AT, keep_max=True)
    for chunk in read_chunks(parts, {"id": "id", "vector": "vector"}):
        vectors = vectors_of(chunk.rows["vector"]).astype(np.float32)
        few = min(RECALL_AT, len(vectors))
        scores, found = faiss.knn(queries, vectors, few, metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, chunk.rows["id"].to_numpy()[found].astype(np.int64) + first_id)
    heap.finalize()
    return heap.D, heap.I


def main(config: IndexConfig) -> Manifest:
    """Join or start a cluster, build the index, and say what it holds."""
    connect()
    paths = {name: user_path(value) for name in ("vectors", "output", "base") if (value := getattr(config, name))}
    manifest = build(config.model_copy(update=paths))
    measured = manifest.measurements
    recalled = f", recall@{RECALL_AT} {measured['recall_at_10']:.3f} with nprobe {measured['nprobe']}"
    print(f"{config.output}: {measured['vectors']:,} vectors{recalled if 'nprobe' in measured else ''}")
    return manifest


if __name__ == "__main__":
    run_job(IndexConfig, main)
