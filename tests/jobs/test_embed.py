"""Embedding a corpus on a real local cluster: the vectors, their forms, the quarantine, the resume, the refusals."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedlib.encoder import Encoder
from embedlib.errors import ArtifactError, ConfigError, DataError
from embedlib.storage import Store
from jobs.embed import EmbedConfig, PartStatistics, embed, embed_all, read_parts, token_histogram, write_part
from jobs.metrics import NOTE
from jobs.parts import part_name

pytestmark = pytest.mark.ray

NOTHING = PartStatistics(0, 0, {}, {}, 0.0)


def config_for(output: Path, model: Path, corpus: Path, **changes: object) -> EmbedConfig:
    values = {"input": str(corpus), "output": str(output), "model": str(model), "rows_per_part": 64}
    return EmbedConfig.model_validate(values | {"backend": "torch-float32", "columns": {"keep": ["lang"]}} | changes)


def rows_of(output: Path) -> dict[str, Any]:
    table = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])
    return table.to_pydict()


def test_vectors_are_the_encoders_and_resume_repeats_nothing(
    ray_cluster: None, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    config = config_for(output, tiny_encoder, tiny_corpus, prompts=["query", "passage"], num_actors=2)
    manifest = embed(config).manifest
    ids, vectors = (np.concatenate(part) for part in zip(*read_parts(output), strict=True))
    corpus = pq.read_table(tiny_corpus)
    texts = corpus["text"].to_pylist()
    assert ids.tolist() == list(range(len(texts)))
    assert rows_of(output)["lang"] == corpus["lang"].to_pylist()
    encoder = Encoder.load(tiny_encoder, dtype=torch.float32)
    tokens = 0
    for offset, prompt in enumerate(("query", "passage")):
        np.testing.assert_allclose(vectors[offset::2], encoder.encode(texts[offset::2], prompt), atol=1e-3)
        tokens += sum(map(len, encoder.tokenise(texts[offset::2], prompt)))
    assert manifest.measurements["rows"] == len(texts)
    assert manifest.measurements["tokens"] == tokens
    assert sum(manifest.measurements["token_histogram"].values()) == len(texts)
    assert manifest.measurements["quarantined"] == {}
    note = json.loads((output / NOTE).read_text())
    distinct = len({(row // 64, row % 2, text) for row, text in enumerate(texts)})  # of a part
    assert (note["done"], note["finished"], note["padding_waste"]) == (336, True, 0)
    assert note["cache_hits"] == pytest.approx(1 - distinct / len(texts))

    first, second = output / part_name(0), output / part_name(1)
    before, kept = pq.read_table(second), first.stat().st_mtime_ns
    group = pq.read_metadata(first).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.path_in_schema for column in columns if column.is_stats_set} == {"id", "lang"}
    second.unlink()
    (output / "manifest.json").unlink()
    again = embed(config).manifest
    assert pq.read_table(second).equals(before)
    assert first.stat().st_mtime_ns == kept
    assert again.measurements["tokens"] == tokens
    assert embed(config).texts_per_s == 0


def test_rows_without_a_vector_are_told_and_the_others_indexed(
    ray_cluster: None, tiny_encoder: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text, "n": number}) for number, text in enumerate(tiny_texts[:150])]
    lines[3], lines[70] = "{broken", json.dumps({"text": "  "})
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / "vectors"
    columns = {"keep": ["n"]}
    manifest = embed(config_for(output, tiny_encoder, tmp_path / "in.jsonl", columns=columns)).manifest
    embed(config_for(output, tiny_encoder, tmp_path / "in.jsonl", columns=columns, index="faiss"))
    assert manifest.measurements["quarantined"] == {"not JSON": 1, "empty": 1}
    quarantined = pa.concat_tables([pq.read_table(path) for path in sorted((output / "quarantine").iterdir())])
    assert quarantined["row"].to_pylist() == [3, 70]
    rows = rows_of(output)
    assert rows["id"] == rows["n"] == [number for number in range(150) if number not in (3, 70)]
    index = faiss.read_index(str(output / "index.faiss"))
    _, found = index.search(np.array(rows["vector"], np.float32)[:20], 1)
    assert index.ntotal == 148
    nearest = dict(zip(rows["id"], rows["vector"], strict=True))
    for row, hit in zip(rows["id"], found[:, 0].tolist(), strict=False):
        assert np.dot(nearest[row], nearest[hit]) >= np.dot(nearest[row], nearest[row]) - 1e-3


@pytest.mark.slow
def test_integers_keep_their_calibration_over_a_resume(
    ray_cluster: None, tiny_encoder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    config = config_for(output, tiny_encoder, tiny_corpus, vectors={"dtype": "int8"}, price_per_hour=3.6)
    manifest = embed(config).manifest
    assert len(manifest.measurements["backend"]["ranges"][0]) == 32
    assert manifest.measurements["cost_per_million_texts"] > 0
    before = pq.read_table(output / part_name(1))
    assert before.schema.field("vector").type == pa.list_(pa.int8(), 32)
    (output / part_name(1)).unlink()
    (output / "manifest.json").unlink()
    embed(config)
    assert pq.read_table(output / part_name(1)).equals(before)


def test_what_is_in_the_way_or_cannot_be_is_refused(
    ray_cluster: None, tiny_encoder: Path, tiny_xlmr: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    embed(config_for(output, tiny_encoder, tiny_corpus))
    with pytest.raises(ArtifactError, match=r"holds vectors \w{12}, but this run makes \w{12}"):
        embed(config_for(output, tiny_xlmr, tiny_corpus))
    with pytest.raises(DataError, match="no column 'title'"):
        embed(config_for(tmp_path / "other", tiny_encoder, tiny_corpus, columns={"text": "title"}))
    with pytest.raises(ConfigError, match="this model was trained for its whole vectors alone"):
        embed(config_for(tmp_path / "cut", tiny_encoder, tiny_corpus, vectors={"dimensions": 8}))
    with pytest.raises(ConfigError, match="expected one for all inputs"):
        embed_all([config_for(tmp_path / "a", model, tiny_corpus) for model in (tiny_encoder, tiny_xlmr)])
    embed(config_for(tmp_path / "lost", tiny_encoder, tiny_corpus))
    part, rest = tmp_path / "lost" / part_name(0), tmp_path / "lost" / "manifest.json"
    rest.unlink()
    part.write_bytes((tmp_path / "lost" / part_name(2)).read_bytes())
    write_part(Store.at(str(part)), pa.table({"id": [1]}), np.ones((1, 32), np.float16), NOTHING)
    with pytest.raises(ArtifactError, match=r"part-000000\.parquet: 1 vectors and {} quarantined; expected 64 rows"):
        embed(config_for(tmp_path / "lost", tiny_encoder, tiny_corpus))


def test_parts_are_plain_fixed_size_lists(tmp_path: Path) -> None:
    vectors = np.arange(8, dtype=np.float16).reshape(2, 4)
    path = tmp_path / part_name(0)
    write_part(Store.at(str(path)), pa.table({"id": [5, 6]}), vectors, NOTHING)
    table = pq.read_table(path)
    assert str(table.schema.field("vector").type).startswith("fixed_size_list")
    assert table["vector"].to_pylist() == vectors.tolist()


def test_token_histogram_rounds_up_to_powers_of_two() -> None:
    assert token_histogram(np.array([1, 2, 3, 4, 5, 8, 9])) == {"1": 1, "2": 1, "4": 2, "8": 2, "16": 1}
