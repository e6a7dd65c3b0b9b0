"""Engines that fail on purpose: each is a real engine behind a switch, and keeps the Protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from genrec.serving.engine import Engine, JsonRequest, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export


class ToldWriter:
    """Recommends as the engine within, and writes what it is told: for texts that no tiny model would find.

    Attributes:
        tell: the text of a request; its finish reason is "stop".
    """

    name = "told"

    def __init__(self, within: Engine, tell: Callable[[TextRequest], str]) -> None:
        self.within, self.tell = within, tell

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        return self.within.recommend(requests)

    def prepare(self, export: Export) -> Callable[[], None]:
        return self.within.prepare(export)

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        return [TextResult(self.tell(r), "stop", []) for r in requests if isinstance(r, TextRequest)]

    def close(self) -> None:
        self.within.close()


class FaultyEngine:
    """Answers as the engine within, unless told to fail, to hang or to be slow.

    Attributes:
        calls: the requests of each call so far.
        error: raised by the next calls, if set.
        hang: cleared, calls wait until it is set again.
        delay_s: each call takes at least so long.
    """

    name = "faulty"

    def __init__(self, within: Engine) -> None:
        self.within = within
        self.calls: list[list[RecommendRequest | TextRequest | JsonRequest]] = []
        self.error: BaseException | None = None
        self.hang = threading.Event()
        self.hang.set()
        self.delay_s = 0.0
        self.inside = threading.Semaphore(0)  # released once per call that began

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        self._trip(requests)
        return self.within.recommend(requests)

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        self._trip(requests)
        return self.within.generate(requests)

    def prepare(self, export: Export) -> Callable[[], None]:
        return self.within.prepare(export)

    def close(self) -> None:
        self.within.close()

    def _trip(self, requests: Sequence[RecommendRequest | TextRequest | JsonRequest]) -> None:
        self.calls.append(list(requests))
        self.inside.release()
        self.hang.wait()
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
