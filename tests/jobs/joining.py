"""Train on a cluster of one node that another joins meanwhile: `python -m tests.jobs.joining '{"output": …}'`."""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import sys
import threading
from functools import partial
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig

from jobs.runtime import quiet, require_token
from jobs.train import TrainConfig, train
from tests.jobs.processes import wait_for


def main() -> None:
    """Start one node, train, and add another after the first steps; Ray Train looks for it every second."""
    config = TrainConfig.model_validate_json(sys.argv[1])
    require_token()
    quiet()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(cluster.address, logging_level="WARNING")

    with patch("jobs.trainer.ScalingConfig", partial(ScalingConfig, elastic_resize_monitor_interval_s=1)):
        # Ray starts nodes from the main thread alone.
        training = threading.Thread(target=train, args=(config,))
        training.start()
        logs = partial(config.output.glob, "training/*/log/samples-*.jsonl")
        wait_for(lambda: any(path.stat().st_size for path in logs()), "a step")
        cluster.add_node(num_cpus=1)
        training.join()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
