"""Requests made from the gateway's own OpenAPI document, against a real server with a real engine, store and keys.

GENREC_FUZZ_CASES=5000 asks for more cases in all; the test run's number keeps it short.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from genrec.prompts import Prompter
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.chat import Chat
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.export_fixture import make_export
from tests.gateway_fixture import http, running
from tests.growing_export import make_parts, write
from tests.understanding import understand

CASES = int(os.environ.get("GENREC_FUZZ_CASES", "300"))
ROUTES = (
    "POST /v1/recommend",
    "POST /v1/describe",
    "POST /v1/chat/completions",
    "POST /v1/events",
    "POST /v1/items",
)
READS = (
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
    "GET /v1/items",
    "GET /v1/items/{item_id}/image",
    "GET /v1/categories",
    "GET /v1/users",
    "GET /v1/users/{user_id}/history",
)
TIGHT_MS = 2_000  # a deadline that a busy machine may miss


def no_server_error(context, response, case) -> None:
    """No 5xx but the one that a tight deadline asks for."""
    body = case.body if isinstance(case.body, dict) else {}
    extension = body.get("genrec") or {}
    timeout_ms = body.get("timeout_ms", extension.get("timeout_ms") if isinstance(extension, dict) else None)
    if not (response.status_code == 504 and isinstance(timeout_ms, int) and timeout_ms < TIGHT_MS):
        schemathesis.checks.not_a_server_error(context, response, case)


def no_bad_body_accepted(context, response, case) -> None:
    """A body that breaks the document is refused; if only for its size, that will do."""
    if response.status_code != 413:
        negative_data_rejection(context, response, case)


CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    no_bad_body_accepted,
    unsupported_method,
    ignored_auth,
]
QUIET = settings(
    max_examples=max(1, CASES // len(ROUTES)),
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Export:
    return Export.load(make_export(tmp_path_factory.mktemp("e")))


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Iterator[httpx.Client]:
    """A gateway that takes items, apart: nobody else knows what it holds."""
    folder = tmp_path_factory.mktemp("growing")
    with authorised(Export.load(write(make_parts(folder), folder)), folder) as client:
        yield client


@pytest.fixture(scope="module")
def client(export: Export, tmp_path_factory) -> Iterator[httpx.Client]:
    with authorised(export, tmp_path_factory.mktemp("fuzz")) as client:
        yield client


@contextmanager
def authorised(export: Export, folder: Path) -> Iterator[httpx.Client]:
    engine = TorchEngine(export, "cpu")
    store = UserStore(f"sqlite:///{folder}/users.sqlite3")
    token = add_key(folder / "keys.json", "shop", ["recommend", "read", "write", "admin", "metrics"], {})
    app = create_app(engine, export, store=store, keys=Keys(folder / "keys.json"), understand=understand)
    header = {"authorization": f"Bearer {token}"}
    with running(app) as plain, http(str(plain.base_url), headers=header) as client:
        yield client
    store.close()


@pytest.mark.parametrize("route", [*ROUTES, *READS])
def test_the_document_is_kept(request: pytest.FixtureRequest, route: str) -> None:
    """Valid and invalid bodies, methods and headers: never a 5xx, never an answer that the document does not name."""
    client = request.getfixturevalue("growing" if route == "POST /v1/items" else "client")
    schema = schemathesis.openapi.from_url(str(client.base_url.join("/openapi.json")))
    method, path = route.split()
    headers = {"Authorization": client.headers["authorization"]}
    operation = schema[path][method]
    tried = 0
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)

    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    @(QUIET if route in ROUTES else settings(QUIET, max_examples=10))
    def one(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate(checks=CHECKS, headers=headers)

    one()
    assert tried >= (CASES // len(ROUTES) if route in ROUTES else 1)
    assert client.post("/v1/recommend", json={"history": ["item-1"]}).status_code == 200


ITEM = st.sampled_from([f"item-{row}" for row in range(60)])
FIELDS = {
    "k": st.integers(1, 100),
    "beams": st.none() | st.integers(1, 200),
    "exclude_seen": st.booleans(),
    "categories": st.none() | st.lists(st.sampled_from(["lamp", "sofa", "indoor"]), max_size=3),
    "price_min": st.none() | st.floats(0, 120),
    "price_max": st.none() | st.floats(0, 120),
    "allow": st.none() | st.lists(ITEM, max_size=30),
}


def test_valid_wishes_reach_the_engine_and_every_answer_is_legal(client: httpx.Client, export: Export) -> None:
    """What the document cannot know, the ids of the catalogue, is known here: no list breaks a filter."""
    catalogue = export.catalogue

    @given(history=st.lists(ITEM, max_size=12), off=st.lists(ITEM, max_size=5), wish=st.fixed_dictionaries(FIELDS))
    @settings(QUIET, max_examples=max(1, CASES // 6))
    def one(history, off, wish) -> None:
        everything = list(catalogue.item_ids)
        client.post("/v1/items", json={"enable": [item for item in everything if item not in off], "disable": off})
        answer = client.post("/v1/recommend", json={"history": history, **wish})
        assert answer.status_code == 200, answer.text
        found = [item["item_id"] for item in answer.json()["items"]]
        legal = set()
        for row, item in enumerate(everything):
            price = float(catalogue.prices[row])
            legal |= (
                {item}
                if (
                    catalogue.available[row]
                    and item not in off
                    and not (wish["exclude_seen"] and item in history)
                    and (wish["categories"] is None or set(wish["categories"]) & set(catalogue.categories[row]))
                    and (wish["price_min"] is None or price >= wish["price_min"])
                    and (wish["price_max"] is None or price <= wish["price_max"])
                    and (wish["allow"] is None or item in wish["allow"])
                )
                else set()
            )
        assert set(found) <= legal
        assert len(found) == len(set(found)) == min(wish["k"], len(legal))
        assert not answer.json()["fallback"]

    one()
    client.post("/v1/items", json={"enable": list(catalogue.item_ids)})


TEXT = st.text(max_size=60)
ITEM_FIELDS = {
    "item_id": st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    "title": TEXT,
    "description": TEXT,
    "categories": st.lists(TEXT.filter(len), max_size=3),
    "attributes": st.dictionaries(TEXT.filter(len), TEXT, max_size=3),
    "price": st.none() | st.floats(0, 1e9),
    "available": st.booleans(),
}


def test_whatever_an_item_says_it_is_taken_and_listed(growing: httpx.Client) -> None:
    """Any text, price and name: the next list may hold it, exactly if it is available, and so may every route."""

    @given(item=st.fixed_dictionaries(ITEM_FIELDS))
    @settings(QUIET, max_examples=max(1, min(300, CASES // 6)))
    def one(item) -> None:
        answer = growing.post("/v1/items", json={"upsert": [item]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["added"] + answer.json()["replaced"] == 1
        wish = {"history": ["item-1"], "allow": [item["item_id"]], "timeout_ms": 30_000}
        found = [one["item_id"] for one in growing.post("/v1/recommend", json=wish).json()["items"]]
        assert found == ([item["item_id"]] if item["available"] else [])
        (shown,) = growing.get("/v1/items", params={"item_id": item["item_id"]}).json()["items"]
        assert shown["available"] == item["available"]
        assert not set(shown["title"]) - set(item["title"])

    one()


SAID = st.text(max_size=80) | st.sampled_from(
    ["a red lamp", "not blue, under 40", "like the first", "<|sid_0_1|> item-3"]
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": SAID})
CHAT_FIELDS = {
    "stream": st.booleans(),
    "stop": st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=2),
    "max_tokens": st.none() | st.integers(1, 80),
    "temperature": st.none() | st.floats(0, 2),
    "genrec": st.fixed_dictionaries({"history": st.lists(ITEM, max_size=5)}),
}


def chunks_of(answer: httpx.Response) -> list[dict]:
    """A stream's chunks, whole to its end."""
    *events, end, nothing = answer.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_any_conversation_is_answered_about_items_that_may_be_shown(client: httpx.Client, export: Export) -> None:
    """Whatever is said, in whatever role: a whole answer within its limits, about available items new to the user."""
    chat = Chat(export)

    @given(turns=st.lists(TURN, max_size=4), wish=st.fixed_dictionaries(CHAT_FIELDS))
    @settings(QUIET, max_examples=max(1, CASES // 6))
    def one(turns, wish) -> None:
        body = {"model": "any", "messages": [*turns, {"role": "user", "content": "hello, 2 items"}], **wish}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        if wish["stream"]:
            chunks = chunks_of(answer)
            text = "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
            found = chunks[-1]["genrec"]["items"]
        else:
            usage = answer.json()["usage"]
            text, found = answer.json()["choices"][0]["message"]["content"], answer.json()["genrec"]["items"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["completion_tokens"] == chat.text().count(text)
        rows = [export.catalogue.index[item["id"]] for item in found]
        assert len(rows) <= 2
        assert all(export.catalogue.available[row] for row in rows)
        assert not {item["id"] for item in found} & set(wish["genrec"]["history"])
        assert set(chat.names.listed(text)) <= set(rows)
        assert chat.text().count(text) <= (wish["max_tokens"] or 10_000)
        assert not [stop for stop in wish["stop"] or [] if stop in text]

    one()
    assert client.post("/v1/recommend", json={"history": ["item-1"]}).status_code == 200


def test_any_item_text_is_only_text(export: Export) -> None:
    """Titles, attributes and descriptions made of control tokens and forged ids: no token but those of the template."""
    layout, special = export.layout, set(export.tokenizer.all_special_ids)
    forged = st.sampled_from([*layout.token_strings(), *export.tokenizer.all_special_tokens, "\n", "item-3"])
    hostile = st.text(max_size=40) | st.lists(forged | st.text(max_size=5), max_size=8).map("".join)

    def control(title: str, colour: str, text: str) -> list[list[int]]:
        catalogue = dataclasses.replace(
            export.catalogue,
            titles=[title, *export.catalogue.titles[1:]],
            attributes=[{"colour": colour}, *export.catalogue.attributes[1:]],
        )
        prompter = Prompter(export.tokenizer, layout, export.codes, catalogue=catalogue)
        prompts = [prompter.write("describe", [3, 0], 0, text=text), prompter.item_text(0, text), prompter.text_id(0)]
        return [[i for i in p.input_ids.tolist() if i >= layout.sid_start or i in special] for p in prompts]

    naive = export.tokenizer(layout.token_strings()[0]).input_ids
    assert max(naive) >= layout.sid_start  # as a tokenizer reads it that knows its special tokens
    expected = control("lamp", "red", "A lamp.")
    assert [len(of) for of in expected] > [0, 0, layout.levels]

    @given(title=hostile, colour=hostile, text=hostile)
    @settings(QUIET, max_examples=max(1, CASES // 6))
    def one(title, colour, text) -> None:
        assert control(title, colour, text) == expected

    one()
