"""A real server on a real port, with a real engine: answers, hostile input, and that it lives on."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from genrec.prompts import prompt_version
from genrec.serving.body_limit import MAX_BODY_BYTES
from genrec.serving.desk import Settings
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.gateway import create_app
from genrec.serving.resolve import text_prompt
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.gateway_fixture import running, until


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[UserStore]:
    made = UserStore(f"sqlite:///{tmp_path_factory.mktemp('s')}/users.sqlite3")
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(torch_engine: TorchEngine, store: UserStore) -> Iterator[httpx.Client]:
    with running(create_app(torch_engine, torch_engine.export, store=store)) as http:
        yield http


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def lists_still_work(client: httpx.Client) -> None:
    answer = client.post("/v1/recommend", json={"history": ["item-1"], "k": 3})
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3


def test_health(client: httpx.Client, torch_engine: TorchEngine) -> None:
    found = client.get("/healthz").json()
    assert found["status"] == "ok"
    assert found["items"] == 60
    assert found["tasks"] == []
    assert found["export"] == torch_engine.export.manifest["key"][:12]


def test_lists_are_the_engines(client: httpx.Client, torch_engine: TorchEngine) -> None:
    body = {"history": ["item-1", "item-8"], "k": 7, "beams": 60, "price_min": 10, "price_max": 90.5}
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["engine"], found["export"]) == ("torch", torch_engine.export.manifest["key"][:12])
    (expected,) = torch_engine.recommend([RecommendRequest(["item-1", "item-8"], 7, 60, price_min=10, price_max=90.5)])
    titles = torch_engine.export.catalogue.titles
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


def test_texts_are_the_engines(client: httpx.Client, torch_engine: TorchEngine) -> None:
    body = {"item_id": "item-3", "history": ["item-1"], "max_tokens": 5, "temperature": 0.5, "seed": 4}
    found = client.post("/v1/describe", json=body).json()
    (expected,) = torch_engine.generate([TextRequest("item-3", ["item-1"], 5, 0.5, 4)])
    assert (found["text"], found["finish_reason"]) == (expected.text, expected.finish_reason)
    assert (found["provenance"]["user"], found["provenance"]["seed"]) == (None, 4)
    assert found["provenance"]["prompt"] == prompt_version("describe")
    wish = {"item_id": "item-3", "history": ["item-1"], "max_tokens": 5, "task": "explain", "style": "long playful"}
    (expected,) = torch_engine.generate([TextRequest("item-3", ["item-1"], 5, task="explain", style="long playful")])
    assert client.post("/v1/describe", json=wish).json()["text"] == expected.text
    for name in ("task", "style"):
        assert client.post("/v1/describe", json={**wish, name: "haiku"}).status_code == 422


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("recommend", {"history": ["item-1", "nope"]}, "'nope'"),
        ("recommend", {"history": ["<|sid_0_1|>", "<|end|>"]}, "'<|sid_0_1|>', '<|end|>'"),
        ("recommend", {"history": ["item-1\u0000", "' OR 1=1"]}, r"'item-1\x00'"),
        ("recommend", {}, "give `history` (empty for a new user), `user_id`, or both"),
        ("recommend", {"user_id": ""}, "body.user_id: String should have at least 1 character"),
        ("recommend", {"user_id": "a\u0000b"}, "body.user_id: String should match pattern"),
        ("recommend", {"history": [], "timeout_ms": 30_001}, "body.timeout_ms: Input should be less than"),
        ("recommend", {"history": [], "timeout_ms": 0}, "body.timeout_ms: Input should be greater than"),
        ("recommend", {"history": [], "deny": ["item-1"]}, "body.deny: Extra inputs are not permitted"),
        ("recommend", {"history": [], "allow": ["nope"]}, "'nope'"),
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
        ("events", {"events": []}, "body.events: List should have at least 1 item"),
        ("events", {"events": [{"user_id": "ann", "item_id": "nope"}]}, "'nope'"),
        ("events", {"events": [{"user_id": "ann", "item_id": "item-1", "timestamp": -1}]}, "body.events.0.timestamp"),
        ("events", {"events": [{"user_id": "x" * 257, "item_id": "item-1"}]}, "body.events.0.user_id"),
        ("events", {"events": [{"user_id": "ann", "item_id": "item-1"}] * 1001}, "at most 1000 items"),
        ("items", {"disable": ["nope"]}, "'nope'"),
        ("items", {"disable": ["item-1"], "enable": ["item-1"]}, "'item-1' is in `disable` and in `enable`"),
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


def test_many_at_once_get_their_own_answers(client: httpx.Client, torch_engine: TorchEngine) -> None:
    histories = [[f"item-{row}"] for row in range(12)]

    def ask(history: list[str]) -> list[str]:
        found = client.post("/v1/recommend", json={"history": history, "k": 5}).json()
        return [item["item_id"] for item in found["items"]]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, histories))
    expected = torch_engine.recommend([RecommendRequest(history, 5) for history in histories])
    assert answers == [[item.item_id for item in items] for items in expected]


def test_a_stored_user_gets_the_list_of_the_same_history(client: httpx.Client, torch_engine: TorchEngine) -> None:
    events = [{"user_id": "ann", "item_id": f"item-{row}", "timestamp": 10 + row} for row in (1, 8, 12)]
    answer = client.post("/v1/events", json={"events": events})
    assert answer.json() == {"stored": 3, "duplicates": 0}
    for more in ([], ["item-20"]):
        (expected,) = torch_engine.recommend([RecommendRequest(["item-1", "item-8", "item-12", *more], 6)])
        body = {"user_id": "ann", "k": 6, **({"history": more} if more else {})}
        assert ids(client.post("/v1/recommend", json=body)) == [item.item_id for item in expected]
    body = {"user_id": "ann", "item_id": "item-3", "max_tokens": 4}
    (text,) = torch_engine.generate([TextRequest("item-3", ["item-1", "item-8", "item-12"], 4)])
    found = client.post("/v1/describe", json=body).json()
    assert found["text"] == text.text
    origin = found["provenance"]
    assert (origin["generated"], origin["item_id"], origin["export"]) == (True, "item-3", found["export"])
    assert "ann" not in str(origin)
    assert len(origin["user"]) == 16


def test_a_poisoned_title_forges_nothing(client: httpx.Client, torch_engine: TorchEngine) -> None:
    """item-0's title spells control tokens: its prompt holds as many as any other's, and texts about it none."""
    export = torch_engine.export
    assert "<|sid_0_1|>" in export.catalogue.titles[0]

    def control(item: str) -> int:
        prompt = text_prompt(export, TextRequest(item, ["item-9"]), 1024)
        return sum(token >= export.layout.base_vocab or token == export.layout.eos for token in prompt.input_ids)

    assert control("item-0") == control("item-4") > 0
    for seed in range(10):
        body = {"item_id": "item-0", "history": ["item-0"], "max_tokens": 40, "temperature": 2.0, "seed": seed}
        text = client.post("/v1/describe", json=body).json()["text"]
        assert text
        assert not [token for token in export.layout.token_strings() if token in text]


def test_an_unknown_user_is_a_new_user(client: httpx.Client) -> None:
    new = client.post("/v1/recommend", json={"history": []})
    assert ids(client.post("/v1/recommend", json={"user_id": "nobody"})) == ids(new)


def test_events_with_a_name_are_stored_once(client: httpx.Client, store: UserStore) -> None:
    event = {"user_id": "bob", "item_id": "item-5", "event_id": "click-1"}
    assert client.post("/v1/events", json={"events": [event]}).json() == {"stored": 1, "duplicates": 0}
    assert client.post("/v1/events", json={"events": [event, event]}).json() == {"stored": 0, "duplicates": 2}
    assert store.newest("local", "bob", 9) == ["item-5"]


def test_events_are_all_stored_or_none(client: httpx.Client, store: UserStore) -> None:
    events = [{"user_id": "eve", "item_id": "item-1"}, {"user_id": "eve", "item_id": "nope"}]
    assert client.post("/v1/events", json={"events": events}).status_code == 422
    assert store.newest("local", "eve", 9) == []


def test_stored_items_that_left_the_catalogue_are_skipped(client: httpx.Client, store: UserStore) -> None:
    client.post("/v1/events", json={"events": [{"user_id": "old", "item_id": "item-2", "timestamp": 1}]})
    with store.database.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO genrec_events (tenant, user_id, item_id, time) VALUES ('local', 'old', 'sold out', 2)"
        )
    expected = ids(client.post("/v1/recommend", json={"history": ["item-2"]}))
    assert ids(client.post("/v1/recommend", json={"user_id": "old"})) == expected


def test_disabled_items_leave_every_list_at_once_and_cost_no_place(
    client: httpx.Client, torch_engine: TorchEngine
) -> None:
    body = {"history": ["item-1"], "k": 20}
    before = ids(client.post("/v1/recommend", json=body))
    assert client.post("/v1/items", json={"disable": before[:5]}).json()["disabled"] == 5
    try:
        after = ids(client.post("/v1/recommend", json=body))
        rows = frozenset(torch_engine.export.catalogue.index[item] for item in before[:5])
        (expected,) = torch_engine.recommend([RecommendRequest(["item-1"], 20, deny=rows)])
        assert after == [item.item_id for item in expected]
        assert after[:15] == before[5:]
        assert client.post("/v1/items", json={}).json()["disabled"] == 5
        assert client.post("/v1/items", json={"enable": before[1:3]}).json()["disabled"] == 3
        assert ids(client.post("/v1/recommend", json=body))[:2] == before[1:3]
    finally:
        client.post("/v1/items", json={"enable": before[:5]})
    assert ids(client.post("/v1/recommend", json=body)) == before


def test_disabled_items_outlive_a_restart_and_reach_other_gateways(torch_engine: TorchEngine, store: UserStore) -> None:
    with running(
        create_app(torch_engine, torch_engine.export, store=store, settings=Settings(refresh_s=0.05))
    ) as first:
        item = ids(first.post("/v1/recommend", json={"history": []}))[0]
        with running(create_app(torch_engine, torch_engine.export, store=store)) as second:
            second.post("/v1/items", json={"disable": [item]})
            until(lambda: item not in ids(first.post("/v1/recommend", json={"history": []})), "the first to see it")
    with running(create_app(torch_engine, torch_engine.export, store=store)) as third:
        assert item not in ids(third.post("/v1/recommend", json={"history": []}))
        third.post("/v1/items", json={"enable": [item]})
        assert item in ids(third.post("/v1/recommend", json={"history": []}))


def test_without_a_store_there_are_no_users(torch_engine: TorchEngine) -> None:
    with running(create_app(torch_engine, torch_engine.export)) as http:
        answers = [
            http.post("/v1/recommend", json={"user_id": "ann"}),
            http.post("/v1/events", json={"events": [{"user_id": "ann", "item_id": "item-1"}]}),
        ]
        for answer in answers:
            assert answer.status_code == 422
            assert "--store" in answer.json()["error"]
        assert http.post("/v1/items", json={"disable": ["item-1"]}).json()["disabled"] == 1


def test_ready_and_documented(client: httpx.Client) -> None:
    assert client.get("/readyz").json() == {"ready": True, "reasons": []}
    document = client.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/describe", "/v1/events", "/v1/items", "/metrics"} <= document["paths"].keys()
    assert client.get("/docs").status_code == 200
    assert client.get("/redoc").status_code == 404


def test_pages_of_other_sites_are_not_answered(client: httpx.Client) -> None:
    """CORS is off: no preflight is granted, and a form's content type is no JSON."""
    origin = {"origin": "https://evil.example"}
    wish = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert client.options("/v1/recommend", headers=wish).status_code == 405
    plain = client.post("/v1/recommend", content=b'{"history": []}', headers={**origin, "content-type": "text/plain"})
    assert plain.status_code == 422
    answer = client.post("/v1/recommend", json={"history": []}, headers=origin)
    assert not [name for name in answer.headers if name.startswith("access-control")]
