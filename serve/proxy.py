"""What Ray Serve says by itself, in the shape of all other errors.

A request whose gateway dies gets no answer from it, or a line of plain text; clients that retry typed errors would give
up. Ray Serve loads this where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is `serve.proxy:middlewares`.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.door import ApiError

LOST = ApiError(503, "no process of this service could answer; try again in 1 s", "unavailable", retry_after_s=1)
OWN_STATUSES = (500, 503)


class TypedErrors:
    """ASGI middleware that answers for those who did not, and replaces the proxy's own plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has an answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = replaced = False

        async def typed(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start" and not begun:
                begun = True
                plain = any(
                    name.lower() == b"content-type" and value.startswith(b"text/plain")
                    for name, value in message["headers"]
                )
                if message["status"] in OWN_STATUSES and plain:
                    replaced = True
                    await LOST.response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, typed)
        if not begun:
            await LOST.response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What the proxy puts round every application."""
    return [Middleware(TypedErrors)]
