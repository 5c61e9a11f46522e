"""One model in one process, called as the gateway calls it."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedlib.artifact import Manifest, model_fingerprint
from embedlib.errors import ConfigError
from serve.batcher import BatcherConfig
from serve.calls import Answer, Call, Refusal, prompt_for
from serve.model import ModelConfig, ModelServer

TEXTS = ["the cat is small", "das Haus ist hier", "水很小"]


def load(directory: Path, **values: Any) -> ModelServer:
    return ModelServer.load(ModelConfig(path=str(directory), backend="torch-float32", **values), "cpu")


def ask(server: ModelServer, *calls: Call) -> Sequence[Answer | Refusal]:
    async def main() -> Sequence[Answer | Refusal]:
        running = asyncio.create_task(server.run())
        try:
            return await asyncio.gather(*map(server.embed, calls))
        finally:
            running.cancel()

    return asyncio.run(main())


def test_calls_at_once_each_get_their_own_vectors(tiny_encoder: Path, tiny_texts: list[str]) -> None:
    server = load(tiny_encoder, batching=BatcherConfig(batch_tokens=64, in_flight=1))
    shares = [tiny_texts[start::7] for start in range(7)]
    for texts, answer in zip(shares, ask(server, *map(Call, shares)), strict=True):
        assert isinstance(answer, Answer)
        np.testing.assert_allclose(answer.vectors, server.encoder.encode(texts), atol=1e-5)
        assert answer.fingerprint == model_fingerprint(tiny_encoder)
    counted = {metric.name: metric for metric in server.collect()}
    assert counted["embedlib_sequences"].samples[0].value == len(tiny_texts)


@pytest.mark.slow
def test_an_exported_model_answers_64_at_once(tiny_encoder: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: no exported model is served")
    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join(tiny_texts[:50]))
    server = ModelServer.load(
        ModelConfig(path=str(tiny_encoder), backend="openvino-float32", sample=str(sample)), "cpu"
    )
    shares = [tiny_texts[number::64] or TEXTS for number in range(64)]
    encoder = load(tiny_encoder).encoder
    for texts, answer in zip(shares, ask(server, *map(Call, shares)), strict=True):
        assert isinstance(answer, Answer)
        np.testing.assert_allclose(answer.vectors, encoder.encode(texts), atol=1e-5)


def test_long_texts_in_a_thread_are_tokenised_alike(tiny_encoder: Path, tiny_texts: list[str]) -> None:
    server = load(tiny_encoder)
    texts = [" ".join(tiny_texts)] * 3
    (answer,) = ask(server, Call(texts, prompt="query"))
    assert isinstance(answer, Answer)
    np.testing.assert_allclose(answer.vectors, server.encoder.encode(texts, "query"), atol=1e-5)


def test_what_cannot_be_had_is_refused_with_the_part_that_asks_for_it(tiny_encoder: Path) -> None:
    server = load(tiny_encoder, batching=BatcherConfig(max_queued_tokens=16))
    calls = [
        Call(TEXTS, dimensions=8),
        Call(TEXTS, dtype="uint8"),
        Call(TEXTS, prompt="nothing"),
        Call(["the cat " * 70], truncate=False),
        Call(TEXTS * 5),
    ]
    found = ask(server, *calls)
    assert [(answer.reason, answer.param) for answer in found if isinstance(answer, Refusal)] == [
        ("invalid", "dimensions"),
        ("invalid", "output_dtype"),
        ("invalid", "prompt 'nothing'"),
        ("invalid", "input.0"),
        ("too_large", "input"),
    ]


def test_matryoshka_models_give_shorter_unit_vectors(tiny_encoder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "matryoshka"
    shutil.copytree(tiny_encoder, directory)
    settings = directory / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"matryoshka_dims": [8, 32]}))
    server = load(directory)
    (answer,) = ask(server, Call(TEXTS, dimensions=8))
    assert isinstance(answer, Answer)
    expected = server.encoder.encode(TEXTS)[:, :8]
    np.testing.assert_allclose(answer.vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_calibration_comes_from_vectors_of_the_same_model(tiny_encoder: Path, tmp_path: Path) -> None:
    ranges = np.stack([-np.ones(32), np.ones(32)]).tolist()
    values = {"parents": {"model": model_fingerprint(tiny_encoder)}, "fingerprint": "0"}
    prepared = {"backend": "torch-float32", "ranges": ranges}
    manifest = Manifest(kind="vectors", measurements={"backend": prepared}, **values)
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    server = load(tiny_encoder, calibration=str(tmp_path))
    (answer,) = ask(server, Call(TEXTS, dtype="int8"))
    assert isinstance(answer, Answer)
    expected = np.trunc((server.encoder.encode(TEXTS) + 1) / (2 / 255) - 128)
    assert np.abs(answer.vectors - expected).max() <= 1
    (tmp_path / "manifest.json").write_text(
        manifest.model_copy(update={"parents": {"model": "another"}}).model_dump_json()
    )
    with pytest.raises(ConfigError, match="another model"):
        load(tiny_encoder, calibration=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no manifest\.json"):
        load(tiny_encoder, calibration=str(tmp_path / "nowhere"))


def test_a_quick_backend_is_measured_before_it_serves(tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="sample: none"):
        ModelServer.load(ModelConfig(path=str(tiny_encoder), backend="openvino-float32"), "cpu")


def test_a_wedged_model_shows(tiny_encoder: Path) -> None:
    server = load(tiny_encoder, stuck_after_s=0.01)

    async def main() -> bool:
        running = asyncio.create_task(server.run())
        server.batcher.forward = lambda sequences: asyncio.sleep(60)  # type: ignore[assignment,return-value]
        asked = asyncio.create_task(server.embed(Call(TEXTS)))
        await asyncio.sleep(0.1)
        stuck = server.is_stuck
        asked.cancel()
        running.cancel()
        return stuck

    assert asyncio.run(main())


def test_a_prompt_stands_for_an_input_type() -> None:
    assert prompt_for("query", ["query", "passage"]) == "query"
    assert prompt_for("document", ["query", "passage"]) == "passage"
    assert prompt_for("document", ["query"]) is None
    assert prompt_for(None, ["query"]) is None
