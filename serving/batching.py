"""One thread that owns the engine: a short queue in front, requests that arrive together answered by one call.

submit ──> waiting (bounded, cancellable) ──> batch: same kind, in order ──> engine ──> each request's future

What the engine answers from changes between two calls only (`between`), ahead of the queue; each job says what it was
answered from.

Nobody here waits for the engine: callers wait on futures, as long as their own deadline lets them. A call that
never returns holds this one daemon thread, and the gateway answers without the engine (`state` says "stalled").
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from genrec.errors import DataError
from genrec.serving.engine import Engine, RecommendRequest, TextRequest

log = logging.getLogger(__name__)
Kind = Literal["recommend", "generate", "understand"]
Ask = Callable[[Engine], Any]  # of the kind "understand": what the engine is asked, in several calls perhaps
Wish = RecommendRequest | TextRequest | Ask
State = Literal["ok", "failed", "stalled"]


class QueueFullError(Exception):
    """No more requests may wait; try again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class StalledError(Exception):
    """The engine's current call has not returned for too long."""


@dataclass(eq=False)
class Job:
    """A request on its way; times are seconds of `time.monotonic`."""

    kind: Kind
    request: Wish
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    state: Any = None  # what the engine answered from, set before the answer
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Batch:
    """One engine call that ended, for metrics."""

    kind: Kind
    size: int  # requests
    engine_s: float
    waited_s: list[float]  # in the queue, per request that got its answer or its error by this call
    failed: bool  # for a reason that no request gave


