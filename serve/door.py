"""What every request passes before and after its route: who it is, how much it may send, and what is said of it."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedlib.config import Config
from serve.metrics import GatewayMetrics
from serve.schemas import error_body

Body = TypeVar("Body", bound=Config)
log = logging.getLogger("ray.serve.embedlib")  # Ray Serve writes what its own logger is told

REQUEST_ID = re.compile(r"[\w.-]{1,64}")
# pydantic also names the arms of a union, which clients know nothing of.
PLAIN_KEY = re.compile(r"(?!str$|list$)[\w.-]+")
MOST_PROBLEMS = 3
HTTP_OK, CLIENT_GONE = 200, 499
ALWAYS = ("/health", "/ready", "/metrics")
"""Paths of those who watch: they are let in when all else is turned away."""
WINDOW_S = 1.0
OVERLOAD_S = 1
MOST_CHANGE = 1.25
"""Of the limit in a window: answers tell of the limit before, and a model with too little to do makes small batches."""
GENEROSITY = 2
"""How many times the least a gateway that knows nothing yet lets in."""
NOT_COUNTED = "other"
"""The path of requests to no route, of which there may be any number."""


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        """The error in OpenAI's shape."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = error_body(self.message, kind, self.param, self.code)
        return Response(body, self.status, headers, "application/json")


class Pressure:
    """How many requests may be under way: fewer after a second of slow answers, more after one in which the limit
    turned requests away and answers were quick.

    What waits for this process itself, or on its way to a replica, no replica's queue can see.
    """

    def __init__(self, least: int, most: int, patience_s: float) -> None:
        """`patience_s` is how long an answer may take on average."""
        self.least, self.most, self.patience_s = least, most, patience_s
        self.limit = min(most, GENEROSITY * least)
        self.under_way = self.answered = 0
        self.seconds, self.reached, self.since = 0.0, False, time.monotonic()

    def admits(self) -> bool:
        """Whether one more request may come in."""
        self.reached |= self.under_way >= self.limit
        return self.under_way < self.limit

    def count_answer(self, seconds: float, now: float) -> None:
        """Count a success that took so many seconds."""
        self.answered, self.seconds = self.answered + 1, self.seconds + seconds
        if now - self.since < WINDOW_S:
            return
        slowness = self.seconds / self.answered / self.patience_s
        if slowness > 1:
            self.limit = max(self.least, int(self.limit / min(slowness, MOST_CHANGE)))
        elif self.reached:
            self.limit = min(self.most, math.ceil(self.limit * MOST_CHANGE))
        self.answered, self.seconds, self.reached, self.since = 0, 0.0, False, now


class Door:
    """ASGI middleware around the whole API."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: GatewayMetrics,
        pressure: Pressure,
        max_body_bytes: Callable[[str], int],
    ) -> None:
        """`max_body_bytes` tells what a path takes."""
        self.app, self.metrics = app, metrics
        self.pressure, self.max_body_bytes = pressure, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or turn it away."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        headers = Headers(scope=scope)
        # Ray Serve's proxy gives every request an id, and its answer, too.
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else "-"
        scope.setdefault("state", {})["client"] = None
        status = 500

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counted = scope["path"] not in ALWAYS
        turned_away = counted and not self.pressure.admits()
        under_way = counted and not turned_away
        self.pressure.under_way += under_way
        try:
            limit = self.max_body_bytes(scope["path"])
            try:
                if turned_away:
                    # As long as it is asked to wait: many that come back at once would keep the event loop from those
                    # who were let in.
                    await asyncio.sleep(OVERLOAD_S)
                    raise ApiError(503, "too many requests are under way", "overloaded", retry_after_s=OVERLOAD_S)
                self._check_headers(headers, limit)
            except ApiError as error:
                await error.response()(scope, receive, tell)
            else:
                await self.app(scope, limited(receive, limit), tell)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self.pressure.under_way -= under_way
            seconds = time.monotonic() - begun
            if counted and status == HTTP_OK:
                self.pressure.count_answer(seconds, begun + seconds)
            path = getattr(scope.get("route"), "path", NOT_COUNTED)
            client = getattr(scope["state"]["client"], "name", "")
            self.metrics.requests.labels(path, str(status), client).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log.info("%s %s %s %s %d %.0f ms", request_id, client or "-", scope["method"], path, status, 1000 * seconds)

    def _check_headers(self, headers: Headers, limit: int) -> None:
        if (origin := headers.get("origin")) and origin.split("://")[-1] != headers.get("host"):
            raise ApiError(403, f"origin {origin}: another site's page may not use this service", "foreign_origin")
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "content-encoding: expected a body that is not compressed", "compressed_body")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_long(limit)


def too_long(limit: int) -> ApiError:
    """A body of more bytes than its path takes."""
    return ApiError(413, f"body: expected at most {limit} bytes", "body_too_large")


def limited(receive: Receive, limit: int) -> Receive:
    """`receive` that raises ApiError when more than `limit` bytes have come."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise too_long(limit)
        return message

    return counted


async def read(request: Request, kind: type[Body]) -> Body:
    """The JSON body as `kind`; ApiError naming each key, its value and what was expected."""
    if "json" not in request.headers.get("content-type", ""):
        raise ApiError(415, "content-type: expected application/json", "not_json")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise ApiError(*describe(error)) from None


def describe(error: ValidationError) -> tuple[int, str, str, str]:
    """The first problems of a body in words: status, message, code, and the key of the first."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    where = [".".join(str(part) for part in problem["loc"] if PLAIN_KEY.fullmatch(str(part))) for problem in problems]
    found = dict.fromkeys(f"{at or 'body'}: {problem['msg']}" for at, problem in zip(where, problems, strict=True))
    malformed = any(problem["type"] == "json_invalid" for problem in problems)
    return 400 if malformed else 422, "; ".join(list(found)[:MOST_PROBLEMS]), "invalid_body", where[0] or "body"


def takes(kind: type[Config]) -> dict[str, Any]:
    """What OpenAPI is told of a body that `read` reads."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
