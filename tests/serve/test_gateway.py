"""The application on Ray Serve: over HTTP, through the clients that people use."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import yaml
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from embedlib.artifact import model_fingerprint
from embedlib.backends import load_encoder
from embedlib.encoder import Encoder
from tests.jobs.processes import ray_processes, wait_for
from tests.serve.client import Client

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def deploy(tiny_xlmr: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Deploys a model as `full`, in place of what is there."""
    from ray import serve

    from serve.app import build_app

    batches = {"directory": str(tmp_path_factory.mktemp("batches"))}
    patient = {"max_wait_s": 60}  # on a machine where other tests run, too
    replica = {"backend": "torch-float32", "num_cpus": 0.1, "num_threads": 1, "batching": patient}
    compressed = replica | {"path": str(tiny_xlmr), "min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 5}

    def deploy(full: Path) -> None:
        models = {"full": replica | {"path": str(full)}, "compressed": compressed}
        limits = {"min_under_way": 1000}
        serve.run(build_app({"models": models, "batches": batches, "limits": limits}), name="embedlib")

    return deploy


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_encoder: Path, deploy: Callable[[Path], None]) -> Iterator[str]:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deploy(tiny_encoder)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return load_encoder(tiny_encoder, "torch-float32", torch.device("cpu"), Path())


def test_the_openai_client_gets_the_vectors_of_offline_embedding(
    url: str, encoder: Encoder, tiny_texts: list[str]
) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none is asked for", max_retries=0)
    expected = encoder.encode(tiny_texts[:8])
    for form in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="full", input=tiny_texts[:8], **form)
        np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=1e-5)
    assert {model.id for model in client.models.list()} == {"full", "compressed"}
    with pytest.raises(NotFoundError, match="expected one of full, compressed"):
        client.embeddings.create(model="gpt", input="a")


def test_64_at_once_of_mixed_lengths_each_get_their_own(url: str, encoder: Encoder, tiny_texts: list[str]) -> None:
    chance = np.random.default_rng(0)
    requests = [
        [" ".join(chance.choice(tiny_texts, chance.integers(1, 6))) for _ in range(chance.integers(1, 9))]
        for _ in range(256)
    ]
    with httpx2.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(64) as threads:

        def ask(texts: list[str]) -> Any:
            answer = client.post("/v1/embeddings", json={"model": "full", "input": texts})
            assert answer.status_code == 200, answer.text
            return [row["embedding"] for row in answer.json()["data"]]

        answers = list(threads.map(ask, requests))
    for texts, found in zip(requests, answers, strict=True):
        np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


def test_a_model_that_sleeps_wakes_for_the_first_request(url: str) -> None:
    answer = httpx2.post(f"{url}/v1/embeddings", json={"model": "compressed", "input": "the cat"}, timeout=90)
    assert answer.status_code == 200, answer.text
    assert httpx2.get(f"{url}/ready").status_code == 200


def replicas(deployment: str) -> list[int]:
    """The processes of a deployment."""
    return ray_processes(f"ServeReplica:embedlib:{deployment}")


@pytest.mark.parametrize("deployment", [pytest.param("full", marks=pytest.mark.slow), "gateway"])
def test_a_killed_process_costs_no_answer(
    url: str, deployment: str, tiny_encoder: Path, encoder: Encoder, tiny_texts: list[str]
) -> None:
    client = Client(url, {model_fingerprint(tiny_encoder): encoder})
    victim = min(replicas(deployment))
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.ask, text) for text in tiny_texts]
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        for answer in asked:
            answer.result()
    assert victim not in replicas(deployment)


@pytest.mark.slow
def test_a_new_version_of_a_model_costs_no_request(
    url: str,
    tiny_encoder: Path,
    tiny_xlmr: Path,
    encoder: Encoder,
    tiny_texts: list[str],
    deploy: Callable[[Path], None],
) -> None:
    old, new = model_fingerprint(tiny_encoder), model_fingerprint(tiny_xlmr)
    client = Client(url, {old: encoder, new: load_encoder(tiny_xlmr, "torch-float32", torch.device("cpu"), Path())})
    with ThreadPoolExecutor(9) as threads:
        deployed = threads.submit(deploy, tiny_xlmr)
        answered = []
        while not deployed.done() or answered[-1] != new:
            answered += threads.map(client.ask, tiny_texts[:16])
    deployed.result()
    assert answered[0] == old
    assert client.refused == 0


def test_metrics_come_from_every_replica(url: str) -> None:
    def replicas_of(name: str) -> set[str]:
        families = text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
        return {sample.labels["replica"] for family in families if family.name == name for sample in family.samples}

    # A gateway that is beginning anew, as after another test, or is busy, is left out until it answers.
    wait_for(lambda: len(replicas_of("embedlib_request_seconds")) == 2, "both gateways")
    assert replicas_of("embedlib_tokens")


def test_the_configuration_for_clusters_is_one() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppConfig

    values = yaml.safe_load((Path(__file__).resolve().parents[2] / "cluster" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(values)
    assert schema.http_options.host == "127.0.0.1"
    assert list(AppConfig.model_validate(schema.applications[0].args).models) == ["full", "compressed"]
