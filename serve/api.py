"""OpenAI's embeddings and TEI's, similarity, models, health and metrics over HTTP, of models wherever they run."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from pydantic import Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from embedlib.config import Config
from embedlib.schemas import embeddings_schema, vector_column
from serve.auth import Key, Quota, QuotaError, client_of
from serve.calls import Answer, Call, Description, Model, Refusal
from serve.door import ApiError, Door, Pressure, read, takes
from serve.drift import Drift, DriftConfig
from serve.metrics import GatewayMetrics, exposition
from serve.schemas import (
    EmbeddingsRequest,
    ErrorBody,
    ErrorDetail,
    SimilarityRequest,
    TeiRequest,
    Text,
    VectorDtype,
    embeddings_body,
)

if TYPE_CHECKING:
    from embedlib.quantization import OutputDtype

STATIC = Path(__file__).parent / "static"
RAW, ARROW = "application/octet-stream", "application/vnd.apache.arrow.stream"
DTYPES: dict[VectorDtype, "OutputDtype"] = {
    "float": "float32",
    "float16": "float16",
    "int8": "int8",
    "uint8": "uint8",
    "binary": "binary",
    "ubinary": "ubinary",
}
STATUS_OF = {"invalid": 422, "too_large": 413, "overloaded": 503, "failed": 500}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 415, 422, 429, 503, 504)
}
# How long a model may take to say what it is before it counts as asleep or lost.
DESCRIBE_S = 2.0
# Only files of this service, so that no text of a client can become a script.
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"


class LimitsConfig(Config):
    """What a request may hold. Everything is checked before a text is tokenised."""

    max_body_bytes: int = Field(default=16_000_000, ge=1)
    """Bytes of a body."""
    max_texts: int = Field(default=2048, ge=1)
    """Texts of a request."""
    max_characters: int = Field(default=100_000, ge=1)
    """Characters of a text."""
    max_request_characters: int = Field(default=2_000_000, ge=1)
    """Characters of all texts together."""
    max_similarities: int = Field(default=262_144, ge=1)
    """Numbers of an answer to `/v1/similarity`."""
    min_under_way: int = Field(default=24, ge=1)
    """Requests that a gateway holds at once at least."""
    max_under_way: int = Field(default=2000, ge=1)
    """And at most; in between, as many as keep answers within `patience_s`. More are turned away unread."""
    patience_s: float = Field(default=0.5, gt=0)
    """How long answers may take on average before fewer requests are let in."""
    timeout_s: float = Field(default=30.0, gt=0)
    """How long a request may wait for its vectors."""


class Served(NamedTuple):
    """An answer and the name of the model that gave it."""

    model: str
    answer: Answer


class Api:
    """The routes and what they share."""

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: LimitsConfig,
        keys: Sequence[Key],
        drift: DriftConfig,
        metrics: GatewayMetrics,
        all_gateways: Callable[[], Awaitable[dict[str, list[Metric]]]],
        sleepers: frozenset[str] = frozenset(),
    ) -> None:
        """The first model answers where none is named; `sleepers` may have no replica."""
        self.models, self.limits, self.keys, self.metrics = models, limits, keys, metrics
        self.quotas = {key.name: Quota.of(key, time.monotonic()) for key in keys}
        self.all_gateways, self.sleepers = all_gateways, sleepers
        self.drift_config, self.drift = drift, Drift(metrics)
        self.in_background: set[asyncio.Task[None]] = set()

    def router(self) -> APIRouter:
        """The routes that need a key, where there are keys."""
        router = APIRouter(dependencies=[Depends(self.authorise)], responses=ERRORS)
        for path, route, body in (
            ("/v1/embeddings", self.embeddings, EmbeddingsRequest),
            ("/embed", self.embed, TeiRequest),
            ("/v1/similarity", self.similarity, SimilarityRequest),
        ):
            router.add_api_route(path, route, methods=["POST"], openapi_extra=takes(body))
        router.add_api_route("/v1/models", self.list_models, methods=["GET"])
        router.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        return router

    def open_router(self) -> APIRouter:
        """The routes for everybody."""
        router = APIRouter()
        router.add_api_route("/", page, methods=["GET"], include_in_schema=False)
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"], responses={503: {"model": ErrorBody}})
        return router

    async def authorise(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        """Note whose request this is, and that it is one of those that the client may make."""
        if not self.keys:
            return
        client = client_of(request.headers.get("authorization"), self.keys)
        if client is None:
            raise ApiError(401, "authorization: expected `Bearer` and a key that this service knows", "invalid_api_key")
        request.state.client = client
        try:
            self.quotas[client.name].take(0, time.monotonic())
        except QuotaError as error:
            raise ApiError(429, str(error), "quota_exceeded", retry_after_s=error.retry_after_s) from None

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts or token ids, as OpenAI's API has it; raw rows or an Arrow stream where `Accept` says so."""
        wanted = await read(request, EmbeddingsRequest)
        texts, errors = self.usable(wanted.texts, "input", wanted.item_errors)
        call = Call(
            texts, input_type=wanted.input_type, dimensions=wanted.dimensions, dtype=DTYPES[wanted.output_dtype]
        )
        model, answer = await self.answer(request, call, wanted.model, wanted.fallback)
        self.sample_drift(call, model, answer)
        headers = {"x-model": model, "x-fingerprint": answer.fingerprint, "x-tokens": str(answer.num_tokens)}
        accept = request.headers.get("accept", "")
        if RAW in accept or ARROW in accept:
            if errors:
                raise ApiError(422, "item_errors: an answer of raw rows has no room for them", "invalid", "item_errors")
            return rows(answer.vectors, headers, ARROW if ARROW in accept else RAW)
        body = embeddings_body(answer.vectors, model, answer.num_tokens, wanted.encoding_format, errors)
        return Response(body, headers=headers, media_type="application/json")

    async def embed(self, request: Request) -> Response:
        """Vectors of texts, as text-embeddings-inference has it, by the first model or that of `?model=`."""
        wanted = await read(request, TeiRequest)
        texts, _ = self.usable(wanted.texts, "inputs")
        call = Call(texts, prompt=wanted.prompt_name, normalise=wanted.normalize, truncate=wanted.truncate)
        _, answer = await self.answer(request, call, request.query_params.get("model", next(iter(self.models))))
        return Response(to_json(answer.vectors.tolist()), media_type="application/json")

    async def similarity(self, request: Request) -> Response:
        """Cosines of every text with every other."""
        wanted = await read(request, SimilarityRequest)
        split = len(wanted.input)
        if (cells := split * len(wanted.other or wanted.input)) > self.limits.max_similarities:
            message = f"input: {cells} similarities; expected at most {self.limits.max_similarities}"
            raise ApiError(413, message, "too_many", "input")
        texts, _ = self.usable([*wanted.input, *(wanted.other or [])], "input")
        call = Call(texts, input_type=wanted.input_type, normalise=True)
        model, answer = await self.answer(request, call, wanted.model)
        others = answer.vectors[split:] if wanted.other else answer.vectors
        cosines = (answer.vectors[:split] @ others.T).tolist()
        usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
        body = {"object": "similarity", "model": model, "data": cosines, "usage": usage, "seconds": answer.seconds}
        return Response(to_json(body), media_type="application/json")

    async def list_models(self) -> JSONResponse:
        """Every model with what it is; one that has no replica at the moment says so."""
        descriptions = await asyncio.gather(*map(self.describe, self.models))
        data = [
            {"id": name, "object": "model", "owned_by": "embedlib", "ready": description is not None}
            | (description._asdict() if description else {})
            for name, description in zip(self.models, descriptions, strict=True)
        ]
        return JSONResponse({"object": "list", "data": data})

    async def show_metrics(self) -> Response:
        """Everything counted by gateways and replicas, in Prometheus' text format."""
        found = await asyncio.gather(self.all_gateways(), *(model.collect() for model in self.models.values()))
        processes = dict(zip(["gateway", *self.models], found, strict=True))
        return Response(exposition(processes), media_type=CONTENT_TYPE_LATEST)

    async def health(self) -> JSONResponse:
        """That this process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> JSONResponse:
        """That every model that should be there is there."""
        awake = [name for name in self.models if name not in self.sleepers]
        descriptions = await asyncio.gather(*map(self.describe, awake))
        missing = [name for name, description in zip(awake, descriptions, strict=True) if description is None]
        if missing:
            raise ApiError(503, f"no replica of {', '.join(missing)} answers yet", "not_ready", retry_after_s=2)
        return JSONResponse({"status": "ready"})

    async def describe(self, name: str) -> Description | None:
        """What a model is; none where it does not say so in time."""
        try:
            async with asyncio.timeout(DESCRIBE_S):
                return await self.models[name].describe()
        except Exception:  # whatever it is: it did not answer
            return None

    def usable(
        self, texts: Sequence[Text], param: str, item_errors: bool = False
    ) -> tuple[list[Text], dict[int, ErrorDetail]]:
        """The texts that can be embedded, and what is wrong with the others; ApiError where that fails the request."""
        if len(texts) > self.limits.max_texts:
            raise ApiError(
                413, f"{param}: {len(texts)} texts; expected at most {self.limits.max_texts}", "too_many", param
            )
        if (total := sum(map(len, texts))) > self.limits.max_request_characters:
            raise ApiError(
                413,
                f"{param}: {total} characters; expected at most {self.limits.max_request_characters}",
                "too_long",
                param,
            )
        errors = {}
        for number, text in enumerate(texts):
            if not (text.strip() if isinstance(text, str) else text):
                errors[number] = ApiError(422, f"{param}.{number}: is empty; expected text", "empty", param)
            elif len(text) > self.limits.max_characters:
                message = f"{param}.{number}: {len(text)} characters; expected at most {self.limits.max_characters}"
                errors[number] = ApiError(413, message, "too_long", param)
        good = [text for number, text in enumerate(texts) if number not in errors]
        if errors and (not item_errors or not good):
            raise next(iter(errors.values()))
        return good, {
            number: ErrorDetail(message=error.message, type="invalid_request_error", param=param, code=error.code)
            for number, error in errors.items()
        }

    async def answer(self, request: Request, call: Call, name: str, fallback: str | None = None) -> Served:
        """The vectors of a call by the model `name`, or by `fallback` where that one is over its limit."""
        for wanted in (name, fallback):
            if wanted is not None and wanted not in self.models:
                raise ApiError(
                    404, f"model {wanted!r}: expected one of {', '.join(self.models)}", "model_not_found", "model"
                )
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                found = await self.models[name].embed(call)
                if isinstance(found, Refusal) and found.reason == "overloaded" and fallback:
                    self.metrics.fallbacks.labels(fallback).inc()
                    name, found = fallback, await self.models[fallback].embed(call)
        except TimeoutError:
            raise ApiError(504, f"no vectors within {self.limits.timeout_s} s", "timeout", retry_after_s=1) from None
        if isinstance(found, Refusal):
            raise ApiError(STATUS_OF[found.reason], found.message, found.reason, found.param, found.retry_after_s)
        if request.state.client and (tokens := self.quotas[request.state.client.name].tokens):
            tokens.take(found.num_tokens)
        return Served(name, found)

    def sample_drift(self, call: Call, model: str, answer: Answer) -> None:
        """Now and then, have the reference model embed one of the texts, too, once the client has its answer."""
        config = self.drift_config
        plain = call.dtype == "float32" and call.dimensions is None and isinstance(call.texts[0], str)
        there = config.reference in self.models and config.reference not in self.sleepers
        if model != config.model or not there or not plain:
            return
        if random.random() < config.share:
            number = random.randrange(len(call.texts))
            task = asyncio.create_task(
                self.compare(call._replace(texts=[call.texts[number]]), answer.vectors[number], config.reference)
            )
            self.in_background.add(task)
            task.add_done_callback(self.in_background.discard)

    async def compare(self, call: Call, vector: npt.NDArray[Any], reference: str) -> None:
        """Count how far a text's vector is from that of the reference model, if that one has time."""
        found = await self.models[reference].embed(call)
        if isinstance(found, Answer):
            self.drift.add(vector, found.vectors[0])


