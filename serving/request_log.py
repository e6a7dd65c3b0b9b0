"""One line of JSON per request: who, what, how long; never a history, a raw user id, a key or a body."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import traceback
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genrec.serving.access import route_of
from genrec.serving.metrics import Metrics

access = logging.getLogger("genrec.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """ASGI middleware: gives each request an id, times it, counts it, logs it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        """
        Args:
            app: what answers.
            metrics: takes status and seconds.
        """
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        started, status = time.perf_counter(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - started
            route = route_of(scope["path"]) or "other"  # nobody can fill the metrics with names
            self._metrics.requests.labels(route, status).inc()
            self._metrics.stage.labels(route, "total").observe(seconds)
            caller = state.get("caller")
            fields = {
                "request_id": request_id,
                "tenant": caller.tenant if caller else None,
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
                **state.get("log", {}),
            }
            access.info("request", extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. Of an exception it says type and places; its words may quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
        return json.dumps(line, default=str)
