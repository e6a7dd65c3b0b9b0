"""The gateway when something breaks: late, hung and failing engines, slow clients, a store that is locked or gone.

The engine is a real one behind a switch; servers, sockets and the database are real.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from genrec.serving import user_store
from genrec.serving.connections import PatientProtocol
from genrec.serving.desk import Settings
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.engines import FaultyEngine
from tests.gateway_fixture import PATIENCE_S, connect, head, received, running, until

QUICK = Settings(window_ms=0, stall_s=1000, probe_s=0.05, body_timeout_s=0.5, max_waiting=2)
ASK: dict[str, Any] = {"history": ["item-1"], "k": 5}


@pytest.fixture
def client(faulty_engine: FaultyEngine, torch_engine: TorchEngine) -> Iterator[httpx.Client]:
    with running(create_app(faulty_engine, torch_engine.export, settings=QUICK)) as http:
        yield http
        faulty_engine.hang.set()


def recommend(client: httpx.Client, **fields) -> httpx.Response:
    return client.post("/v1/recommend", json={**ASK, **fields})


def metric(client: httpx.Client, name: str) -> float:
    """A sample's value, 0 where there is none yet."""
    values = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(values.get(name, 0))


def popular(export: Export, legal) -> list[str]:
    """By brute force: the most popular legal items, the earlier row first among equals."""
    rows = [row for row, item in enumerate(export.catalogue.item_ids) if export.catalogue.available[row] and legal(row)]
    rows.sort(key=lambda row: (-export.popularity[row], row))
    return [export.catalogue.item_ids[row] for row in rows]


# -- the engine --------------------------------------------------------------------------------------------------


def test_a_late_engine_gives_popular_items_within_the_deadline(client, faulty_engine, torch_engine) -> None:
    faulty_engine.hang.clear()
    started = time.monotonic()
    fields = {"k": 4, "timeout_ms": 150, "price_max": 50.0, "categories": ["lamp", "sofa"]}
    answer = recommend(client, history=["item-4"], **fields).json()
    assert time.monotonic() - started < PATIENCE_S / 2  # the engine never returns
    assert (answer["fallback"], answer["reason"]) == (True, "deadline")
    catalogue = torch_engine.export.catalogue
    prices = catalogue.prices

    def legal(row: int) -> bool:
        wanted = {"lamp", "sofa"} & set(catalogue.categories[row])
        return row != 4 and bool(wanted) and not np.isnan(prices[row]) and prices[row] <= 50

    assert [item["item_id"] for item in answer["items"]] == popular(torch_engine.export, legal)[:4]
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4]
    counts = torch_engine.export.popularity + 1.0
    rows = [catalogue.index[item["item_id"]] for item in answer["items"]]
    assert [item["score"] for item in answer["items"]] == pytest.approx(np.log(counts[rows] / counts.sum()))
    faulty_engine.hang.set()
    until(lambda: not recommend(client).json()["fallback"], "the engine to answer again")


def test_a_fallback_holds_no_disabled_item(client, faulty_engine, torch_engine) -> None:
    first = popular(torch_engine.export, lambda row: row != 1)[0]
    client.post("/v1/items", json={"disable": [first]})
    faulty_engine.hang.clear()
    items = recommend(client, timeout_ms=50).json()["items"]
    assert [item["item_id"] for item in items] == popular(torch_engine.export, lambda row: row != 1)[1:6]


def test_a_hung_engine_holds_nobody(client, faulty_engine) -> None:
    """Many requests with deadlines against an engine that never returns: all are answered, the queue is bounded."""
    faulty_engine.hang.clear()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: recommend(client, timeout_ms=200), range(24)))
    assert {answer.status_code for answer in found} <= {200, 503}
    assert all(answer.json()["reason"] == "deadline" for answer in found if answer.status_code == 200)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in found if answer.status_code == 503)
    assert {answer.status_code for answer in found} == {200, 503}  # 12 at once, 2 may wait


def test_a_stalled_engine_is_passed_by_and_says_so(faulty_engine, torch_engine) -> None:
    settings = QUICK.model_copy(update={"stall_s": 0.1})
    with running(create_app(faulty_engine, torch_engine.export, settings=settings)) as client:
        faulty_engine.hang.clear()
        assert recommend(client, timeout_ms=30).json()["reason"] == "deadline"
        until(lambda: client.get("/readyz").status_code == 503, "readyz to see the stall")
        assert client.get("/readyz").json() == {"ready": False, "reasons": ["the engine hangs"]}
        assert client.get("/healthz").status_code == 200
        answer = recommend(client, timeout_ms=30_000).json()  # nobody waits half a minute for a hung engine
        assert (answer["fallback"], answer["reason"]) == (True, "engine_stalled")
        text = client.post("/v1/describe", json={"item_id": "item-1"})
        assert text.status_code == 503
        assert text.headers["retry-after"] == "5"
        faulty_engine.hang.set()
        until(lambda: client.get("/readyz").status_code == 200, "the engine to be well again")
        assert not recommend(client).json()["fallback"]


