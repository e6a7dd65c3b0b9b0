"""Offers a gateway lists at a fixed rate, whether it keeps up or not, and says what came of each request.

    genrec loadtest http://localhost:8000 --rate 50 --seconds 60

Open loop: arrivals are a Poisson process, drawn before the first request, and each is sent at its time. A latency
counts from that time, not from when the request got out, so that a server which holds up the sender looks as slow as
its users find it ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrec.errors import ConfigError

try:
    import httpx
except ImportError as err:
    raise ConfigError(f"the load test needs {err.name}; install genrec[serve]") from err

log = logging.getLogger(__name__)
ASKED = 0.9  # of the deadline is each request's timeout_ms; the rest is for the way there and back
GRACE_S = 5.0  # beyond the deadline, before the sender gives a request up
KEPT = 20  # idle connections
CATEGORIES, PER_CATEGORY = 20, 100  # items whose ids make the histories
MAX_HISTORY = 30  # events of a made-up user before a new one takes the place
ENOUGH = 0.99  # share of the offered requests that must get the model's list in time
FINER = 1.1  # the search for the capacity ends when the next rate would be less than this factor away


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    latency_s: float  # from its scheduled time
    lag_s: float  # from its scheduled time until it was sent: the sender's own
    status: int | None  # of HTTP; None: no answer
    fallback: bool = False  # the most popular items instead of the model's
    retry_after: bool = False
    error: str | None = None  # why there is no answer


@dataclass(frozen=True)
class Load:
    """One load test; `offered` is the sum of `accepted`, `refused` and `errors`."""

    rate: float  # requests a second, as wished
    seconds: float
    seed: int
    deadline_ms: int
    offered: int
    accepted: int  # answered 2xx
    fallbacks: int  # of the accepted: not the model's list
    late: int  # of the accepted: after the deadline
    refused: dict[str, dict[str, int]]  # 429 and 503 -> {"retry_after": n, "bare": n}
    errors: dict[str, int]  # any other status or broken connection -> n
    in_time: float  # share of the offered that got the model's list before the deadline
    latency_ms: dict[str, float | None]  # of the accepted
    sender_lag_ms: float | None  # 99th percentile; if it is not small, this machine was the bottleneck


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times of arrival in seconds, f64, ascending."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds + 10 * np.sqrt(rate * seconds) + 10))
    times = np.cumsum(gaps)
    return times[times < seconds]


def histories(item_ids: list[str], users: int, seed: int) -> Iterator[list[str]]:
    """Histories of made-up users: each time one of them, by chance, with one event more than last time."""
    rng = np.random.default_rng(seed)
    known: list[list[str]] = [[] for _ in range(users)]
    while True:
        user = int(rng.integers(users))
        if len(known[user]) >= MAX_HISTORY:
            known[user] = []
        known[user] = [*known[user], item_ids[int(rng.integers(len(item_ids)))]]
        yield known[user]


def summarise(answers: list[Answer], rate: float, seconds: float, seed: int, deadline_ms: int) -> Load:
    """Count what came back."""
    accepted = [a for a in answers if a.status is not None and 200 <= a.status < 300]
    refused: dict[str, dict[str, int]] = {}
    for answer in answers:
        if answer.status in (429, 503):
            kind = refused.setdefault(str(answer.status), {"retry_after": 0, "bare": 0})
            kind["retry_after" if answer.retry_after else "bare"] += 1
    failed = [a for a in answers if a.status is None or not (200 <= a.status < 300 or a.status in (429, 503))]
    late = [a for a in accepted if a.latency_s * 1000 > deadline_ms]
    good = [a for a in accepted if not a.fallback and a.latency_s * 1000 <= deadline_ms]
    latencies = np.array([a.latency_s for a in accepted]) * 1000
    points = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    return Load(
        rate=rate,
        seconds=seconds,
        seed=seed,
        deadline_ms=deadline_ms,
        offered=len(answers),
        accepted=len(accepted),
        fallbacks=sum(a.fallback for a in accepted),
        late=len(late),
        refused=refused,
        errors=dict(Counter(a.error or f"HTTP {a.status}" for a in failed)),
        in_time=len(good) / max(1, len(answers)),
        latency_ms={k: round(float(np.percentile(latencies, q)), 1) if accepted else None for k, q in points.items()},
        sender_lag_ms=round(float(np.percentile([a.lag_s for a in answers], 99)) * 1000, 1) if answers else None,
    )


async def offer(client: httpx.AsyncClient, arrivals: np.ndarray, wishes: Iterator[dict[str, Any]]) -> list[Answer]:
    """Send each wish at its time, whatever became of those before it.

    Args:
        client: of the gateway.
        arrivals: f64 [n] seconds from now.
        wishes: bodies of /v1/recommend.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def one(at: float, wish: dict[str, Any]) -> Answer:
        lag_s = loop.time() - started - at
        try:
            answer = await client.post("/v1/recommend", json=wish)
        except httpx.TransportError as err:
            return Answer(loop.time() - started - at, lag_s, None, error=type(err).__name__)
        latency_s = loop.time() - started - at
        fallback = answer.is_success and bool(answer.json().get("fallback"))
        return Answer(latency_s, lag_s, answer.status_code, fallback, "retry-after" in answer.headers)

    sent = []
    for at in arrivals.tolist():
        await asyncio.sleep(max(0.0, started + at - loop.time()))
        sent.append(asyncio.create_task(one(at, next(wishes))))
    return list(await asyncio.gather(*sent))


