"""Sent items on a real SQLite file and a real PostgreSQL server: order, conflicts, pictures, kill -9."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from genrec.serving.stored_items import ConflictError, StoredItem, StoredItems
from genrec.serving.user_store import UserStore
from tests.gateway_fixture import PATIENCE_S, Process, http
from tests.growing_export import make_parts, picture, write

GATEWAY = str(Path(__file__).with_name("gateway_process.py"))


@pytest.fixture
def items(url: str) -> Iterator[StoredItems]:
    store = UserStore(url)
    made = StoredItems(store)
    with store.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM genrec_items")
    yield made
    store.close()


def item(item_id: str, title: str = "lamp", image: bytes | None = None) -> StoredItem:
    features = {"text": np.arange(3, dtype=np.float32)[None] + len(title)}
    return StoredItem(item_id, {"title": title, "price": None}, image, "key", np.array([1, 2, 3], np.int32), features)


def test_items_come_back_as_they_were_and_in_the_order_of_their_first_arrival(items: StoredItems) -> None:
    assert items.newer(0) == ([], 0)
    assert items.write([item("b", image=picture(1)), item("a", "'; DROP TABLE genrec_items; --")], 0) == 1
    assert items.write([item("c")], 1) == 2
    assert items.write([item("b", "new lamp")], 2) == 3
    found, version = items.newer(0)
    assert ([one.item_id for one in found], version) == (["b", "a", "c"], 3)
    assert found[0].fields == {"title": "new lamp", "price": None}
    assert found[0].picture == picture(1)  # none was sent the second time
    assert found[1].fields["title"] == "'; DROP TABLE genrec_items; --"
    np.testing.assert_array_equal(found[0].features["text"], [[8, 9, 10]])
    np.testing.assert_array_equal(found[0].codes, [1, 2, 3])
    assert found[0].codes.dtype == np.int32
    newer, version = items.newer(2)
    assert ([one.item_id for one in newer], version) == (["b"], 3)
    assert items.newer(3) == ([], 3)


def test_who_has_not_read_everything_may_not_write(items: StoredItems) -> None:
    items.write([item("a")], 0)
    for version in (0, 2):
        with pytest.raises(ConflictError):
            items.write([item("b")], version)
    assert [one.item_id for one in items.newer(0)[0]] == ["a"]


def test_of_writers_at_once_one_wins_each_turn(items: StoredItems, url: str) -> None:
    won: list[str] = []
    stores = [UserStore(url) for _ in range(4)]

    def write(name: int) -> None:
        mine, version = StoredItems(stores[name]), 0
        for turn in range(12):
            try:
                version = mine.write([item(f"{name}-{turn}")], version)
                won.append(f"{name}-{turn}")
            except ConflictError:
                version = mine.newer(version)[1]

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for store in stores:
        store.close()
    found, version = items.newer(0)
    assert sorted(one.item_id for one in found) == sorted(won)
    assert version == len(won) >= 12


def test_kill_9_right_after_a_200_loses_no_item(items: StoredItems, url: str, tmp_path: Path) -> None:
    folder = write(make_parts(tmp_path), tmp_path)
    process = Process(tmp_path / "1.log", GATEWAY, str(folder), url, "0")
    known: list[str] = []

    def send() -> None:
        with http(address) as client:
            for turn in range(10_000):
                sent = {"item_id": f"{kind}-{turn}", "title": f"blue lamp {turn}"}
                if turn % 2:
                    sent["picture"] = base64.b64encode(picture(turn)).decode()
                try:
                    answer = client.post("/v1/items", json={"upsert": [sent]})
                except httpx.TransportError:
                    return
                assert answer.status_code == 200, answer.text
                known.append(sent["item_id"])

    kind = url.split(":")[0]
    try:
        address = process.url()
        sender = threading.Thread(target=send)
        sender.start()
        deadline = time.monotonic() + PATIENCE_S
        while len(known) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
    sender.join(PATIENCE_S)
    assert len(known) >= 8
    again = Process(tmp_path / "2.log", GATEWAY, str(folder), url, "0")
    try:
        with http(again.url()) as client:
            found = client.get("/v1/items", params={"item_id": known}).json()["items"]
            body = {"history": [], "allow": known, "k": 100}
            listed = {one["item_id"] for one in client.post("/v1/recommend", json=body).json()["items"]}
            assert client.get(found[1]["image"]).status_code == 200
    finally:
        again.kill()
    assert [one["item_id"] for one in found] == known
    assert listed == set(known)
