"""Embedding a corpus on a real local cluster: the vectors, the resume, the refusals."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embedlib.encoder import Encoder
from embedlib.errors import ArtifactError
from jobs.embed import EmbedConfig, embed, part_path, read_parts, write_part

pytestmark = pytest.mark.ray


def config_for(output: Path, model: Path, corpus: Path, **changes: object) -> EmbedConfig:
    values = {"input": corpus, "output": output, "model": str(model), "prompts": ["query", "passage"]}
    return EmbedConfig.model_validate(values | {"rows_per_part": 64, "dtype": "float32"} | changes)


def test_vectors_are_the_encoders_and_resume_repeats_nothing(
    ray_cluster: None, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    embed(config_for(output, tiny_encoder, tiny_corpus))
    ids, vectors = (np.concatenate(part) for part in zip(*read_parts(output), strict=True))
    texts = pq.read_table(tiny_corpus)["text"].to_pylist()
    assert ids.tolist() == list(range(len(texts)))
    encoder = Encoder.load(tiny_encoder, dtype=torch.float32)
    for offset, prompt in enumerate(("query", "passage")):
        expected = encoder.encode(texts[offset::2], prompt)
        np.testing.assert_allclose(vectors[offset::2], expected, atol=1e-3)

    before = part_path(output, 1).read_bytes()
    kept = part_path(output, 0).stat().st_mtime_ns
    part_path(output, 1).unlink()
    (output / "manifest.json").unlink()
    embed(config_for(output, tiny_encoder, tiny_corpus))
    assert part_path(output, 1).read_bytes() == before
    assert part_path(output, 0).stat().st_mtime_ns == kept


def test_another_model_in_the_way_is_refused(
    ray_cluster: None, tiny_encoder: Path, tiny_xlmr: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    embed(config_for(output, tiny_encoder, tiny_corpus, prompts=[]))
    with pytest.raises(ArtifactError, match=r"holds vectors \w{12}, but this run makes \w{12}"):
        embed(config_for(output, tiny_xlmr, tiny_corpus, prompts=[]))


def test_a_full_disk_leaves_no_half_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jobs.embed.pq.write_table", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write_part(tmp_path / "part-000000.parquet", np.arange(2), np.ones((2, 4), np.float16))
    assert not list(tmp_path.iterdir())


def test_parts_are_plain_fixed_size_lists(tmp_path: Path) -> None:
    vectors = np.arange(8, dtype=np.float16).reshape(2, 4)
    write_part(tmp_path / "part-000000.parquet", np.array([5, 6]), vectors)
    table = pq.read_table(tmp_path / "part-000000.parquet")
    assert str(table.schema.field("vector").type).startswith("fixed_size_list")
    assert table["vector"].to_pylist() == vectors.tolist()
