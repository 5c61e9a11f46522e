"""Files of requests: in, checked at the door; out, in OpenAI's shape; all of it on a cluster, as `make serve` does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from openai import OpenAI

from embedlib.backends import load_encoder
from embedlib.schemas import QUARANTINE, embeddings_schema
from serve.batches import Form, answers, failures, request_counts, write_rows
from serve.door import ApiError

ROOT = Path(__file__).resolve().parents[2]
FORM = Form("full", None, "float", "float", None)


def line(custom_id: str, texts: Any, **values: Any) -> str:
    body = {"model": "full", "input": texts} | values
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body})


def test_requests_become_rows_and_bad_lines_errors(tmp_path: Path) -> None:
    lines = [
        line("a", "one"),
        "{",
        line("b", ["two", "three"]),
        "",
        line("c", [1, 2]),
        line("d", "four", model="compressed"),
        line("e", "five", output_dtype="int8"),
        line("f", "six", wrong=1),
        json.dumps({"custom_id": "g", "url": "/v1/chat/completions", "body": {}}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "batch").mkdir()
    form, counts = write_rows(tmp_path / "in.jsonl", tmp_path / "batch")
    assert form == FORM
    assert counts == {"total": 8, "texts": 3, "failed": 6}
    assert pq.read_table(tmp_path / "batch" / "rows.parquet").to_pylist() == [
        {"text": "one", "custom_id": "a", "request": 0, "texts": 1},
        {"text": "two", "custom_id": "b", "request": 2, "texts": 2},
        {"text": "three", "custom_id": "b", "request": 2, "texts": 2},
    ]
    errors = [json.loads(row) for row in (tmp_path / "batch" / "errors.jsonl").read_text().splitlines()]
    assert [error["custom_id"] for error in errors] == [f"line {number}" for number in (1, 4, 5, 6, 7, 8)]
    for error, said in zip(errors, ("line 1", "token ids", "compressed", "int8", "wrong", "url"), strict=True):
        assert said in error["error"]["message"] or said in error["custom_id"]


def test_a_file_without_a_request_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xff\xfe\n[]\n")
    (tmp_path / "batch").mkdir()
    with pytest.raises(ApiError, match="none of its 2 lines is a request"):
        write_rows(tmp_path / "in.jsonl", tmp_path / "batch")


def test_vectors_become_answers_and_lost_texts_errors(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join([line("a", "one"), line("b", ["two", " "]), line("c", "three"), "{"]))
    (tmp_path / "batch").mkdir()
    _, counts = write_rows(tmp_path / "in.jsonl", tmp_path / "batch")
    vectors = np.eye(4, dtype=np.float32)
    rows = pq.read_table(tmp_path / "batch" / "rows.parquet", columns=["custom_id", "request", "texts"])
    table = pa.table(
        {
            "id": pa.array(range(4)),
            **{name: rows[name] for name in rows.column_names},
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4),
        }
    ).take([0, 1, 3])
    (tmp_path / "batch" / "vectors" / "quarantine").mkdir(parents=True)
    pq.write_table(table, tmp_path / "batch" / "vectors" / "part-000000.parquet")
    lost = [{"source": "rows.parquet", "row": 2, "reason": "empty text", "excerpt": ""}]
    pq.write_table(
        pa.Table.from_pylist(lost, QUARANTINE), tmp_path / "batch" / "vectors" / "quarantine" / "part-000000.parquet"
    )
    assert request_counts(tmp_path / "batch", counts, completed=True) == {"total": 4, "completed": 2, "failed": 2}
    found = list(answers(tmp_path / "batch", {"id": "batch-1", "form": FORM._asdict()}))
    assert [answer["custom_id"] for answer in found] == ["a", "c"]
    assert found[1]["response"]["body"]["data"][0]["embedding"] == [0, 0, 0, 1]
    assert [(row["custom_id"], row["error"]["message"]) for row in failures(tmp_path / "batch")][1] == (
        "b",
        "empty text",
    )


def test_rows_of_an_input_that_was_not_uploaded_are_answers_by_their_id(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    schema = embeddings_schema(2, pa.float32())
    rows = [{"id": 7, "vector": [1, 0]}, {"id": 9, "vector": [0, 1]}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "vectors" / "part-000000.parquet")
    found = list(answers(tmp_path, {"id": "batch-1", "form": FORM._asdict()}))
    assert [(row["custom_id"], row["response"]["body"]["data"][0]["embedding"]) for row in found] == [
        ("7", [1, 0]),
        ("9", [0, 1]),
    ]


@pytest.fixture(scope="module")
def url(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`cluster/local.sh serve run`, as `make serve` has it, with a tiny model on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("serve")
    model = {"path": str(tiny_encoder), "backend": "torch-float32", "num_threads": 1}
    args = {"models": {"full": model}, "gateways": 1, "batches": {"inputs": [f"{home}/"]}}
    app = {"name": "embedlib", "route_prefix": "/", "import_path": "serve.app:build_app", "args": args}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}
    (home / "token").write_text(token_hex(32))
    (home / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "EMBEDLIB_ARTIFACTS": str(home / "artifacts"),
    }
    environment.pop("RAY_ADDRESS", None)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [ROOT / "cluster" / "local.sh", "serve", "run", str(home / "serve.yaml")],
            cwd=home,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not is_ready(f"http://127.0.0.1:{port}"):
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
            process.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def finished(client: OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 120
    while (batch := client.batches.retrieve(batch_id)).status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline, batch
        time.sleep(1)
    return batch


@pytest.mark.ray
def test_the_openai_client_runs_a_batch_on_the_cluster(
    url: str, tiny_encoder: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="-")
    lines = [line(f"row-{number}", text) for number, text in enumerate(tiny_texts)]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join([*lines, "not a request"]))
    with path.open("rb") as content:
        file = client.files.create(file=content, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    batch = finished(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts.total == len(lines) + 1
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(lines), 1)
    found = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in found] == [f"row-{number}" for number in range(len(lines))]
    vectors = np.array([row["response"]["body"]["data"][0]["embedding"] for row in found])
    encoder = load_encoder(tiny_encoder, "torch-float32", torch.device("cpu"), Path())
    np.testing.assert_allclose(vectors, encoder.encode(tiny_texts), atol=1e-5)
    errors = [json.loads(row) for row in client.files.content(batch.error_file_id).text.splitlines()]
    assert len(errors) == 1
    assert batch.id in [known.id for known in client.batches.list()]


@pytest.mark.ray
def test_a_batch_reads_only_what_the_service_was_told_it_may(url: str) -> None:
    refused = httpx2.post(f"{url}/v1/batches", json={"input": "/etc/passwd", "model": "full"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "input_not_allowed")
    assert httpx2.get(f"{url}/v1/files/..%2F..%2Fserve/content").status_code == 404
    assert httpx2.get(f"{url}/v1/batches/nothing").status_code == 404
