"""HTTP in front of an engine: deadlines, limits on every field, JSON errors that say what to do.

curl -s localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"history": ["item-1"], "k": 5}'
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from genrec.errors import ConfigError

try:
    from fastapi import FastAPI, Request, Security
    from fastapi.responses import JSONResponse, Response
    from fastapi.security import HTTPBearer
    from starlette.concurrency import run_in_threadpool

    from genrec.serving import bodies, problems
    from genrec.serving.access import Gate
    from genrec.serving.api_keys import Keys
    from genrec.serving.body_limit import BodyLimit
    from genrec.serving.catalogue_routes import add_catalogue
    from genrec.serving.chat import Understand
    from genrec.serving.chat_route import add_chat
    from genrec.serving.desk import RESERVE_S, Desk, Settings
    from genrec.serving.page_routes import add_page
    from genrec.serving.problems import RefusalError
    from genrec.serving.request_log import RequestLog
    from genrec.serving.store_error import StoreError
    from genrec.serving.user_store import Event, UserStore
except ImportError as err:
    raise ConfigError(f"the gateway needs {err.name}; install genrec[serve]") from err

from genrec.serving.engine import Engine, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.provenance import provenance_of
from genrec.serving.resolve import beam_width, item_rows

log = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    export: Export,
    *,
    store: UserStore | None = None,
    keys: Keys | None = None,
    hosts: frozenset[str] | None = None,
    settings: Settings | None = None,
    understand: Understand | None = None,
) -> FastAPI:
    """The HTTP application of one engine.

    Args:
        engine: answers one call at a time, from a thread of its own.
        export: the engine's export.
        store: users' histories; None: requests bring them.
        keys: who may ask what; None: everyone may ask everything.
        hosts: names by which the server may be asked; None: any.
        settings: deadlines, queues, timeouts.
        understand: finds what a conversation asks for; None: there is no chat.

    Raises:
        StoreError: the store does not say which items were sent or disabled.
        ArtefactError: the export's folder holds another export by now, or is damaged.
    """
    settings = settings or Settings()
    desk = Desk(engine, export, store, settings, understand)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(_refresh(desk))
        yield
        refreshing.cancel()
        desk.watch.close()
        desk.close_pools()
        patience_s = 0.1 if desk.worker.state == "stalled" else 10.0
        await run_in_threadpool(desk.worker.close, patience_s)

    app = FastAPI(title="genrec", version="1", redoc_url=None, lifespan=lifespan, responses=problems.RESPONSES)
    app.state.gateway = desk
    problems.install(app)
    app.add_middleware(BodyLimit, timeout_s=settings.body_timeout_s, metrics=desk.metrics)
    app.add_middleware(
        Gate, keys=keys, limiter=desk.limiter, metrics=desk.metrics, drain=desk.drain, hosts=hosts
    )  # before the body
    app.add_middleware(RequestLog, metrics=desk.metrics)
    version = _version(engine, export)
    _add_answers(app, desk, version)
    _add_state(app, desk, version)
    add_catalogue(app, desk)
    add_page(app)
    if understand is not None:
        add_chat(app, desk, version["engine"])
    return app


def _version(engine: Engine, export: Export) -> dict[str, str]:
    versions = export.manifest.get("versions", {})
    return {
        "engine": engine.name,
        "export": str(export.manifest["key"])[:12],
        "genrec": str(versions.get("genrec", "unknown")),
    }


async def _refresh(desk: Desk) -> None:
    """Look up now and then what other gateways stored and disabled."""
    while desk.store is not None:
        await asyncio.sleep(desk.settings.refresh_s)
        try:
            await desk.catch_up()
            await desk.stored(lambda _: desk.switches.refresh())
        except StoreError as err:
            desk.metrics.store_errors.labels(err.kind).inc()
            log.warning("items, and which are disabled, stay as they are: %s", err)
        except RefusalError as err:
            desk.metrics.refusals.labels(err.reason).inc()
            log.warning("items stay as they are: %s", err)
        except Exception:
            log.exception("items stay as they are")


def _add_answers(app: FastAPI, desk: Desk, version: dict[str, str]) -> None:
    """The routes that ask the engine."""
    key = [Security(HTTPBearer(auto_error=False))]  # documents what `Gate` asks for

    @app.post("/v1/recommend", dependencies=key)
    async def recommend(body: bodies.RecommendBody, http: Request) -> bodies.Recommended:
        """The next items for a user, best first; the most popular ones, marked, when the engine is late or down."""
        timeout_s = body.timeout_ms / 1000
        deadline = time.monotonic() + timeout_s - min(RESERVE_S, timeout_s / 10)
        wish = RecommendRequest(
            history=await desk.history(http, body.user_id, body.history or [], deadline),
            **body.model_dump(exclude={"user_id", "history", "timeout_ms"}),
        )
        desk.now.popularity.check(wish)
        desk.charge(http.state.caller, "beams", beam_width(wish, len(desk.now.export.catalogue)))
        ranked, reason, state = await desk.rank(http, wish, deadline)
        items = [
            bodies.Shown(item_id=item.item_id, title=state.title(item.item_id), score=item.score, rank=item.rank)
            for item in ranked
        ]
        return bodies.Recommended(items=items, fallback=reason is not None, reason=cast(Any, reason), **version)

    @app.post("/v1/describe", dependencies=key)
    async def describe(body: bodies.DescribeBody, http: Request) -> bodies.Described:
        """Text about an item for a user."""
        deadline = time.monotonic() + body.timeout_ms / 1000
        wish = TextRequest(
            history=await desk.history(http, body.user_id, body.history, deadline),
            **body.model_dump(exclude={"user_id", "history", "timeout_ms"}),
        )
        item_rows(desk.now.export.catalogue, [wish.item_id, *wish.history])
        desk.charge(http.state.caller, "tokens", wish.max_tokens)
        result = await desk.write(http, wish, deadline)
        user = None if body.user_id is None else desk.user_hash(http.state.caller.tenant, body.user_id)
        origin = provenance_of(desk.now.export, version["engine"], wish, user)
        return bodies.Described(
            text=result.text,
            finish_reason=result.finish_reason,
            provenance=bodies.Origin(**origin.as_dict()),
            **version,
        )


def _add_state(app: FastAPI, desk: Desk, version: dict[str, str]) -> None:
    """The routes that change or show what the gateway keeps."""
    key = [Security(HTTPBearer(auto_error=False))]

    @app.post("/v1/events", dependencies=key)
    async def events(body: bodies.EventsBody, http: Request) -> bodies.Stored:
        """Append to users' histories; the answer comes when the events are on disk."""
        tenant = http.state.caller.tenant
        item_rows(desk.now.export.catalogue, [event.item_id for event in body.events])
        found = [Event(**event.model_dump()) for event in body.events]
        desk.note(http, events=len(found))
        stored = await desk.stored(lambda store: store.append(tenant, found))
        desk.metrics.events.labels("stored").inc(stored)
        desk.metrics.events.labels("duplicate").inc(len(found) - stored)
        return bodies.Stored(stored=stored, duplicates=len(found) - stored)

    @app.post("/v1/items", dependencies=key)
    async def items(body: bodies.ItemsBody, http: Request) -> bodies.Changed:
        """Add, replace, disable and enable items, in this order: what is asked after this answer is answered so."""
        sent = [item.sent() for item in body.upsert]
        ids = {item.item_id for item in sent}
        item_rows(desk.now.export.catalogue, [item for item in [*body.disable, *body.enable] if item not in ids])
        added, replaced = await desk.upsert(sent) if sent else (0, 0)
        if desk.store is None:
            disabled = desk.switches.change(body.disable, body.enable)
        else:
            disabled = await desk.stored(lambda _: desk.switches.change(body.disable, body.enable))
        desk.note(http, added=added, replaced=replaced, disabled=disabled)
        return bodies.Changed(added=added, replaced=replaced, disabled=disabled)

    @app.get("/healthz")
    async def healthz() -> bodies.Health:
        """The process lives."""
        export = desk.now.export
        return bodies.Health(status="ok", items=len(export.catalogue.item_ids), tasks=export.tasks, **version)

    @app.get("/readyz", responses={503: {"model": bodies.Readiness, "description": "not ready; the reasons say why"}})
    async def readyz() -> Response:
        """Whether a load balancer should send requests here."""
        reasons = desk.obstacles()
        answer = bodies.Readiness(ready=not reasons, reasons=reasons)
        return JSONResponse(answer.model_dump(), 503 if reasons else 200)

    @app.get("/metrics", dependencies=key, response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(desk.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
