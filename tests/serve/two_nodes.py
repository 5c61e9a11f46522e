"""Serve a model on two nodes and SIGKILL the raylet of the one that is not the head while clients ask.

    python -m tests.serve.two_nodes MODEL SECONDS

prints how many requests were asked, and how many were refused once and more than once.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import torch
from ray import serve
from ray.cluster_utils import Cluster

from embedlib.artifact import model_fingerprint
from embedlib.backends import load_encoder
from jobs.runtime import quiet, require_token
from serve.app import build_app
from tests.jobs.processes import wait_for
from tests.serve.client import Client

CLIENTS = 8


def main() -> None:
    """Start the nodes and the service, ask, kill, and say what became of the requests."""
    model, seconds = Path(sys.argv[1]), float(sys.argv[2])
    require_token()
    quiet()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    victim = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, logging_level="WARNING", log_to_driver=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    # Four replicas of one CPU each fill both nodes; those that are lost have no room left.
    replica = {"path": str(model), "backend": "torch-float32", "num_threads": 1, "batching": {"max_wait_s": 60}}
    batches = {"directory": str(Path("batches").absolute())}
    serve.run(build_app({"models": {"full": replica | {"min_replicas": 4, "max_replicas": 4}}, "batches": batches}))
    encoder = load_encoder(model, "torch-float32", torch.device("cpu"), Path())
    clients = [Client(f"http://127.0.0.1:{port}", {model_fingerprint(model): encoder}) for _ in range(CLIENTS)]
    end = time.monotonic() + seconds

    def ask(client: Client) -> list[int]:
        refusals = []
        while time.monotonic() < end:
            before = client.refused
            client.ask(f"text {len(refusals)}")
            refusals.append(client.refused - before)
        return refusals

    with ThreadPoolExecutor(CLIENTS) as threads:
        asked = [threads.submit(ask, client) for client in clients]
        time.sleep(seconds / 3)
        os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        refusals = [count for answers in asked for count in answers.result()]
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, "the cluster's notice of its loss")
    counts = {"asked": len(refusals), "once": refusals.count(1), "more": sum(count > 1 for count in refusals)}
    print(json.dumps(counts), flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
