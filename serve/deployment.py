"""A model as a deployment of Ray Serve, autoscaled on the tokens that wait."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import Metric
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from embedlib.threads import MAX_THREADS, use_cores
from serve.autoscaling import BUSY, QUEUED_TOKENS, QueuedTokens
from serve.calls import Answer, Call, Description, Refusal
from serve.model import ModelConfig, ModelServer

# Who waits is up to the batcher, which knows of tokens; Ray's own queues see to it that they never decide.
MAX_ONGOING_REQUESTS = 10_000
HEALTH_CHECK_S = 2.0
METRICS_S = 1.0
DRAIN_S = 60.0
FAILED = Refusal("failed", "an error of the service; the log of its replica has it")
log = logging.getLogger("ray.serve.embedlib")


class ModelReplica:
    """Ray Serve replica: one model server."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc] # as Ray Serve has it
        self.config = ModelConfig.model_validate(config)
        use_cores(num_threads(self.config))
        device = "cuda" if self.config.num_gpus else "cpu"
        self.server = await asyncio.to_thread(ModelServer.load, self.config, device)
        self.running = asyncio.create_task(self.server.run())
        self.reported = time.monotonic(), 0.0

    async def embed(self, calls: Sequence[Call]) -> list[Answer | Refusal]:
        """Vectors of each call, or why there are none."""
        found = await asyncio.gather(*map(self.server.embed, calls), return_exceptions=True)
        for answer in found:
            if isinstance(answer, BaseException):
                log.error("a call failed", exc_info=answer)
        return [FAILED if isinstance(answer, BaseException) else answer for answer in found]

    async def describe(self) -> Description:
        """What the model is."""
        return self.server.describe()

    async def collect(self) -> tuple[str, list[Metric]]:
        """The name of this replica and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.server.collect()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the autoscaling policy."""
        now, busy_s = time.monotonic(), self.server.batcher.busy_s
        busy = (busy_s - self.reported[1]) / max(now - self.reported[0], 1e-9)
        self.reported = now, busy_s
        return {QUEUED_TOKENS: float(self.server.batcher.queued_tokens), BUSY: min(busy, 1.0)}

    async def check_health(self) -> None:
        """Raise where this replica cannot serve any more, so that Ray Serve starts another in its place."""
        if self.server.is_stuck:
            raise RuntimeError(f"a batch has been with the model for {self.server.batcher.stuck_s:.0f} s")
        if self.running.done():
            raise RuntimeError("the batcher has ended")


def num_threads(config: ModelConfig) -> int:
    """Cores of a replica."""
    return config.num_threads or min(os.cpu_count() or 1, MAX_THREADS)


def model_deployment(name: str, config: ModelConfig) -> serve.Application:
    """The deployment of a model under its name."""
    deployment = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_S,
        logging_config={"enable_access_log": False},  # the gateway logs requests
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,  # the new version is there before the old one goes
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            metrics_interval_s=METRICS_S,
            look_back_period_s=max(2 * METRICS_S, config.upscale_delay_s),
            policy=AutoscalingPolicy(
                policy_function=QueuedTokens, policy_kwargs={"target_tokens": config.target_tokens}
            ),
        ),
    )
    return deployment(ModelReplica).bind(config.model_dump())
