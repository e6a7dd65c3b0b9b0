"""The load generator against real servers: its counts are the gateway's, its latencies are those of the users."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from genrec.errors import ConfigError
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.desk import Settings
from genrec.serving.gateway import create_app
from genrec.serving.loadtest import KEPT, Answer, Load, find_capacity, histories, measure, poisson, sender, summarise
from genrec.serving.torch_engine import TorchEngine
from tests.engines import FaultyEngine
from tests.gateway_fixture import ROOT, http, running

ROUTE = 'route="/v1/recommend"'
PLAIN: dict[str, Any] = {"users": 5, "seed": 1, "key": None}


def counted(client, token: str | None = None) -> dict[str, int]:
    """Status -> answers of /v1/recommend, by the gateway's own metrics."""
    header = {} if token is None else {"authorization": f"Bearer {token}"}
    lines = client.get("/metrics", headers=header).text.splitlines()
    found = [line for line in lines if line.startswith("genrec_requests_total{") and ROUTE in line]
    return {line.split('status="')[1].split('"')[0]: int(float(line.rsplit(" ", 1)[1])) for line in found}


def seen(load: Load) -> dict[str, int]:
    """Status -> answers, by the load test."""
    refused = {status: sum(kinds.values()) for status, kinds in load.refused.items()}
    return {"200": load.accepted, **refused}


def test_what_is_counted_is_what_the_gateway_counts(faulty_engine: FaultyEngine, torch_engine: TorchEngine) -> None:
    """An engine that takes 0.2 s for one request, and a queue of two: most of 20 a second must be refused."""
    faulty_engine.delay_s = 0.2
    settings = Settings(max_waiting=2, max_batch=1, window_ms=0, stall_s=1000)
    with running(create_app(faulty_engine, torch_engine.export, settings=settings)) as client:
        load = measure(str(client.base_url), rate=20, seconds=3, deadline_ms=20_000, **PLAIN)
        assert counted(client) == seen(load)
    assert load.offered == len(poisson(20, 3, 1)) == sum(seen(load).values())
    assert load.errors == {}
    assert load.refused["503"]["retry_after"] > 10
    assert load.refused["503"]["bare"] == 0
    assert 1 <= load.accepted <= 3 / 0.2 + 3 + 1  # what the engine can do while it is asked, and what waited
    assert load.fallbacks == load.late == 0
    assert load.in_time == load.accepted / load.offered
    assert sum(len(call) for call in faulty_engine.calls) == load.accepted


def test_fallbacks_and_rates_are_told_apart(faulty_engine: FaultyEngine, torch_engine: TorchEngine, tmp_path) -> None:
    """A hung engine and a tenant's limit of one a second: every list is a fallback, what exceeds the limit a 429."""
    faulty_engine.hang.clear()
    token = add_key(tmp_path / "keys.json", "shop", ["recommend", "metrics"], {"requests_per_s": 2})
    app = create_app(
        faulty_engine, torch_engine.export, keys=Keys(tmp_path / "keys.json"), settings=Settings(stall_s=1000)
    )
    with running(app) as client:
        load = measure(str(client.base_url), rate=20, seconds=2, deadline_ms=300, **{**PLAIN, "key": token})
        assert counted(client, token) == seen(load)
        faulty_engine.hang.set()
    assert load.refused["429"]["retry_after"] > 5
    assert load.accepted == load.fallbacks > 0
    assert load.in_time == 0


