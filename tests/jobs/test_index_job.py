"""An index on a real local cluster: what it holds, how well it finds, how it grows, what it refuses."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.artifact import Manifest, write_manifest
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.schemas import vector_column
from jobs.index import IndexConfig, build
from jobs.metrics import NOTE
from jobs.parts import part_name

pytestmark = pytest.mark.ray

CHANCE = np.random.default_rng(0)
VECTORS = (lambda raw: raw / np.linalg.norm(raw, axis=1, keepdims=True))(CHANCE.normal(size=(3000, 16)))


def embedded(directory: Path, begin: int, end: int, model: str = "m", first_id: int = 0) -> Path:
    """A directory as jobs/embed.py makes it, of some of the vectors in two parts."""
    directory.mkdir()
    middle = (begin + end) // 2
    for number, (start, stop) in enumerate(((begin, middle), (middle, end))):
        ids = pa.array(np.arange(start, stop) - begin + first_id)
        vectors = vector_column(VECTORS[start:stop].astype(np.float16))
        pq.write_table(pa.table({"id": ids, "vector": vectors}), directory / part_name(number))
    write_manifest(directory, Manifest(kind="vectors", fingerprint=f"{begin}-{end}-{model}", parents={"model": model}))
    return directory


def config_for(vectors: Path, output: Path, **changes: Any) -> IndexConfig:
    values = {"vectors": str(vectors), "output": str(output), "factory": "IVF16,Flat", "nprobe": 1, "piece_rows": 700}
    return IndexConfig.model_validate(values | {"min_recall": 0.9} | changes)


def exact(queries: np.ndarray[Any, Any], num_vectors: int) -> list[list[int]]:
    scores = queries @ VECTORS[:num_vectors].astype(np.float16).astype(np.float32).T
    return np.argsort(-scores, axis=1)[:, :10].tolist()


def test_an_index_finds_enough_and_grows(ray_cluster: None, tmp_path: Path) -> None:
    first, second = embedded(tmp_path / "first", 0, 2000), embedded(tmp_path / "second", 2000, 3000)
    small = build(config_for(first, tmp_path / "small"))
    assert small.measurements["recall_at_10"] >= 0.9
    assert small.measurements["nprobe"] > 1
    note = json.loads((tmp_path / "small" / NOTE).read_text())
    assert (note["job"], note["finished"], note["recall"]) == ("index", True, small.measurements["recall_at_10"])
    before = (tmp_path / "small" / "index.faiss").read_bytes()
    config = config_for(second, tmp_path / "large", base=str(tmp_path / "small"), first_id=2000)
    large = build(config)
    assert build(config) == large
    assert (tmp_path / "small" / "index.faiss").read_bytes() == before
    index = faiss.read_index(str(tmp_path / "large" / "index.faiss"))
    assert (index.ntotal, index.nprobe) == (3000, large.measurements["nprobe"])
    assert np.load(tmp_path / "large" / "ids.npy").tolist() == list(range(3000))
    index.nprobe = index.nlist
    queries = VECTORS[::100].astype(np.float16).astype(np.float32)
    assert index.search(queries, 10)[1].tolist() == exact(queries, 3000)


def test_what_cannot_be_indexed_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    first, other = embedded(tmp_path / "first", 0, 2000), embedded(tmp_path / "other", 2000, 3000, model="n")
    again = embedded(tmp_path / "again", 2000, 3000, first_id=1999)
    build(config_for(first, tmp_path / "index"))
    base = str(tmp_path / "index")
    with pytest.raises(ArtifactError, match="base: of vectors by model m; expected n"):
        build(config_for(other, tmp_path / "a", base=base))
    with pytest.raises(DataError, match="id 1999 and 0 more are in the base already; expected others"):
        build(config_for(again, tmp_path / "b", base=base))
    with pytest.raises(ArtifactError, match=r"holds vectors; expected index that jobs/index\.py finished"):
        build(config_for(other, tmp_path / "c", base=str(first)))
    with pytest.raises(ConfigError, match="has no inverted lists"):
        build(config_for(first, tmp_path / "d", factory="Flat"))
    with pytest.raises(ConfigError, match="this index finds"):
        build(config_for(first, tmp_path / "e", factory="IVF4,PQ4x4", min_recall=1.0))
    (first / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="are gone, so that recall cannot be measured"):
        build(config_for(again, tmp_path / "f", base=base, first_id=10_000))
