"""HTTP in front of an engine: two questions, limits on every field, JSON errors that say what to do.

curl -s localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"history": ["item-1"], "k": 5}'
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from genrec.errors import ConfigError, DataError
from genrec.serving.engine import Engine, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.select_engine import make_engine

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as err:
    raise ConfigError(f"the gateway needs {err.name}; install genrec[serve]") from err

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 512 * 1024
MAX_WAITING = 64  # requests at once; more get 503

ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Answer = TypeVar("Answer")
Price = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Body(BaseModel):
    """Base of every request body: no unknown field, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendBody(Body):
    """POST /v1/recommend; the fields of `RecommendRequest`."""

    history: list[ItemId] = Field(max_length=500, description="item ids, oldest first")
    k: int = Field(10, ge=1, le=100, description="items wanted")
    beams: int | None = Field(None, ge=1, le=200, description="beam width")
    exclude_seen: bool = Field(True, description="leave out the items of the history")
    categories: list[ItemId] | None = Field(None, max_length=1000, description="items in any of them")
    price_min: Price | None = None
    price_max: Price | None = None
    allow: list[ItemId] | None = Field(None, max_length=1000, description="only these item ids")


class DescribeBody(Body):
    """POST /v1/describe; the fields of `TextRequest`."""

    item_id: ItemId
    history: list[ItemId] = Field([], max_length=500, description="item ids, oldest first")
    max_tokens: int = Field(64, ge=1, le=512)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)


class Shown(BaseModel):
    """One recommended item."""

    item_id: str
    title: str
    score: float
    rank: int


class Version(BaseModel):
    """What answered: the engine, the first letters of the export's key, the genrec that wrote the export."""

    engine: str
    export: str
    genrec: str


class Recommended(Version):
    """Answer of /v1/recommend."""

    items: list[Shown]


class Described(Version):
    """Answer of /v1/describe."""

    text: str
    finish_reason: str


class BodyLimit:
    """ASGI middleware: a body above `MAX_BODY_BYTES` gets 413, whether or not it announces its length."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                refusal = _error(413, f"the body has more than {MAX_BODY_BYTES} bytes; send less")
                refusal.headers["connection"] = "close"
                await refusal(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _field_errors(err: RequestValidationError) -> str:
    """What is wrong with which field, without what was sent."""
    lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in err.errors()]
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(line[:200] for line in lines[:5]) + more


def create_app(engine: Engine, export: Export) -> FastAPI:
    """The HTTP application of one engine.

    Args:
        engine: answers one call at a time.
        export: the engine's export.
    """
    app = FastAPI(title="genrec", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    turn = threading.Lock()
    versions = export.manifest.get("versions", {})
    version = {
        "engine": engine.name,
        "export": str(export.manifest["key"])[:12],
        "genrec": str(versions.get("genrec", "unknown")),
    }
    titles = dict(zip(export.catalogue.item_ids, export.catalogue.titles, strict=True))

    def ask(question: Callable[[], list[Answer]]) -> list[Answer]:
        """One question at a time; whatever is not the sender's fault is a 500, and its reason goes to the log."""
        with turn:
            try:
                return question()
            except DataError:
                raise
            except Exception as err:
                log.exception("the engine failed")
                raise HTTPException(500, "internal error; the server's log says more") from err

    # plain functions: FastAPI runs them in threads, so waiting for the engine never blocks the others
    @app.post("/v1/recommend")
    def recommend(body: RecommendBody) -> Recommended:
        request = RecommendRequest(**body.model_dump())
        (ranked,) = ask(lambda: engine.recommend([request]))
        items = [Shown(title=titles[item.item_id], **asdict(item)) for item in ranked]
        return Recommended(items=items, **version)

    @app.post("/v1/describe")
    def describe(body: DescribeBody) -> Described:
        request = TextRequest(**body.model_dump())
        (result,) = ask(lambda: engine.generate([request]))
        return Described(text=result.text, finish_reason=result.finish_reason, **version)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "items": len(titles), **version}

    @app.exception_handler(DataError)
    async def on_data_error(_: Request, err: DataError) -> JSONResponse:
        return _error(422, str(err))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, err: RequestValidationError) -> JSONResponse:
        return _error(422, _field_errors(err))

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, err: HTTPException) -> JSONResponse:
        return _error(err.status_code, str(err.detail))

    return app


def serve(export_dir: Path, engine: str = "auto", host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve an export until interrupted.

    Raises:
        ArtefactError: the folder is no whole export.
        ConfigError: no such engine.
    """
    export = Export.load(export_dir)
    running = make_engine(export, engine)
    try:
        log.info("serving %s on http://%s:%d", export_dir, host, port)
        uvicorn.run(create_app(running, export), host=host, port=port, limit_concurrency=MAX_WAITING)
    finally:
        running.close()
