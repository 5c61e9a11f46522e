"""The ingress as a deployment of Ray Serve: the HTTP API over the handles of the deployed models."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Metric
from pydantic import Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from embedlib.config import Config
from serve.api import ERRORS, Api, LimitsConfig, build_api
from serve.auth import Key, read_keys
from serve.batches import BatchConfig, Batches
from serve.calls import Answer, Call, Description, Refusal
from serve.drift import DriftConfig
from serve.grouping import Grouped
from serve.metrics import GatewayMetrics

NAME = "gateway"
# What a crashed replica leaves unanswered is computed once more elsewhere: the same text gives the same vector.
ATTEMPTS = 3
ASK_S = 2.0
LOST = Refusal("overloaded", "no replica could answer; try again in 1 s", retry_after_s=1)


class GatewayConfig(Config):
    """What clients may do."""

    keys: Path | None = None
    """JSON file of keys, as `python -m serve.auth` makes it; none: anyone who reaches the port."""
    limits: LimitsConfig = LimitsConfig()
    """What a request may hold."""
    drift: DriftConfig = DriftConfig()
    """Which traffic is computed a second time, by another model."""
    batches: BatchConfig = BatchConfig()
    """Offline batches."""
    gateways: int = Field(default=2, ge=1)
    """Processes that hold the API, so that one may fail. Each grants its part of a client's quota."""


class Gateway:
    """Ray Serve replica: routes over models elsewhere."""

    def __init__(
        self,
        config: dict[str, Any],
        models: Mapping[str, DeploymentHandle[Any]],
        paths: Mapping[str, str],
        sleepers: list[str],
    ) -> None:
        """`paths` tells where each model lies; `sleepers` may have no replica."""
        self.config = GatewayConfig.model_validate(config)
        keys = [
            share_of(key, self.config.gateways) for key in (read_keys(self.config.keys) if self.config.keys else [])
        ]
        self.metrics = GatewayMetrics(CollectorRegistry())
        self.api = Api(
            {name: RemoteModel(handle) for name, handle in models.items()},
            self.config.limits,
            keys,
            self.config.drift,
            self.metrics,
            self.collect_all,
            frozenset(sleepers),
        )
        self.batches = Batches(self.config.batches, paths, self.api.describe)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(
            self.api, [self.batches.router(self.api.authorise, ERRORS)], self.config.batches.max_upload_bytes
        )

    async def collect(self) -> tuple[str, list[Metric]]:
        """The name of this gateway and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.metrics.collect()

    async def collect_all(self) -> dict[str, list[Metric]]:
        """The metrics of all gateways."""
        application = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle(NAME, app_name=application)
        return dict(await asked(handle, "collect"))


def gateway_deployment(
    config: GatewayConfig, models: Mapping[str, serve.Application], paths: Mapping[str, str], sleepers: list[str]
) -> serve.Application:
    """The ingress before these models."""
    deployment = serve.deployment(
        name=NAME,
        num_replicas=config.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * config.limits.max_under_way,
        graceful_shutdown_timeout_s=config.limits.timeout_s + 5,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,  # the new version is there before the old one goes
        health_check_period_s=2.0,
        logging_config={"enable_access_log": False},  # the door has a log of its own
    )
    return deployment(serve.ingress()(Gateway)).bind(config.model_dump(mode="json"), models, paths, sleepers)


def share_of(key: Key, gateways: int) -> Key:
    """A key whose quota is what one of the gateways grants, as each counts for itself."""
    limits = {
        name: -(-limit // gateways)
        for name in ("requests_per_minute", "tokens_per_minute")
        if (limit := getattr(key, name))
    }
    return key.model_copy(update=limits)


class RemoteModel:
    """A deployed model, called through its handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self.grouped = Grouped(self.ask)

    async def embed(self, call: Call) -> Answer | Refusal:
        """Vectors, or why there are none."""
        return await self.grouped.embed(call)

    async def ask(self, calls: Sequence[Call]) -> Sequence[Answer | Refusal]:
        """What a replica answers to some calls; one that dies over them is replaced by another."""
        for _ in range(ATTEMPTS):
            response = self.handle.embed.remote(calls)
            try:
                answers: Sequence[Answer | Refusal] = await response
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call] # whoever asked has gone: the replica need not compute it
                raise
            except RayTaskError:  # the replica's own error
                raise
            except (RayError, ReplicaUnavailableError):  # it died, or its node did
                continue
            except (BackPressureError, DeploymentUnavailableError):
                break
            return answers
        return [LOST] * len(calls)

    async def describe(self) -> Description | None:
        """What the model is; none where it has no replica, and none is woken for it."""
        return next(iter(await asked(self.handle, "describe")), None)

    async def collect(self) -> dict[str, list[Metric]]:
        """The metrics of each of its replicas."""
        return dict(await asked(self.handle, "collect"))


async def asked(handle: DeploymentHandle[Any], method: str) -> list[Any]:
    """What every replica answers that does so in time."""
    try:
        found = await handle.broadcast(method).results_async(timeout_s=ASK_S, return_exceptions=True)
    except (RayServeException, RayError, TimeoutError):
        return []
    return [answer for answer in found if not isinstance(answer, BaseException)]