def test_a_failing_engine_gives_popular_items_and_is_not_ready_until_it_is_well(
    client, faulty_engine, torch_engine
) -> None:
    faulty_engine.error = RuntimeError("secret detail of item-1")
    answer = recommend(client)
    assert answer.status_code == 200
    assert (answer.json()["fallback"], answer.json()["reason"]) == (True, "engine_error")
    assert "secret" not in answer.text
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "reasons": ["the engine's last call failed"]}
    text = client.post("/v1/describe", json={"item_id": "item-1", "max_tokens": 2})
    assert (text.status_code, text.json()) == (500, {"error": "internal error; the server's log says more"})
    faulty_engine.error = None
    until(lambda: client.get("/readyz").status_code == 200, "the probes to succeed")
    (expected,) = torch_engine.recommend([RecommendRequest(**ASK)])
    assert [item["item_id"] for item in recommend(client).json()["items"]] == [item.item_id for item in expected]


def test_a_late_text_is_a_504(client, faulty_engine) -> None:
    faulty_engine.hang.clear()
    answer = client.post("/v1/describe", json={"item_id": "item-1", "timeout_ms": 50})
    assert answer.status_code == 504
    assert "deadline" in answer.json()["error"]


def test_a_client_that_leaves_frees_its_place(client, faulty_engine) -> None:
    faulty_engine.hang.clear()
    body = json.dumps({**ASK, "timeout_ms": 30_000}).encode()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(recommend, client, timeout_ms=30_000)
        faulty_engine.inside.acquire()
        left = [connect(client) for _ in range(QUICK.max_waiting)]
        for connection in left:
            connection.sendall(head("/v1/recommend", len(body)) + body)
        until(lambda: metric(client, "genrec_queue_length") == len(left), "the queue to be full")
        assert recommend(client).status_code == 503
        for connection in left:
            connection.close()
        until(lambda: metric(client, "genrec_queue_length") == 0, "the queue to be empty")
        assert metric(client, 'genrec_cancelled_total{route="/v1/recommend"}') == len(left)
        faulty_engine.hang.set()
        assert not busy.result(PATIENCE_S).json()["fallback"]
    assert len(faulty_engine.calls) == 1  # the engine never saw those who left


def test_an_item_disabled_while_the_engine_works_is_not_answered(client, faulty_engine, torch_engine) -> None:
    first = torch_engine.recommend([RecommendRequest(**ASK)])[0][0].item_id
    faulty_engine.hang.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(recommend, client, timeout_ms=30_000)
        faulty_engine.inside.acquire()  # the engine has begun with the item
        assert client.post("/v1/items", json={"disable": [first]}).json()["disabled"] == 1
        faulty_engine.hang.set()
        found = answer.result(PATIENCE_S).json()
    row = torch_engine.export.catalogue.index[first]
    (expected,) = torch_engine.recommend([RecommendRequest(**ASK, deny=frozenset({row}))])
    assert [item["item_id"] for item in found["items"]] == [item.item_id for item in expected]
    assert not found["fallback"]


def test_lists_are_whole_while_items_are_switched_all_the_time(client, torch_engine) -> None:
    """Two items change places: every list holds one of them and never both or none."""
    a, b = (item.item_id for item in torch_engine.recommend([RecommendRequest(**ASK)])[0][:2])
    client.post("/v1/items", json={"disable": [a]})
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            client.post("/v1/items", json={"disable": [b], "enable": [a]})
            client.post("/v1/items", json={"disable": [a], "enable": [b]})

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        answers = [recommend(client) for _ in range(30)]
    finally:
        stop.set()
        switching.join()
    assert {answer.status_code for answer in answers} <= {200, 408, 503}  # a busy machine may be too late for some
    lists = [{item["item_id"] for item in answer.json()["items"]} for answer in answers if answer.status_code == 200]
    assert lists
    assert {len(found & {a, b}) for found in lists} == {1}


# -- clients -----------------------------------------------------------------------------------------------------


