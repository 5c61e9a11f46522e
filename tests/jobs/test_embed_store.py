"""Embedding from and to an object store: the job over HTTP against a server that speaks S3."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedlib.errors import DataError
from embedlib.storage import Store
from jobs.embed import EmbedConfig, embed
from jobs.parts import part_name

pytestmark = pytest.mark.ray


def table_of(output: Store) -> pa.Table:
    parts = [pq.read_table(file.path, filesystem=file.filesystem) for file in output.files() if "part-" in file.path]
    return pa.concat_tables(parts)


@pytest.mark.slow
def test_vectors_in_an_object_store_are_those_on_disk(
    ray_cluster: None, bucket: str, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    source, output = Store.at(bucket.format("corpus.parquet")), Store.at(bucket.format("vectors"))
    source.write(tiny_corpus.read_bytes())
    values = {"model": str(tiny_encoder), "rows_per_part": 64, "backend": "torch-float32"}
    disk = {"input": str(tiny_corpus), "output": str(tmp_path / "vectors")}
    store = {"input": bucket.format("corpus.parquet"), "output": bucket.format("vectors")}
    embed(EmbedConfig.model_validate(values | disk))
    embed(EmbedConfig.model_validate(values | store))
    expected = table_of(Store.at(str(tmp_path / "vectors")))
    assert table_of(output).equals(expected)
    assert len(expected) == 336
    assert b"secret" not in (output / "manifest.json").read()

    kept = (output / part_name(1)).info.mtime_ns
    for name in (part_name(2), "manifest.json"):
        output.filesystem.delete_file((output / name).path)
    embed(EmbedConfig.model_validate(values | store))
    assert table_of(output).equals(expected)
    assert (output / part_name(1)).info.mtime_ns == kept


def test_what_is_not_there_is_told_without_the_key(bucket: str, tiny_encoder: Path, tmp_path: Path) -> None:
    values = {"input": bucket.format("nothing.parquet"), "output": str(tmp_path), "model": str(tiny_encoder)}
    with pytest.raises(DataError, match=r"input: s3://bucket/nothing\.parquet: no such file"):
        embed(EmbedConfig.model_validate(values))
