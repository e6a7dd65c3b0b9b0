"""Every refusal in one form, `{"error": what was wrong and what to do}`, and the statuses that can occur.

The chat route has OpenAI's form, where a client of theirs looks for it: an object in `error`, and 400 for 422.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from genrec.errors import DataError
from genrec.serving.bodies import Problem
from genrec.serving.openai_format import CHAT_PATH, REFUSALS, ChatProblem, error_object
from genrec.serving.store_error import StoreError

log = logging.getLogger(__name__)
STATUSES = {
    400: "the body is no JSON",
    401: "no API key, or none that is known",
    403: "the key lacks the scope, or the server is asked by a name that is not its own",
    408: "the body did not arrive in time",
    409: "items cannot be taken: the export or an encoder lacks what they need, or no id is free",
    413: "the body is too large",
    422: "an unknown item or category, or a value out of range",
    429: "the tenant's rate limit; see Retry-After",
    500: "the engine failed at a text",
    503: "too many requests wait, the server is going down, or the user store does not answer; see Retry-After",
    504: "no text, or not even the user's history, before the deadline; items that were not taken in time",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in STATUSES.items()
}
CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ChatProblem, "description": f"{STATUSES[422]}; {text}" if status == 400 else text}
    for status, text in STATUSES.items()
}
SHOWN = 5


def answer(
    path: str, status: int, text: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A refusal in the form that the path has.

    Args:
        path: of the request.
        status: of HTTP.
        text: what was found, what to do.
        param: the field that is wrong, where the form has a place for it.
        headers: of the answer.
    """
    if path == CHAT_PATH:
        status = 400 if status == 422 else status
        return JSONResponse(error_object(status, text, param), status, headers)
    return JSONResponse({"error": text}, status, headers)


class RefusalError(Exception):
    """An answer other than 2xx, on purpose.

    Args:
        status: of HTTP.
        text: what was found, what to do.
        reason: a word for metrics.
        retry_after_s: when the client may try again.
    """

    def __init__(self, status: int, text: str, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s

    def response(self, path: str, **headers: str) -> JSONResponse:
        """The answer to a request of this path."""
        found = dict(headers)
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return answer(path, self.status, str(self), headers=found)


class ClientLeftError(Exception):
    """Nobody waits for this answer any more."""


def _field_errors(err: RequestValidationError, said: Mapping[str, str]) -> tuple[str, str | None]:
    """What is wrong with which field, without what was sent, and the first such field.

    Args:
        err: of FastAPI.
        said: words for some fields.
    """
    fields = [".".join(str(part)[:50] for part in e["loc"]) for e in err.errors()]
    names = [field.removeprefix("body.") for field in fields]
    lines = [f"{field}: {said.get(name, e['msg'])}" for field, name, e in zip(fields, names, err.errors(), strict=True)]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    param = (
        names[0] if names and len(err.errors()[0]["loc"]) > 1 and err.errors()[0]["type"] != "json_invalid" else None
    )
    return "; ".join(line[:200] for line in lines[:SHOWN]) + more, param


def install(app: FastAPI) -> None:
    """Answer this package's errors, and everyone else's, as `Problem`s."""

    def problem(http: Request, status: int, text: str, param: str | None = None, **headers: str) -> JSONResponse:
        return answer(http.scope["path"], status, text, param=param, headers=headers)

    @app.exception_handler(DataError)
    async def on_data_error(http: Request, err: DataError) -> Response:
        return problem(http, 422, str(err))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(http: Request, err: RequestValidationError) -> Response:
        text, param = _field_errors(err, REFUSALS if http.scope["path"] == CHAT_PATH else {})
        return problem(http, 422, text, param)

    @app.exception_handler(RefusalError)
    async def on_refusal(http: Request, err: RefusalError) -> Response:
        app.state.gateway.metrics.refusals.labels(err.reason).inc()
        return err.response(http.scope["path"])

    @app.exception_handler(StoreError)
    async def on_store(http: Request, err: StoreError) -> Response:
        log.error("%s", err)
        app.state.gateway.metrics.store_errors.labels(err.kind).inc()
        return problem(http, 503, f"the user store is {err.kind}; try again", **{"retry-after": "1"})

    @app.exception_handler(ClientLeftError)
    async def on_left(_: Request, err: ClientLeftError) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(HTTPException)
    async def on_http(http: Request, err: HTTPException) -> Response:
        return problem(http, err.status_code, str(err.detail), **(err.headers or {}))

    @app.exception_handler(Exception)
    async def on_bug(http: Request, err: Exception) -> Response:
        return problem(http, 500, "internal error; the server's log says more")
