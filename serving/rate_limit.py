"""Token buckets: a tenant's rate of requests, beams and tokens of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from genrec.serving.bodies import MAX_BEAMS, MAX_TEXT_TOKENS

Kind = Literal["requests", "beams", "tokens"]
LARGEST: dict[Kind, int] = {"requests": 1, "beams": MAX_BEAMS, "tokens": MAX_TEXT_TOKENS}  # of one request
BURST_S = 5  # a bucket holds so many seconds of its rate


@dataclass
class Bucket:
    """Fills at a rate, is emptied by requests.

    Example:
        rate 2 and burst 10: ten at once, then one every half second; the eleventh at once is told to wait 0.5 s.
    """

    rate: float  # per second
    burst: float
    level: float
    filled_at: float

    def take(self, amount: float, now: float) -> float:
        """Take an amount; 0.0 if it was there, else the seconds until it will be, and nothing is taken."""
        elapsed = max(0.0, now - self.filled_at)
        self.level = min(self.burst, self.level + elapsed * self.rate)
        self.filled_at = now
        if amount <= self.level:
            self.level -= amount
            return 0.0
        return (min(amount, self.burst) - self.level) / self.rate


class RateLimiter:
    """A bucket for each tenant and kind that has a limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, Kind], Bucket] = {}

    def take(self, tenant: str, kind: Kind, amount: float, rate: float | None) -> float:
        """Charge a tenant.

        Args:
            tenant: who asks.
            kind: of what.
            amount: how much.
            rate: the tenant's limit per second; None is no limit.

        Returns:
            0.0 if it was granted, else seconds to wait.
        """
        if rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            bucket = self._buckets.get((tenant, kind))
            if bucket is None or bucket.rate != rate:
                burst = max(BURST_S * rate, LARGEST[kind])  # the largest request fits a full bucket
                bucket = self._buckets[tenant, kind] = Bucket(rate, burst, burst, now)
            return bucket.take(amount, now)
