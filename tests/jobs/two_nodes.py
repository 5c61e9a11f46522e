"""Run a job on a cluster of two nodes and SIGKILL the raylet of the one that is not its head.

    python -m tests.jobs.two_nodes embed|mine PARTS '{"output": …, "model": …}'

waits for that many part files before it kills.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from jobs.embed import EmbedConfig, embed
from jobs.mine import MineConfig, mine
from jobs.runtime import quiet, require_token
from tests.jobs.processes import wait_for

JOBS: dict[str, tuple[Any, Any]] = {"embed": (EmbedConfig, embed), "mine": (MineConfig, mine)}


def main() -> None:
    """Start the nodes, work, kill one of them meanwhile, and end with an error where it was not seen to go."""
    (config_type, run), moment = JOBS[sys.argv[1]], int(sys.argv[2])
    config = config_type.model_validate(json.loads(sys.argv[3]))
    require_token()
    quiet()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    victim = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, logging_level="WARNING")
    assert len(living_nodes()) == 2

    def kill() -> None:
        output = Path(config.output)
        wait_for(lambda: len(list(output.glob("part-*.parquet"))) >= moment, f"part {moment}")
        os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    run(config)
    killer.join()
    wait_for(lambda: len(living_nodes()) == 1, "the cluster's notice of its loss")
    ray.shutdown()
    cluster.shutdown()


def living_nodes() -> list[str]:
    """The nodes that the cluster believes to be there."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


if __name__ == "__main__":
    main()
