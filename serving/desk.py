"""What stands between a route and the engine, the store and the tenant's limits; nothing here outlives a deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from genrec import config
from genrec.errors import DataError
from genrec.query import Query
from genrec.serving.access import Caller, Drain
from genrec.serving.batching import Ask, EngineWorker, Kind, QueueFullError, StalledError, Wish
from genrec.serving.bodies import MAX_HISTORY
from genrec.serving.chat import Message, Understand
from genrec.serving.daemon_pool import DaemonPool, PoolFullError
from genrec.serving.engine import Engine, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.export_watch import ExportWatch
from genrec.serving.item_state import ItemState
from genrec.serving.item_switches import ItemSwitches
from genrec.serving.measured_engine import parts
from genrec.serving.metrics import Metrics
from genrec.serving.problems import ClientLeftError, RefusalError
from genrec.serving.rate_limit import Kind as RateKind
from genrec.serving.rate_limit import RateLimiter
from genrec.serving.sent_item import SentItem
from genrec.serving.speculation import Speculative
from genrec.serving.stock import Stock
from genrec.serving.store_error import StoreError
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_hash import UserHash
from genrec.serving.user_store import UserStore

T = TypeVar("T")
RESERVE_S = 0.02  # of a list's time, at most a tenth: for the fallback


class Settings(config.Settings):
    """How the gateway treats its engine and its clients."""

    max_waiting: int = Field(64, ge=1, description="requests that may wait for the engine; more get 503")
    max_batch: int = Field(16, ge=1, description="requests of one engine call")
    window_ms: float = Field(3, ge=0, description="how long an idle engine waits for company")
    stall_s: float = Field(35, gt=0, description="an engine call that takes longer counts as hung")
    probe_s: float = Field(5, gt=0, description="how often an engine that failed is asked whether it is well")
    body_timeout_s: float = Field(10, gt=0, description="for a whole body to arrive")
    store_timeout_s: float = Field(8, gt=0, description="for an answer of the user store")
    store_threads: int = Field(8, ge=1, description="calls of the user store at once")
    store_waiting: int = Field(64, ge=1, description="calls that may wait for the user store; more get 503")
    refresh_s: float = Field(
        5, gt=0, description="how often other gateways' items and disabled items and the export's folder are looked up"
    )
    items_timeout_s: float = Field(60, gt=0, description="for items to be taken")
    items_waiting: int = Field(8, ge=1, description="changes of items that may wait for each other; more get 503")
    drain_s: float = Field(1, ge=0, description="after SIGTERM, new requests still get a 503 for so long")


class Desk:
    """One gateway's parts."""

    def __init__(
        self,
        engine: Engine,
        export: Export,
        store: UserStore | None,
        settings: Settings,
        understand: Understand | None = None,
    ) -> None:
        """
        Args:
            engine: asked from the worker's thread only.
            export: the engine's.
            store: users' histories; None: requests bring them.
            settings: limits and times.
            understand: finds what a conversation asks for; None: nobody will ask for it.

        Raises:
            StoreError: the store does not say which items were sent or disabled.
        """
        self.store, self.settings = store, settings
        self.metrics, self.drain, self.limiter = Metrics(), Drain(), RateLimiter()
        self._stock = Stock(export, store, understand is not None)  # for the items' one thread from now on
        self.now = self._offered = self._stock.state
        self._prepare = engine.prepare
        if self.now.export is not export:
            engine.prepare(self.now.export)()
        self.switches = ItemSwitches(self.now.export.catalogue, store)
        self.watch = ExportWatch(export, settings.refresh_s)
        self.user_hash = UserHash()
        self._understand = understand
        self.pool = DaemonPool("genrec-store", settings.store_threads, settings.store_waiting)
        self._items = DaemonPool("genrec-items", 1, settings.items_waiting)
        self.worker = EngineWorker(
            engine,
            max_waiting=settings.max_waiting,
            max_batch=settings.max_batch,
            window_s=settings.window_ms / 1000,
            stall_s=settings.stall_s,
            probe_s=settings.probe_s,
            on_batch=self.metrics.count_batch,
            probes={
                "recommend": RecommendRequest([], k=1),
                "generate": TextRequest(export.catalogue.item_ids[0], max_tokens=1),
                "understand": self._reading(self.now, [{"role": "user", "content": "hello"}], [[]]),
            },
            state=self.now,
        )
        self.metrics.watch(self.worker)
        lists, texts = parts(engine)[0], parts(engine)[-1]
        if isinstance(lists, TorchEngine):
            self.metrics.watch_prefixes(lists.prefixes)
        if isinstance(texts, Speculative):
            self.metrics.watch_drafts(texts)
        self.metrics.ready.set_function(lambda: float(not self.obstacles()))
        self.metrics.items.set_function(lambda: len(self.now.export.catalogue))

    def obstacles(self) -> list[str]:
        """Why this gateway should get no more requests; empty when it is ready."""
        state = self.worker.state
        found = {"failed": ["the engine's last call failed"], "stalled": ["the engine hangs"]}.get(state, []).copy()
        if self.watch.replaced:
            found.append("the export's folder holds another export now; restart to serve it")
        if self.drain.since is not None:
            found.append("the server is going down")
        return found

    def charge(self, caller: Caller, kind: RateKind, amount: int) -> None:
        """Take beams or tokens from a tenant's bucket.

        Raises:
            RefusalError: it does not hold enough.
        """
        rate = caller.limits.beams_per_s if kind == "beams" else caller.limits.tokens_per_s
        wait_s = self.limiter.take(caller.tenant, kind, amount, rate)
        if wait_s:
            raise RefusalError(429, f"the rate limit of {kind} is reached; try again later", "rate", wait_s)

    async def stored(self, call: Callable[[UserStore], T], deadline: float | None = None) -> T:
        """A call of the user store, on a thread, within `store_timeout_s` and the deadline.

        Raises:
            DataError: there is no store.
            StoreError: locked, full, gone or late. What was late may still be stored.
            RefusalError: the deadline is over. A list of popular items would not know what the user has seen.
        """
        store = self.store
        if store is None:
            raise DataError("user_id: this gateway keeps no histories; send `history`, or start it with --store")
        left_s = self.settings.store_timeout_s
        if deadline is not None:
            left_s = min(left_s, max(0.0, deadline - time.monotonic()))
        try:
            future = asyncio.wrap_future(self.pool.submit(lambda: call(store)))
            return await asyncio.wait_for(future, left_s)
        except PoolFullError:
            raise StoreError("locked", f"store {store.shown}: too many calls are waiting for it") from None
        except TimeoutError:
            if left_s < self.settings.store_timeout_s:  # the client's time, not the store's
                text = "the user's history was not read before the deadline; allow more time, or send `history`"
                raise RefusalError(504, text, "late") from None
            raise StoreError("locked", f"store {store.shown} did not answer within {left_s:.3g} s") from None

    async def upsert(self, sent: Sequence[SentItem]) -> tuple[int, int]:
        """Add and replace items; what is asked after this answers from them, and they are on disk if there is a store.

        Returns:
            How many are new and how many were replaced.

        Raises:
            DataError, RefusalError, StoreError: as `Stock.upsert`; RefusalError as well for too many changes at once,
                and where it takes too long: then they may be stored.
        """
        added, replaced = await self._on_items_thread(lambda: self._stock.upsert(sent))
        self.metrics.item_changes.labels("added").inc(added)
        self.metrics.item_changes.labels("replaced").inc(replaced)
        return added, replaced

    async def catch_up(self) -> None:
        """Take over the items that other gateways stored; errors as for `upsert`."""
        await self._on_items_thread(self._stock.catch_up)

    async def _on_items_thread(self, change: Callable[[], T]) -> T:
        def changed() -> T:
            try:
                return change()
            finally:
                self._show()

        try:
            future = self._items.submit(changed)
            return await asyncio.wait_for(asyncio.wrap_future(future), self.settings.items_timeout_s)
        except PoolFullError:
            raise RefusalError(503, "too many changes of items wait; try again later", "items_full", 5) from None
        except TimeoutError:
            text = "the items were not taken in time, but may still be; look for them before you send them again"
            raise RefusalError(504, text, "late") from None

    def _show(self) -> None:
        """Let the engine answer from the stock's state, and everybody look into it, from one moment on.

        Raises:
            RefusalError: the engine hangs; it will as soon as it returns.
        """
        state = self._stock.state
        if state is self._offered:
            return
        swap_engine = self._prepare(state.export)

        def swap() -> ItemState:
            swap_engine()
            self.switches.adopt(state.export.catalogue)  # before anybody finds what is disabled
            self.now = state
            return state

        self._offered = state
        try:
            self.worker.between(swap).result(self.settings.stall_s)
        except TimeoutError:
            text = "the engine does not answer; the items are taken and will be shown when it does"
            raise RefusalError(503, text, "engine_stalled", 5) from None

    def close_pools(self) -> None:
        """Let the threads of store and items end; waits for nobody."""
        self.pool.close()
        self._items.close()

    async def history(self, http: Request, user_id: str | None, more: list[str], deadline: float) -> list[str]:
        """A user's stored events, then those of the request; the newest `MAX_HISTORY` of them.

        Events whose item this export does not know (the log is older or newer than it) are left out.
        """
        caller: Caller = http.state.caller
        if user_id is None:
            return more
        self.note(http, user=self.user_hash(caller.tenant, user_id))
        found = await self.stored(lambda store: store.newest(caller.tenant, user_id, MAX_HISTORY), deadline)
        index = self.now.export.catalogue.index
        known = [item for item in found if item in index]
        return [*known, *more][-MAX_HISTORY:]

    async def rank(
        self, http: Request, wish: RecommendRequest, deadline: float
    ) -> tuple[list[RankedItem], str | None, ItemState]:
        """A list, why it is the fallback, if it is, and the state that it was made from.

        The items that are disabled when the answer is made are not in it, even if they were enabled when the engine
        began: then it is asked again.

        Raises:
            DataError: a wish that no engine can meet.
            RefusalError: too many requests wait.
            ClientLeftError: nobody waits for the list.
        """
        while True:
            wish = dataclasses.replace(wish, deny=self.switches.denied)
            reason = None
            try:
                ranked: list[RankedItem]
                ranked, state = await self._ask(http, "recommend", wish, deadline)
            except (DataError, RefusalError, ClientLeftError):
                raise
            except Exception as err:
                reason = {TimeoutError: "deadline", StalledError: "engine_stalled"}.get(type(err), "engine_error")
                state = self.now
                ranked = await run_in_threadpool(state.popularity.recommend, wish)
            index = state.export.catalogue.index
            if self.switches.denied.isdisjoint(index[item.item_id] for item in ranked):
                if reason is not None:
                    self.metrics.fallbacks.labels(reason).inc()
                    self.note(http, fallback=reason)
                return ranked, reason, state

    async def write(self, http: Request, wish: TextRequest, deadline: float) -> TextResult:
        """A text. There is no fallback for one.

        Raises:
            DataError: a wish that no engine can meet.
            RefusalError: too many requests wait, the deadline is over, or the engine failed.
            ClientLeftError: nobody waits for the text.
        """
        result: TextResult = await self._text(http, "generate", wish, deadline)
        return result

    async def understand(
        self,
        http: Request,
        state: ItemState,
        messages: Sequence[Message],
        shown: Sequence[Sequence[str]],
        deadline: float,
    ) -> Query:
        """What a conversation asks for among a state's items; else as `genrec.serving.chat.Understand` and `write`."""
        query: Query = await self._text(http, "understand", self._reading(state, messages, shown), deadline)
        return query

    def _reading(self, state: ItemState, messages: Sequence[Message], shown: Sequence[Sequence[str]]) -> Ask:
        """Understanding as the worker's thread does it."""

        def ask(engine: Engine) -> Query:
            assert self._understand is not None
            return self._understand(engine, state.export, messages, shown)

        return ask

    async def _text(self, http: Request, kind: Kind, wish: Wish, deadline: float) -> Any:
        """What has no fallback; raises as `write` does."""
        try:
            return (await self._ask(http, kind, wish, deadline))[0]
        except (DataError, RefusalError, ClientLeftError):
            raise
        except TimeoutError:
            raise RefusalError(
                504, "no text before the deadline; ask for fewer tokens or allow more time", "late"
            ) from None
        except StalledError:
            raise RefusalError(503, "the engine does not answer; try again", "engine_stalled", 5) from None
        except Exception:
            raise RefusalError(500, "internal error; the server's log says more", "engine_error") from None

    def note(self, http: Request, **fields: Any) -> None:
        """Add fields to the request's line in the log."""
        http.scope["state"].setdefault("log", {}).update(fields)

    async def _ask(self, http: Request, kind: Kind, wish: Wish, deadline: float) -> tuple[Any, ItemState]:
        """The engine's answer and the state that it is from, or its exception; `TimeoutError` at the deadline, whatever
        the engine does."""
        try:
            job = self.worker.submit(kind, wish, deadline)
        except QueueFullError as err:
            raise RefusalError(503, str(err), "queue_full", err.retry_after_s) from None
        answer = asyncio.wrap_future(job.future)
        left = asyncio.ensure_future(_disconnected(http))
        try:
            left_s = max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait({answer, left}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if answer in done:
                return answer.result(), job.state
            if left in done:
                self.metrics.cancelled.labels(http.scope["path"]).inc()
                raise ClientLeftError
            raise TimeoutError
        finally:
            left.cancel()
            if not answer.done():
                answer.cancel()
                self.worker.cancel(job)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