async def _item_ids(client: httpx.AsyncClient) -> list[str]:
    """Ids of the served catalogue.

    Raises:
        ConfigError: the server does not answer or has no such route.
    """

    async def get(path: str, **params: Any) -> Any:
        try:
            return (await client.get(path, params=params)).raise_for_status().json()
        except httpx.HTTPError as err:
            raise ConfigError(
                f"{client.base_url}: {path} gave no answer ({err or type(err).__name__}); start `genrec serve`, and "
                "where it has keys give one with the scope recommend in --key-file"
            ) from err

    names = [category["name"] for category in (await get("/v1/categories"))["categories"][:CATEGORIES]]
    wanted: list[dict[str, Any]] = [{"category": name} for name in names] or [{}]
    pages = [await get("/v1/items", limit=PER_CATEGORY, **which) for which in wanted]
    return list(dict.fromkeys(item["item_id"] for page in pages for item in page["items"]))


def sender(url: str, timeout_s: float, key: str | None) -> httpx.AsyncClient:
    """A client that sends whatever is due. It keeps `KEPT` idle connections: httpx asks each of them before every
    request whether it still lives, and with the hundreds that an overload leaves that takes 20 ms.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEPT),
        trust_env=False,
    )


def measure(url: str, *, rate: float, seconds: float, users: int, seed: int, deadline_ms: int, key: str | None) -> Load:
    """Run one load test.

    Args:
        url: of a gateway.
        rate: requests a second.
        seconds: how long.
        users: made-up users.
        seed: of arrivals and histories.
        deadline_ms: from the scheduled time; the gateway is asked to answer within `ASKED` of it.
        key: API key with the scope "recommend".

    Raises:
        ConfigError: the gateway does not say what it serves.
    """

    async def whole() -> list[Answer]:
        async with sender(url, deadline_ms / 1000 + GRACE_S, key) as client:
            item_ids = await _item_ids(client)
            timeout_ms = max(1, int(ASKED * deadline_ms))
            wishes = ({"history": h, "timeout_ms": timeout_ms} for h in histories(item_ids, users, seed))
            return await offer(client, poisson(rate, seconds, seed), wishes)

    return summarise(asyncio.run(whole()), rate, seconds, seed, deadline_ms)


def find_capacity(test: Callable[[float], Load], rate: float) -> Load | None:
    """The highest rate at which the gateway still answers enough of the requests in time.

    Args:
        test: measures a rate.
        rate: to begin with; doubled while it holds, halved while it does not, then bisected.

    Returns:
        The load test of that rate; None if even the lowest rate tried fails.
    """
    best: Load | None = None
    low, high = 0.0, float("inf")
    while (high / low if low else float("inf")) > FINER and rate >= 0.1:
        found = test(rate)
        log.info("%.3g/s: %.1f %% in time, p99 %s ms", rate, 100 * found.in_time, found.latency_ms["p99"])
        if found.in_time >= ENOUGH:
            best, low = found, rate
        else:
            high = rate
        rate = 2 * low if high == float("inf") else (low * high) ** 0.5 if low else high / 2
    return best