class EngineWorker:
    """The queue and the thread. Safe to call from any thread or event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        max_batch: int,
        window_s: float,
        stall_s: float,
        probe_s: float,
        on_batch: Callable[[Batch], None] = lambda _: None,
        probes: Mapping[Kind, Wish] | None = None,
        state: Any = None,
    ) -> None:
        """
        Args:
            engine: is called from this worker's thread only.
            max_waiting: requests that may wait; more are refused.
            max_batch: requests of one engine call.
            window_s: how long an idle engine waits for company after a request arrives.
            stall_s: a call that takes longer counts as hung until it returns.
            probe_s: how often a failed engine is asked a probe while nobody else asks.
            on_batch: called in the worker's thread after each engine call.
            probes: what to ask a failed engine, per kind.
            state: what the engine answers from, until `between` says otherwise.
        """
        self._engine, self._on_batch, self._probes = engine, on_batch, probes or {}
        self.max_waiting, self.max_batch = max_waiting, max_batch
        self._window_s, self._stall_s, self._probe_s = window_s, stall_s, probe_s
        self._waiting: deque[Job] = deque()
        self._state = state
        self._swaps: deque[tuple[Callable[[], Any], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since: float | None = None
        self._call_s = 0.1  # moving average of an engine call, for Retry-After
        self._failed: set[Kind] = set()
        self._thread = threading.Thread(target=self._run, name="genrec-engine", daemon=True)
        self._thread.start()

    # -- callers' side -------------------------------------------------------------------------------------------

    def submit(self, kind: Kind, request: Wish, deadline: float) -> Job:
        """Queue a request.

        Args:
            kind: which engine method answers.
            request: for it.
            deadline: moment of `time.monotonic` after which nobody wants the answer.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            StalledError: the engine hangs.
        """
        job = Job(kind, request, deadline)
        with self._changed:
            if self._stalled():
                raise StalledError
            if len(self._waiting) >= self.max_waiting or self._closed:
                calls = 1 + len(self._waiting) / self.max_batch
                raise QueueFullError(max(1, math.ceil(calls * self._call_s)))
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def between(self, swap: Callable[[], Any]) -> Future[None]:
        """Change what the engine answers from, before its next call.

        Args:
            swap: called on the engine's thread; must not fail. Returns the state of the jobs from then on.

        Returns:
            Done when it was called; while the engine hangs it waits.
        """
        done: Future[None] = Future()
        with self._changed:
            self._swaps.append((swap, done))
            self._changed.notify_all()
        return done

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer: its place in the queue is free at once; inside the engine it is let run."""
        job.future.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def state(self) -> State:
        """How the engine's last calls went, per kind the last one."""
        with self._changed:
            return "stalled" if self._stalled() else "failed" if self._failed else "ok"

    def close(self, timeout_s: float = 10.0) -> bool:
        """Take no more requests, let the thread end; False if the engine did not return in time."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _stalled(self) -> bool:
        return self._busy_since is not None and time.monotonic() - self._busy_since > self._stall_s

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch = self._take()
            self._swap()
            if batch is None:
                return
            if batch:
                self._answer(batch)
            else:
                self._probe()

    def _take(self) -> list[Job] | None:
        """The next batch; empty when it is time for a swap or a probe, None when closed."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closed:
                        return None
                    if self._swaps:
                        return []
                    probe_s = self._probe_s if self._failed & self._probes.keys() else None
                    if not self._changed.wait(probe_s):
                        return []
                until = self._waiting[0].queued_at + self._window_s
                while 0 < len(self._waiting) < self.max_batch:
                    left_s = until - time.monotonic()
                    if left_s <= 0 or not self._changed.wait(left_s):
                        break
                if self._waiting:  # not all cancelled meanwhile
                    break
            kind = self._waiting[0].kind
            most = 1 if kind == "understand" else self.max_batch  # these share no call
            batch = [job for job in self._waiting if job.kind == kind][:most]
            for job in batch:
                self._waiting.remove(job)
            self._busy_since = time.monotonic()
        return batch

    def _swap(self) -> None:
        while self._swaps:
            swap, done = self._swaps.popleft()
            try:
                self._state = swap()
                done.set_result(None)
            except Exception as err:
                log.exception("the engine keeps what it answered from")
                done.set_exception(err)

    def _answer(self, batch: list[Job]) -> None:
        now = time.monotonic()
        live = [job for job in batch if job.deadline > now and job.future.set_running_or_notify_cancel()]
        try:
            if live:
                self._call_for(live)
        finally:
            self._idle()

    def _call_for(self, jobs: list[Job]) -> None:
        """One engine call; if it fails, one for each request, so that a bad one spoils no other."""
        waited_s = [time.monotonic() - job.queued_at for job in jobs]
        started = time.monotonic()
        try:
            answers = self._ask(jobs[0].kind, [job.request for job in jobs])
            if len(answers) != len(jobs):
                raise RuntimeError(f"the engine gave {len(answers)} answers to {len(jobs)} requests")
        except Exception as err:
            self._report(jobs, started, waited_s if len(jobs) == 1 else [], not isinstance(err, DataError))
            if len(jobs) > 1:
                for job in jobs:
                    if job.deadline > time.monotonic():
                        self._restart_clock()
                        self._call_for([job])
                    else:
                        job.future.set_exception(TimeoutError())
                return
            if not isinstance(err, DataError):  # a wish that no engine can meet says nothing about this one
                log.error("the engine failed at %s", jobs[0].kind, exc_info=err)
                self._failed.add(jobs[0].kind)
            jobs[0].future.set_exception(err)
            return
        self._failed.discard(jobs[0].kind)
        self._report(jobs, started, waited_s, False)
        for job, answer in zip(jobs, answers, strict=True):
            job.state = self._state
            job.future.set_result(answer)

    def _ask(self, kind: Kind, requests: Sequence[Any]) -> list[Any]:
        """
        Raises:
            Exception: whatever the engine raises; what would end the thread comes as a RuntimeError.
        """
        try:
            if kind == "understand":
                return [ask(self._engine) for ask in requests]
            return list(self._engine.recommend(requests) if kind == "recommend" else self._engine.generate(requests))
        except Exception:
            raise
        except BaseException as err:
            raise RuntimeError(f"the engine raised {type(err).__name__}") from err

    def _probe(self) -> None:
        """Ask a failed engine something small; one right answer makes it well again."""
        for kind in sorted(self._failed & self._probes.keys()):
            self._restart_clock()
            try:
                self._ask(kind, [self._probes[kind]])
                self._failed.discard(kind)
                log.info("the engine answers %s again", kind)
            except Exception as err:
                log.warning("the engine still fails at %s: %s", kind, type(err).__name__)
        self._idle()

    def _restart_clock(self) -> None:
        with self._changed:
            self._busy_since = time.monotonic()

    def _idle(self) -> None:
        with self._changed:
            self._busy_since = None

    def _report(self, jobs: list[Job], started: float, waited_s: list[float], failed: bool) -> None:
        engine_s = time.monotonic() - started
        self._call_s += 0.2 * (engine_s - self._call_s)
        try:
            self._on_batch(Batch(jobs[0].kind, len(jobs), engine_s, waited_s, failed))
        except Exception:
            log.exception("metrics failed")
