"""A few threads for calls that may never return: they neither block the event loop nor keep the process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class PoolFullError(Exception):
    """All threads are busy and as many calls as may wait are waiting."""


class DaemonPool:
    """Runs calls in order on daemon threads; the standard library's pool would wait for hung calls at exit."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._calls: queue.Queue[tuple[Future[Any], Callable[[], Any]] | None] = queue.Queue(max_waiting)
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call on a thread.

        Raises:
            PoolFullError: too many calls are waiting.
        """
        future: Future[T] = Future()
        try:
            self._calls.put_nowait((future, call))
        except queue.Full:
            raise PoolFullError from None
        return future

    def close(self) -> None:
        """Let threads end that are not hung; waits for nobody."""
        for _ in self._threads:
            try:
                self._calls.put_nowait(None)
            except queue.Full:
                return

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as err:
                    future.set_exception(err)
