"""The API over real tiny models in this process: no Ray, no port."""

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Metric

from serve.api import ERRORS, Api, LimitsConfig, build_api
from serve.auth import Key
from serve.batcher import Batcher
from serve.batches import BatchConfig, Batches
from serve.calls import Answer, Call, Description, Refusal
from serve.drift import DriftConfig
from serve.metrics import GatewayMetrics
from serve.model import ModelConfig, ModelServer

LIMITS = LimitsConfig(
    max_body_bytes=300_000, max_texts=64, max_characters=2000, max_request_characters=20_000, timeout_s=5
)


class LocalModel:
    """A model server in the loop of whoever calls it first."""

    def __init__(self, config: ModelConfig) -> None:
        self.server = ModelServer.load(config, torch.device("cpu"))
        self.running: asyncio.Task[None] | None = None

    async def embed(self, call: Call) -> Answer | Refusal:
        if self.running is None or self.running.get_loop() is not asyncio.get_running_loop():
            # A test has a loop of its own, and what waits belongs to a loop.
            self.server.batcher = Batcher(self.server._forward, self.server.config.batching, self.server._on_batch)
            self.running = asyncio.create_task(self.server.run())
        return await self.server.embed(call)

    async def describe(self) -> Description:
        return self.server.describe()

    async def collect(self) -> dict[str, list[Metric]]:
        return {"a": self.server.collect()}


@pytest.fixture(scope="session")
def sample_file(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.txt"
    path.write_text("\n".join(tiny_texts))
    return path


@pytest.fixture(scope="session")
def full(tiny_encoder: Path, sample_file: Path) -> LocalModel:
    return LocalModel(ModelConfig(path=str(tiny_encoder), backend="torch-float32", sample=str(sample_file)))


@pytest.fixture(scope="session")
def compressed(tiny_xlmr: Path) -> LocalModel:
    return LocalModel(ModelConfig(path=str(tiny_xlmr), backend="torch-float32"))


def application(
    full: LocalModel, compressed: LocalModel, keys: Sequence[Key] = (), limits: LimitsConfig = LIMITS
) -> FastAPI:
    metrics = GatewayMetrics(CollectorRegistry())

    async def all_gateways() -> dict[str, list[Metric]]:
        return {"a": metrics.collect()}

    models = {"full": full, "compressed": compressed}
    api = Api(models, limits, keys, DriftConfig(share=1.0), metrics, all_gateways)
    batches = Batches(BatchConfig(directory=Path(tempfile.mkdtemp())), {}, api.describe)
    return build_api(api, [batches.router(api.authorise, ERRORS)], max_upload_bytes=100_000)


@pytest.fixture
def client(full: LocalModel, compressed: LocalModel) -> Iterator[TestClient]:
    with TestClient(application(full, compressed), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def served_url(tiny_encoder: Path, tiny_xlmr: Path, sample_file: Path) -> Iterator[str]:
    """The address of a real server of the API in a thread of this process, with models of its own."""
    app = application(
        LocalModel(ModelConfig(path=str(tiny_encoder), backend="torch-float32", sample=str(sample_file))),
        LocalModel(ModelConfig(path=str(tiny_xlmr), backend="torch-float32")),
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
