import asyncio
import base64
import gzip
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve.api import LimitsConfig
from serve.auth import Key, hash_key
from serve.calls import Call, Refusal
from serve.door import Pressure
from tests.serve.conftest import LIMITS, LocalModel, application

TEXTS = ["the cat is small", "das Haus ist hier", "水很小", "моя кошка здесь"]


def offline(model: LocalModel, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return model.server.encoder.encode(texts, prompt)


def vectors_of(answer: dict[str, Any]) -> np.ndarray:
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def post(client: TestClient, **values: Any) -> Any:
    return client.post("/v1/embeddings", json={"input": TEXTS, "model": "full"} | values)


def test_vectors_are_those_of_offline_embedding(client: TestClient, full: LocalModel) -> None:
    answer = post(client).json()
    np.testing.assert_allclose(vectors_of(answer), offline(full, TEXTS), atol=1e-5)
    assert answer["model"] == "full"
    tokens = sum(len(ids) for ids in full.server.encoder.tokenise(TEXTS))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_input_types_put_the_models_prompt_before_the_texts(client: TestClient, full: LocalModel) -> None:
    query, document = (vectors_of(post(client, input_type=kind).json()) for kind in ("query", "document"))
    np.testing.assert_allclose(query, offline(full, TEXTS, "query"), atol=1e-5)
    np.testing.assert_allclose(document, offline(full, TEXTS, "document"), atol=1e-5)


def test_token_ids_are_taken_as_they_are(client: TestClient, full: LocalModel) -> None:
    ids = [sequence.tolist() for sequence in full.server.encoder.tokenise(TEXTS)]
    np.testing.assert_allclose(vectors_of(post(client, input=ids).json()), offline(full, TEXTS), atol=1e-5)
    np.testing.assert_allclose(vectors_of(post(client, input=ids[0]).json()), offline(full, TEXTS[:1]), atol=1e-5)


def test_base64_raw_rows_and_arrow_hold_the_same(client: TestClient) -> None:
    plain = vectors_of(post(client).json())
    coded = post(client, encoding_format="base64").json()["data"]
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded]
    np.testing.assert_array_equal(np.stack(rows), plain)
    body = {"input": TEXTS, "model": "full"}
    raw = client.post("/v1/embeddings", json=body, headers={"accept": "application/octet-stream"})
    shape = tuple(map(int, raw.headers["x-shape"].split(",")))
    np.testing.assert_array_equal(np.frombuffer(raw.content, raw.headers["x-dtype"]).reshape(shape), plain)
    arrow = client.post("/v1/embeddings", json=body, headers={"accept": "application/vnd.apache.arrow.stream"})
    table = pa.ipc.open_stream(arrow.content).read_all()
    assert table["id"].to_pylist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), plain)


@pytest.mark.parametrize(
    ("dtype", "kind", "width"),
    [
        ("float16", "float16", 32),
        ("int8", "int8", 32),
        ("uint8", "uint8", 32),
        ("binary", "int8", 4),
        ("ubinary", "uint8", 4),
    ],
)
def test_number_types(client: TestClient, dtype: str, kind: str, width: int) -> None:
    raw = client.post(
        "/v1/embeddings",
        json={"input": TEXTS, "model": "full", "output_dtype": dtype},
        headers={"accept": "application/octet-stream"},
    )
    assert (raw.headers["x-dtype"], raw.headers["x-shape"]) == (kind, f"4,{width}")
    assert len(raw.content) == 4 * width * np.dtype(kind).itemsize


def test_tei_gives_a_bare_list_by_the_first_model_or_the_named_one(
    client: TestClient, full: LocalModel, compressed: LocalModel
) -> None:
    found = client.post("/embed", json={"inputs": TEXTS, "prompt_name": "query"}).json()
    np.testing.assert_allclose(found, offline(full, TEXTS, "query"), atol=1e-5)
    named = client.post("/embed?model=compressed", json={"inputs": TEXTS[0]}).json()
    np.testing.assert_allclose(named, offline(compressed, TEXTS[:1]), atol=1e-5)
    pooled = np.array(client.post("/embed", json={"inputs": TEXTS, "normalize": False}).json())
    assert not np.allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-2)
    long = client.post("/embed", json={"inputs": "the cat " * 60})
    assert (long.status_code, long.json()["error"]["code"]) == (422, "invalid")
    assert client.post("/embed", json={"inputs": "the cat " * 60, "truncate": True}).status_code == 200


