"""A real server on a real port, with a real engine: answers, hostile input, and that it lives on."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.gateway import MAX_BODY_BYTES, create_app
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import make_export


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> TorchEngine:
    return TorchEngine(Export.load(make_export(tmp_path_factory.mktemp("e"))), "cpu")


@pytest.fixture(scope="module")
def client(engine: TorchEngine) -> Iterator[httpx.Client]:
    config = uvicorn.Config(create_app(engine, engine.export), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
        yield http
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def lists_still_work(client: httpx.Client) -> None:
    answer = client.post("/v1/recommend", json={"history": ["item-1"], "k": 3})
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3


def test_health(client: httpx.Client, engine: TorchEngine) -> None:
    found = client.get("/healthz").json()
    assert found["status"] == "ok"
    assert found["items"] == 60
    assert found["export"] == engine.export.manifest["key"][:12]


def test_lists_are_the_engines(client: httpx.Client, engine: TorchEngine) -> None:
    body = {"history": ["item-1", "item-8"], "k": 7, "beams": 60, "price_min": 10, "price_max": 90.5}
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["engine"], found["export"]) == ("torch", engine.export.manifest["key"][:12])
    (expected,) = engine.recommend([RecommendRequest(["item-1", "item-8"], 7, 60, price_min=10, price_max=90.5)])
    titles = engine.export.catalogue.titles
    assert found["items"] == [
        {
            "item_id": item.item_id,
            "title": titles[int(item.item_id[5:])],
            "score": pytest.approx(item.score),
            "rank": item.rank,
        }
        for item in expected
    ]


def test_no_legal_item_is_an_empty_list(client: httpx.Client) -> None:
    body = {"history": ["item-1"], "allow": ["item-1"]}
    assert client.post("/v1/recommend", json=body).json()["items"] == []


def test_texts_are_the_engines(client: httpx.Client, engine: TorchEngine) -> None:
    body = {"item_id": "item-3", "history": ["item-1"], "max_tokens": 5, "temperature": 0.5, "seed": 4}
    found = client.post("/v1/describe", json=body).json()
    (expected,) = engine.generate([TextRequest("item-3", ["item-1"], 5, 0.5, 4)])
    assert (found["text"], found["finish_reason"]) == (expected.text, expected.finish_reason)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("recommend", {"history": ["item-1", "nope"]}, "'nope'"),
        ("recommend", {"history": ["<|sid_0_1|>", "<|end|>"]}, "'<|sid_0_1|>', '<|end|>'"),
        ("recommend", {"history": ["item-1\u0000", "' OR 1=1"]}, r"'item-1\x00'"),
        ("recommend", {}, "body.history: Field required"),
        ("recommend", {"history": "item-1"}, "body.history: Input should be a valid list"),
        ("recommend", {"history": [1]}, "body.history.0: Input should be a valid string"),
        ("recommend", {"history": [""]}, "at least 1 character"),
        ("recommend", {"history": ["x" * 257]}, "at most 256 characters"),
        ("recommend", {"history": ["item-1"] * 501}, "at most 500 items"),
        ("recommend", {"history": [], "k": 10**9}, "body.k: Input should be less than or equal to 100"),
        ("recommend", {"history": [], "k": 0}, "body.k: Input should be greater than or equal to 1"),
        ("recommend", {"history": [], "k": "5"}, "body.k: Input should be a valid integer"),
        ("recommend", {"history": [], "k": True}, "body.k: Input should be a valid integer"),
        ("recommend", {"history": [], "beams": 201}, "body.beams: Input should be less than or equal to 200"),
        ("recommend", {"history": [], "allow": ["item-1"] * 1001}, "at most 1000 items"),
        ("recommend", {"history": [], "categories": ["lamps"]}, "did you mean 'lamp'"),
        ("recommend", {"history": [], "price_min": -1}, "body.price_min"),
        ("recommend", {"history": [], "top_k": 5}, "body.top_k: Extra inputs are not permitted"),
        ("recommend", [1, 2], "body: Input should be a valid dictionary"),
        ("describe", {"item_id": "nope"}, "'nope'"),
        ("describe", {"item_id": "item-1", "max_tokens": 10**9}, "body.max_tokens"),
        ("describe", {"item_id": "item-1", "temperature": 99}, "body.temperature"),
        ("describe", {"item_id": "item-1", "seed": 2**80}, "body.seed"),
    ],
)
def test_bad_requests_say_what_is_wrong(client: httpx.Client, path: str, body, message: str) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 422
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]
    assert len(answer.content) < 2000
    lists_still_work(client)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"history": ["\\ud800"]}',
        b'{"history": [], "price_min": NaN}',
        b'{"history": [], "price_max": 1e999}',
        b'{"history": [], "k": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_json_are_refused(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]
    lists_still_work(client)


def test_too_large_bodies_are_refused(client: httpx.Client) -> None:
    large = json.dumps({"history": ["x" * 1_000_000]}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, pieces()):  # the second announces no length
        with httpx.Client(base_url=client.base_url, timeout=30, trust_env=False) as http:
            answer = http.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert f"more than {MAX_BODY_BYTES} bytes" in answer.json()["error"]
        lists_still_work(client)


def test_other_paths_and_methods(client: httpx.Client) -> None:
    assert client.get("/v1/recommend").status_code == 405
    assert client.get("/nothing").json() == {"error": "Not Found"}
    assert client.post("/v1/recommend", content=b"x=1").status_code == 422


def test_many_at_once_get_their_own_answers(client: httpx.Client, engine: TorchEngine) -> None:
    histories = [[f"item-{row}"] for row in range(12)]

    def ask(history: list[str]) -> list[str]:
        found = client.post("/v1/recommend", json={"history": history, "k": 5}).json()
        return [item["item_id"] for item in found["items"]]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, histories))
    expected = engine.recommend([RecommendRequest(history, 5) for history in histories])
    assert answers == [[item.item_id for item in items] for items in expected]


def test_a_bug_is_a_500_and_the_server_lives_on(client: httpx.Client, engine, monkeypatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(engine, "recommend", broken)
    answer = client.post("/v1/recommend", json={"history": []})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "internal error" in answer.json()["error"]
    monkeypatch.undo()
    lists_still_work(client)
