import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.proxy import middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that dies over a request."""


@pytest.mark.parametrize("app", [silent, PlainTextResponse("Internal Server Error", 500)])
def test_what_has_no_answer_gets_one_that_clients_retry(app: ASGIApp) -> None:
    (middleware,) = middlewares()
    answer = TestClient(middleware.cls(app)).get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    "response",
    [
        PlainTextResponse("ok"),
        JSONResponse({"error": {"message": "ours"}}, 500),
        JSONResponse({}, 503),
        PlainTextResponse("no", 404),
    ],
)
def test_every_other_answer_stays_as_it_is(response: Response) -> None:
    (middleware,) = middlewares()
    answer = TestClient(middleware.cls(response)).get("/")
    assert (answer.status_code, answer.content) == (response.status_code, response.body)