def test_similarity_is_the_cosine_of_each_pair(client: TestClient, full: LocalModel) -> None:
    vectors = offline(full, TEXTS)
    square = client.post("/v1/similarity", json={"model": "full", "input": TEXTS}).json()["data"]
    np.testing.assert_allclose(square, vectors @ vectors.T, atol=1e-5)
    body = {"model": "full", "input": TEXTS[:1], "other": TEXTS[1:]}
    row = client.post("/v1/similarity", json=body).json()["data"]
    np.testing.assert_allclose(row, vectors[:1] @ vectors[1:].T, atol=1e-5)


def test_models_say_what_they_are(client: TestClient, full: LocalModel) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(models) == ["full", "compressed"]
    assert models["full"]["embedding_dim"] == 32
    assert models["full"]["max_tokens"] == 64
    assert models["full"]["num_parameters"] == full.server.encoder.num_parameters
    assert models["full"]["fingerprint"] == full.server.fingerprint != models["compressed"]["fingerprint"]
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"input": []}, 422, "input"),
        ({"input": ""}, 422, "input.0: is empty"),
        ({"input": ["a", " "]}, 422, "input.1: is empty"),
        ({"input": [[]]}, 422, "input.0: is empty"),
        ({"input": "a" * 2001}, 413, "2001 characters"),
        ({"input": ["a" * 1999] * 11}, 413, "21989 characters"),
        ({"input": "a" * 1_000_000}, 413, "body: expected at most 300000 bytes"),
        ({"input": ["a"] * 65}, 413, "65 texts"),
        ({"input": [10_000_000]}, 422, "token id 10000000"),
        ({"input": [[1] * 65]}, 422, "65 token ids"),
        ({"input": [2**70]}, 422, "input"),
        ({"model": "gpt"}, 404, "expected one of full, compressed"),
        ({"fallback": "gpt"}, 404, "'gpt'"),
        ({"dimensions": 8}, 422, "dimensions: 8"),
        ({"dimensions": 10**9}, 422, "dimensions: 1000000000"),
        ({"dimensions": "NaN"}, 422, "dimensions"),
        ({"output_dtype": "float8"}, 422, "output_dtype"),
        ({"model": "compressed", "output_dtype": "int8"}, 422, "without calibration"),
        ({"wrong": 1}, 422, "wrong"),
    ],
)
def test_bad_requests_get_typed_errors(client: TestClient, values: dict[str, Any], status: int, said: str) -> None:
    answer = post(client, **values)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b'{"input": NaN, "model": "full"}', {}, 422),
        (b'{"model": "full", "input": [' + b"1.5," * 60_000 + b"1]}", {}, 422),
        (b'{"input": "\\ud800", "model": "full"}', {}, 400),
        (b'{"input": "\xff", "model": "full"}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"[]", {}, 422),
        (b"{}", {"content-type": "text/plain"}, 415),
        (gzip.compress(b"0" * 10_000_000), {"content-encoding": "gzip"}, 415),
        (b"x" * 300_001, {}, 413),
        (b'{"input": "a", "model": "full"}', {"origin": "https://elsewhere.example"}, 403),
    ],
)
def test_bad_bodies_get_typed_errors(client: TestClient, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert 0 < len(answer.json()["error"]["message"]) < 1000


def test_a_body_that_does_not_say_its_length_is_cut_off(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 10_000

    answer = client.post("/v1/embeddings", content=endless(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_on_request_a_bad_text_gets_an_error_in_its_place(client: TestClient, full: LocalModel) -> None:
    data = post(client, input=["a cat", "", "x" * 2001, "the house"], item_errors=True).json()["data"]
    assert [row["object"] for row in data] == ["embedding", "error", "error", "embedding"]
    assert data[1]["error"]["code"] == "empty"
    np.testing.assert_allclose(data[3]["embedding"], offline(full, ["the house"])[0], atol=1e-5)
    assert post(client, input=["", ""], item_errors=True).status_code == 422


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(client: TestClient) -> None:
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/embeddings").status_code == 405


def test_a_matrix_of_too_many_similarities_is_refused(full: LocalModel, compressed: LocalModel) -> None:
    limits = LIMITS.model_copy(update={"max_similarities": 15})
    with TestClient(application(full, compressed, limits=limits)) as client:
        answer = client.post("/v1/similarity", json={"model": "full", "input": TEXTS})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many")


def test_keys_are_asked_for_and_quotas_kept(full: LocalModel, compressed: LocalModel) -> None:
    keys = [
        Key(name="alice", sha256=hash_key("emb-alice"), requests_per_minute=100),
        Key(name="bob", sha256=hash_key("emb-bob"), tokens_per_minute=10),
    ]
    with TestClient(application(full, compressed, keys)) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "emb-alice"}):
            answer = client.post("/v1/embeddings", json={"input": "a", "model": "full"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
        client.headers["authorization"] = "Bearer emb-bob"
        assert post(client).status_code == 200  # more than ten tokens: the debt is paid by waiting
        answer = post(client)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) > 0
        client.headers["authorization"] = "Bearer emb-alice"
        assert post(client).status_code == 200


class Overloaded:
    """A model over its limit."""

    async def embed(self, call: Call) -> Refusal:
        return Refusal("overloaded", "9 tokens are waiting; try again in 3 s", retry_after_s=3)

    async def collect(self) -> dict[str, Any]:
        return {}


def test_a_declared_fallback_answers_for_a_model_over_its_limit(compressed: LocalModel) -> None:
    with TestClient(application(Overloaded(), compressed)) as client:  # type: ignore[arg-type]
        refused = post(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
        answer = post(client, fallback="compressed")
        assert answer.json()["model"] == answer.headers["x-model"] == "compressed"
        np.testing.assert_allclose(vectors_of(answer.json()), offline(compressed, TEXTS), atol=1e-5)
        assert b'embedlib_fallbacks_total{deployment="gateway",model="compressed",replica="a"} 1.0' in (
            client.get("/metrics").content
        )


class Slow:
    """A model that never answers."""

    async def embed(self, call: Call) -> Refusal:
        await asyncio.sleep(60)
        raise AssertionError


def test_a_model_that_takes_too_long_is_given_up(compressed: LocalModel) -> None:
    limits = LIMITS.model_copy(update={"timeout_s": 0.05})
    with TestClient(application(Slow(), compressed, limits=limits)) as client:  # type: ignore[arg-type]
        answer = post(client)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "server_error")
        assert answer.headers["retry-after"] == "1"
        assert client.get("/ready").status_code == 503  # it does not say what it is, either


def test_a_gateway_with_its_hands_full_turns_requests_away_unread(full: LocalModel, compressed: LocalModel) -> None:
    app = application(full, compressed, limits=LimitsConfig(min_under_way=1, max_under_way=1))
    with TestClient(app) as client:
        assert post(client).status_code == 200
        door: Any = app.middleware_stack
        while not hasattr(door, "pressure"):
            door = door.app
        door.pressure.under_way = 1
        answer = post(client)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_a_gateway_holds_fewer_requests_while_answers_are_slow() -> None:
    pressure = Pressure(least=10, most=60, patience_s=0.5)
    now = pressure.since
    assert pressure.limit == 20
    for second in range(1, 5):
        pressure.count_answer(seconds=3.0, now=now + second)
    assert pressure.limit == 10
    pressure.count_answer(seconds=0.1, now=now + 6)
    assert pressure.limit == 10  # nobody was turned away
    for second in range(7, 30):
        pressure.under_way = pressure.limit
        assert not pressure.admits()
        pressure.count_answer(seconds=0.1, now=now + second)
    assert pressure.limit == 60
    assert not pressure.admits()
    pressure.under_way -= 1
    assert pressure.admits()


def test_metrics_tell_what_the_issue_asks_for(client: TestClient) -> None:
    for _ in range(10):
        post(client, model="compressed")
    found = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert {
        "embedlib_tokens",
        "embedlib_batch_fill",
        "embedlib_queue_age_seconds",
        "embedlib_padding_waste",
        "embedlib_latency_seconds",
        "embedlib_requests",
        "embedlib_drift_cosine",
        "embedlib_drift_spearman",
    } <= set(found)
    tokens = {sample.labels["deployment"]: sample.value for sample in found["embedlib_tokens"].samples}
    assert tokens["compressed"] > 0
    counted = next(s for s in found["embedlib_drift_cosine"].samples if s.name.endswith("_count"))
    assert counted.value >= 8  # the last ones may still be under way


def test_logs_hold_no_text(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ray.serve.embedlib")
    log.addHandler(caplog.handler)  # Ray's own loggers tell nobody above them
    try:
        with caplog.at_level("INFO", logger=log.name):
            post(client, input="a secret sentence")
    finally:
        log.removeHandler(caplog.handler)
    assert "/v1/embeddings 200" in caplog.text
    assert "secret" not in caplog.text


def test_the_page_and_the_documents_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/static/page.js").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/embed", "/v1/similarity", "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)
    assert json.dumps(paths)