def test_capacity_is_what_the_formula_says_and_twice_that_is_refused_cleanly(
    faulty_engine: FaultyEngine, torch_engine: TorchEngine
) -> None:
    """docs/serving.md: max_batch / t, a wait of (max_waiting / max_batch + 1) t at most; the rest: 503 at once."""
    batch, waiting = 4, 8
    faulty_engine.delay_s = 0.4  # far more than the tiny engine takes itself
    settings = Settings(max_waiting=waiting, max_batch=batch, stall_s=1000)
    app = create_app(faulty_engine, torch_engine.export, settings=settings)
    with running(app) as client:
        url = str(client.base_url)
        measure(url, rate=10, seconds=1, deadline_ms=20_000, **PLAIN)  # compiles and warms
        low = measure(url, rate=0.7 * batch / 0.4, seconds=6, deadline_ms=20_000, **PLAIN)
        calm, begun = _engine_seconds(client), len(faulty_engine.calls)
        over = measure(url, rate=2 * batch / 0.4, seconds=6, deadline_ms=20_000, **PLAIN)
        busy = _engine_seconds(client)
        t = (busy[0] - calm[0]) / (busy[1] - calm[1])  # seconds of a call, by the gateway's own metrics
        assert client.get("/readyz").status_code == 200
    capacity, longest_s = batch / t, (waiting / batch + 1) * t
    assert low.in_time > over.in_time  # a machine that stalls sends a burst: even then less than all is refused
    assert over.offered > 1.5 * capacity * 6
    assert low.errors == over.errors == {}
    assert over.refused.keys() == {"503"} >= low.refused.keys()
    assert over.refused["503"]["bare"] == over.fallbacks == over.late == low.fallbacks == low.late == 0
    sizes = [len(call) for call in faulty_engine.calls[begun:]]
    assert np.median(sizes) == max(sizes) == batch  # what makes the capacity: under pressure every call is full
    # no more than 6 s of work and then what waits; how much less is the machine's affair
    assert over.accepted <= (6 + longest_s) * capacity + batch


def _engine_seconds(client) -> tuple[float, float]:
    """Seconds inside the engine, weighted by requests, and requests, of lists so far."""
    values = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    name = 'genrec_stage_seconds_{}{{route="/v1/recommend",stage="engine"}}'
    return float(values[name.format("sum")]), float(values[name.format("count")])


async def _items(_: Request) -> JSONResponse:
    return JSONResponse({"items": [{"item_id": f"item-{i}"} for i in range(9)], "categories": []})


def serial_server(service_s: float) -> Starlette:
    """Works on one request after the other, each for the same time, and lets all others wait."""
    turn = asyncio.Lock()

    async def recommend(_: Request) -> JSONResponse:
        async with turn:
            await asyncio.sleep(service_s)
        return JSONResponse({"items": [], "fallback": False})

    reads = [Route(path, _items) for path in ("/v1/items", "/v1/categories")]
    return Starlette(routes=[*reads, Route("/v1/recommend", recommend, methods=["POST"])])


def test_latency_counts_from_the_scheduled_time() -> None:
    """Twice as many arrive as the server can do: the wait grows with the queue, as Lindley's recursion says.

    A sender that waits for answers before it sends again would report the time of the work alone.
    """
    service_s, arrivals = 0.1, poisson(20, 4, 1)
    done, expected = 0.0, []
    for at in arrivals:
        done = max(at, done) + service_s
        expected.append((done - at) * 1000)
    with running(serial_server(service_s)) as client:
        load = measure(str(client.base_url), rate=20, seconds=4, deadline_ms=1_000, **PLAIN)
    assert load.offered == load.accepted == len(arrivals)
    for name, q in (("p50", 50), ("p90", 90), ("p99", 99)):
        # never shorter than the queue's own wait; sockets and a busy machine add to it
        found, own = load.latency_ms[name], np.percentile(expected, q)
        assert found is not None
        assert found >= own * 0.98
    assert np.percentile(expected, 99) > 10 * service_s * 1000
    assert load.late >= sum(latency > 1_000 for latency in expected)


def test_a_server_that_vanishes_is_counted(tmp_path: Path) -> None:
    with running(serial_server(0.3)) as client:
        url = str(client.base_url)
        hasty = measure(url, rate=10, seconds=1, deadline_ms=1, **PLAIN)
    assert hasty.offered == hasty.accepted == hasty.late
    with pytest.raises(ConfigError, match=r"gave no answer.*genrec serve"):
        measure(url, rate=10, seconds=1, deadline_ms=100, **PLAIN)


