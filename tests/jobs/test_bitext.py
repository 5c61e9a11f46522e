"""Finding pairs on a real local cluster: translations in two corpora, copies and near-duplicates in one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.artifact import Manifest
from embedlib.errors import ArtifactError
from embedlib.schemas import vector_column
from jobs.bitext import BitextConfig, bitext
from jobs.metrics import NOTE
from jobs.parts import part_name

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
NUM_TEXTS, DIM = 300, 24
CHANCE = np.random.default_rng(0)
MEANINGS = CHANCE.normal(size=(NUM_TEXTS, DIM))


def embedded(directory: Path, texts: list[str], vectors: np.ndarray, model: str = "m") -> str:
    """A vector directory as jobs/embed.py leaves it, in two parts."""
    directory.mkdir()
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    ids = [f"{directory.name}-{number}" for number in range(len(texts))]
    table = pa.table({"id": ids, "text": texts, "vector": vector_column(unit)})
    pq.write_table(table.slice(0, 100), directory / part_name(0))
    pq.write_table(table.slice(100), directory / part_name(1))
    manifest = Manifest(kind="vectors", fingerprint=directory.name, parents={"model": model})
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return str(directory)


def found(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.concat_tables(
        [pq.read_table(path) for path in sorted(output.glob("part-*"))]
    ).to_pylist()
    return rows


def test_translations_find_each_other_whatever_the_shards(ray_cluster: None, tmp_path: Path) -> None:
    order = CHANCE.permutation(NUM_TEXTS)
    noisy = MEANINGS + 0.3 * CHANCE.normal(size=MEANINGS.shape)
    source = embedded(tmp_path / "en", [f"en {number}" for number in range(NUM_TEXTS)], MEANINGS)
    target = embedded(tmp_path / "de", [f"de {number}" for number in order], noisy[order])
    config = {"source": source, "target": target, "threshold": 1.0}
    one = bitext(BitextConfig.model_validate(config | {"output": str(tmp_path / "one")}))
    bitext(BitextConfig.model_validate(config | {"output": str(tmp_path / "three"), "search": {"shards": 3}}))
    pairs = found(tmp_path / "one")
    assert pairs == found(tmp_path / "three")
    assert one.measurements["pairs"] == len(pairs) >= 0.95 * NUM_TEXTS
    right = [pair["source"].removeprefix("en") == pair["target"].removeprefix("de") for pair in pairs]
    assert np.mean(right) >= 0.97
    assert {pair["source_id"] for pair in pairs} <= {f"en-{number}" for number in range(NUM_TEXTS)}
    assert [pair["score"] for pair in pairs] == sorted((pair["score"] for pair in pairs), reverse=True)
    note = json.loads((tmp_path / "one" / NOTE).read_text())
    assert (note["job"], note["stage"], note["finished"]) == ("bitext", "search backward", True)

    (tmp_path / "one" / "manifest.json").unlink()
    kept = tmp_path / "one" / "work" / "forward" / part_name(0)
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "one" / "work" / "forward" / part_name(1)).unlink()
    bitext(BitextConfig.model_validate(config | {"output": str(tmp_path / "one")}))
    assert (found(tmp_path / "one"), kept.stat().st_mtime_ns) == (pairs, stamp)


def test_near_duplicates_leave_one_of_a_group(ray_cluster: None, tmp_path: Path) -> None:
    vectors = MEANINGS[:200].copy()
    texts = [f"text {number}" for number in range(200)]
    vectors[150:160] = vectors[:10] + 0.01 * CHANCE.normal(size=(10, DIM))  # near
    vectors[190], texts[190] = vectors[0], texts[0]  # the same text
    source = embedded(tmp_path / "texts", texts, vectors)
    config = {"source": source, "output": str(tmp_path / "out"), "retrieval": "all", "margin": "absolute"}
    manifest = bitext(BitextConfig.model_validate(config | {"threshold": 0.95}))
    rows = pq.read_table(tmp_path / "out" / "kept.parquet")
    assert rows.column_names == ["id", "text"]
    kept = [int(name.removeprefix("texts-")) for name in rows["id"].to_pylist()]
    assert kept == [row for row in range(200) if not 150 <= row < 160 and row != 190]
    assert manifest.measurements["kept"] == 189


def test_vectors_of_two_models_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(NUM_TEXTS)]
    source, target = (embedded(tmp_path / name, texts, MEANINGS, model=name) for name in ("a", "b"))
    with pytest.raises(ArtifactError, match="target: made by model b; expected a, which made source"):
        bitext(BitextConfig(source=source, target=target, output=str(tmp_path / "out")))
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json; expected vectors that jobs/embed\.py finished"):
        bitext(BitextConfig(source=source, target=target, output=str(tmp_path / "out")))


def test_two_corpora_share_a_gpu(ray_cluster: None, tmp_path: Path) -> None:
    source = embedded(tmp_path / "en", [f"en {number}" for number in range(NUM_TEXTS)], MEANINGS)
    target = embedded(tmp_path / "de", [f"de {number}" for number in range(NUM_TEXTS)], MEANINGS)
    config = {"source": source, "target": target, "search": {"index": "IVF4,SQ8", "nprobe": 4, "shards": 2}}
    expected = bitext(BitextConfig.model_validate(config | {"output": str(tmp_path / "cpus")}))
    command = [sys.executable, "-m", "tests.jobs.counted_gpu", json.dumps(config | {"output": str(tmp_path / "gpu")})]
    # Where the shards of one waited for those of the other, it would not end.
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert found(tmp_path / "gpu") == found(tmp_path / "cpus")
    assert expected.measurements["pairs"] == NUM_TEXTS