def build_api(api: Api, extra_routers: Sequence[APIRouter] = (), max_upload_bytes: int = 0) -> FastAPI:
    """The ASGI application; uploads may be longer than other bodies."""
    app = FastAPI(title="embedlib", version=version("embedlib"), description=__doc__)
    app.include_router(api.open_router())
    for router in (api.router(), *extra_routers):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(Exception, answer_error)
    app.add_middleware(
        Door,
        metrics=api.metrics,
        pressure=Pressure(api.limits.min_under_way, api.limits.max_under_way, api.limits.patience_s),
        max_body_bytes=lambda path: max_upload_bytes if path == "/v1/files" else api.limits.max_body_bytes,
    )
    return app


async def answer_error(_: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), "http_error")
    if not isinstance(error, ApiError):
        error = ApiError(500, "an error of the service; its log has it under this request's id", "internal_error")
    return error.response()


async def page() -> FileResponse:
    """The page for people."""
    return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


def rows(vectors: npt.NDArray[Any], headers: Mapping[str, str], media_type: str) -> Response:
    """Vectors (texts, dim) as little-endian rows one after the other, or as an Arrow stream of EMBEDDINGS."""
    if media_type == RAW:
        described = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": str(vectors.dtype)}
        return Response(np.ascontiguousarray(vectors).tobytes(), headers=dict(headers) | described, media_type=RAW)
    schema = embeddings_schema(vectors.shape[1], pa.from_numpy_dtype(vectors.dtype))
    batch = pa.record_batch([pa.array(np.arange(len(vectors))), vector_column(vectors)], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(batch)
    return Response(sink.getvalue().to_pybytes(), headers=dict(headers), media_type=ARROW)
