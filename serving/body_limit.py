"""A request's body is read whole before anyone works on it, within a size and a time."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genrec.serving.metrics import Metrics
from genrec.serving.problems import RefusalError

MAX_BODY_BYTES = 512 * 1024


class BodyLimit:
    """ASGI middleware: bodies above `MAX_BODY_BYTES` get 413, with or without an announced length; slow ones 408."""

    def __init__(self, app: ASGIApp, *, timeout_s: float, metrics: Metrics) -> None:
        """
        Args:
            app: what the body is for.
            timeout_s: for the whole body, however often a byte comes.
            metrics: counts refusals.
        """
        self.app, self._timeout_s, self._metrics = app, timeout_s, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_read(receive), self._timeout_s)
            if body is None:
                return
        except (TimeoutError, RefusalError) as err:
            refusal = (
                err
                if isinstance(err, RefusalError)
                else RefusalError(
                    408, f"the body did not arrive within {self._timeout_s:g} s; send it faster", "slow_body"
                )
            )
            self._metrics.refusals.labels(refusal.reason).inc()
            await refusal.response(scope["path"], connection="close")(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def _read(receive: Receive) -> bytes | None:
    """The body; None if the client left before its end.

    Raises:
        RefusalError: too large.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise RefusalError(413, f"the body has more than {MAX_BODY_BYTES} bytes; send less", "large_body")
    return bytes(body)