def test_idle_connections_of_an_overload_are_closed() -> None:
    """The client asks each of them before every request: hundreds made the sender the slowest part of the test."""
    opened: set[asyncio.StreamWriter] = set()
    everybody = 60

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                while len(opened) < everybody:  # all are under way at once
                    await asyncio.sleep(0.01)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
            closed.append(writer)

    closed: list[asyncio.StreamWriter] = []

    async def whole() -> int:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with sender(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 60, None) as client:
            await asyncio.gather(*(client.get("/") for _ in range(everybody)))
            while len(closed) < everybody - KEPT:
                await asyncio.sleep(0.01)
            assert (await client.get("/")).json() == {}
            open_now = everybody - len(closed)
        server.close()
        return open_now

    assert asyncio.run(asyncio.wait_for(whole(), 60)) == KEPT


def test_every_answer_is_counted_once() -> None:
    answers = [
        Answer(0.010, 0.001, 200),
        Answer(0.030, 0.001, 200, fallback=True),
        Answer(0.200, 0.001, 200),
        Answer(0.001, 0.001, 503, retry_after=True),
        Answer(0.001, 0.001, 503),
        Answer(0.001, 0.001, 429, retry_after=True),
        Answer(0.001, 0.001, 500),
        Answer(9.0, 0.001, None, error="ReadTimeout"),
    ]
    load = summarise(answers, 1, 8, 0, 100)
    assert (load.offered, load.accepted, load.fallbacks, load.late) == (8, 3, 1, 1)
    assert load.refused == {"503": {"retry_after": 1, "bare": 1}, "429": {"retry_after": 1, "bare": 0}}
    assert load.errors == {"HTTP 500": 1, "ReadTimeout": 1}
    assert load.in_time == 1 / 8
    assert (load.latency_ms["p50"], load.latency_ms["max"]) == (30.0, 200.0)
    assert summarise([], 1, 1, 0, 100).latency_ms["p99"] is None


def test_arrivals_are_a_poisson_process() -> None:
    """Mean and variance of the counts per second agree, and the gaps' spread is their mean; a metronome has none."""
    times = poisson(200, 100, 3)
    counts = np.bincount(times.astype(int), minlength=100)
    assert counts.mean() == pytest.approx(200, rel=0.03)  # four standard errors
    assert counts.var() == pytest.approx(200, rel=0.6)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.array_equal(times, poisson(200, 100, 3))
    assert not np.array_equal(times[:50], poisson(200, 100, 4)[:50])


def test_a_user_comes_back_with_one_event_more() -> None:
    made = histories(["a", "b", "c"], 2, 0)
    lists = [next(made) for _ in range(200)]
    assert {len(h) for h in lists} == set(range(1, 31))
    for h in lists:
        assert len(h) == 1 or h[:-1] in lists


@pytest.mark.parametrize("start", [1.0, 37.0, 500.0])
def test_the_capacity_is_found_from_either_side(start: float) -> None:
    def at_rate(rate: float) -> Load:
        answers = [Answer(0.01 if rate <= 37 else 1.0, 0.0, 200)] * 100
        return summarise(answers, rate, 1, 0, 100)

    found = find_capacity(at_rate, start)
    assert found is not None
    assert 37 / 1.1 <= found.rate <= 37


def test_no_rate_holds() -> None:
    assert find_capacity(lambda rate: summarise([Answer(1.0, 0.0, 200)], rate, 1, 0, 100), 5) is None


def test_the_command_prints_and_writes_the_same(torch_engine: TorchEngine, tmp_path: Path) -> None:
    token = add_key(tmp_path / "keys.json", "shop", ["recommend"], {})
    (tmp_path / "key").write_text(token + "\n")
    with running(create_app(torch_engine, torch_engine.export, keys=Keys(tmp_path / "keys.json"))) as client:
        options = ("--rate", "10", "--seconds", "1", "--key-file", str(tmp_path / "key"), "--deadline-ms", "20000")
        command = (sys.executable, "-m", "genrec.cli", "loadtest", str(client.base_url), *options)
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "load.json")], capture_output=True, text=True, cwd=ROOT, check=False
        )
        with http(str(client.base_url)) as anyone:
            assert anyone.get("/v1/items").status_code == 401
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "load.json").read_text())
    assert printed["accepted"] == printed["offered"] == len(poisson(10, 1, 0))
    assert token not in done.stdout + done.stderr