def test_half_a_body_then_silence_is_a_408(client) -> None:
    with connect(client) as connection:
        connection.sendall(head("/v1/recommend", 100) + b'{"history": [')
        found = received(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.5 s" in found
    assert recommend(client).status_code == 200


def test_half_a_body_then_goodbye_is_nothing(client) -> None:
    with connect(client) as connection:
        connection.sendall(head("/v1/recommend", 100) + b'{"history": [')
    assert recommend(client).status_code == 200


def test_a_byte_at_a_time_is_a_408_in_the_same_time(client) -> None:
    with connect(client) as connection:
        connection.sendall(head("/v1/recommend", 10_000))
        sent = 0
        connection.settimeout(0.05)
        found = b""
        while not found and sent < 10_000:
            connection.sendall(b" ")
            sent += 1
            try:
                found = connection.recv(100)
            except TimeoutError:
                continue
    assert found.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_never_ends_is_closed(client, monkeypatch) -> None:
    monkeypatch.setattr(PatientProtocol, "head_s", 0.3)
    for start in (b"", b"POST /v1/recommend HTT", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"):
        with connect(client) as connection:
            connection.sendall(start)
            assert received(connection) == b""
    assert recommend(client).status_code == 200


def test_a_head_that_is_too_long_is_refused(client) -> None:
    with connect(client) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000)
        assert received(connection)[:13] in (b"HTTP/1.1 400 ", b"")
    assert recommend(client).status_code == 200


def test_a_reader_that_takes_a_byte_at_a_time_is_closed(client, monkeypatch) -> None:
    """Answers that nobody reads pile up until the buffers are full; then the connection goes."""
    monkeypatch.setattr(PatientProtocol, "read_s", 0.3)
    request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connect(client) as connection:
        connection.settimeout(0.01)
        deadline, closed = time.monotonic() + PATIENCE_S, False
        while not closed and time.monotonic() < deadline:
            try:
                connection.sendall(request)
            except TimeoutError:
                pass
            except OSError:
                closed = True
            try:
                connection.recv(1)
            except TimeoutError:
                pass
            except OSError:
                closed = True
        assert closed
    assert recommend(client).status_code == 200


# -- the store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(torch_engine, tmp_path: Path, monkeypatch) -> Iterator[tuple[httpx.Client, Path]]:
    monkeypatch.setattr(user_store, "LOCK_TIMEOUT_S", 0.2)
    file = tmp_path / "users.sqlite3"
    store = UserStore(f"sqlite:///{file}")
    with running(create_app(torch_engine, torch_engine.export, store=store)) as http:
        yield http, file
    store.close()


def click(client: httpx.Client, item: str = "item-1") -> httpx.Response:
    return client.post("/v1/events", json={"events": [{"user_id": "ann", "item_id": item, "event_id": item}]})


def test_a_locked_store_is_a_503_for_writers_only(stored) -> None:
    client, file = stored
    assert click(client).status_code == 200
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = click(client, "item-2")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json() == {"error": "the user store is locked; try again"}
        assert client.post("/v1/items", json={"disable": ["item-1"]}).status_code == 503
        assert client.post("/v1/recommend", json={"user_id": "ann"}).status_code == 200
        other.execute("ROLLBACK")
    assert click(client, "item-2").json() == {"stored": 1, "duplicates": 0}
    assert metric(client, 'genrec_store_errors_total{kind="locked"}') == 2


def test_a_store_that_is_gone_is_a_503_and_histories_still_work(stored) -> None:
    client, file = stored
    file.unlink()
    for answer in (click(client), client.post("/v1/recommend", json={"user_id": "ann"})):
        assert answer.status_code == 503
        assert answer.json() == {"error": "the user store is gone; try again"}
        assert str(file) not in answer.text
    assert recommend(client).status_code == 200


def test_a_store_that_hangs_is_a_503_within_its_time(torch_engine, tmp_path: Path) -> None:
    store = UserStore(f"sqlite:///{tmp_path}/users.sqlite3")
    settings = Settings(store_timeout_s=0.2, store_threads=1, store_waiting=8)
    app = create_app(torch_engine, torch_engine.export, store=store, settings=settings)
    held = threading.Event()
    app.state.gateway.pool.submit(lambda: held.wait(PATIENCE_S))  # the only thread hangs
    with running(app) as client:
        assert click(client).status_code == 503
        ask = {"user_id": "ann", "timeout_ms": 100}
        late = client.post("/v1/recommend", json=ask)
        assert late.status_code == 504  # popular items might be those that the user has seen
        assert "history was not read before the deadline" in late.json()["error"]
        assert recommend(client).status_code == 200
        held.set()
        until(lambda: click(client, "item-9").status_code == 200, "the store to answer again")
    store.close()
