"""What the gateway counts is what happened: every number of /metrics after a known course of events."""

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from genrec.serving import user_store
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.desk import Settings
from genrec.serving.gateway import create_app
from genrec.serving.request_log import JsonFormatter
from genrec.serving.speculation import Speculation
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.engines import FaultyEngine
from tests.gateway_fixture import PATIENCE_S, http, running, until

ASK = {"history": ["item-1"], "k": 2}
LISTS, TEXTS = "/v1/recommend", "/v1/describe"


class Gateway:
    """A client with every scope, and the samples of /metrics."""

    def __init__(self, client: httpx.Client, engine: FaultyEngine, file: Path, token: str) -> None:
        self.anyone, self.engine, self.file = client, engine, file
        self.client = http(str(client.base_url), headers={"authorization": f"Bearer {token}"})

    def ask(self, **fields) -> httpx.Response:
        return self.client.post(LISTS, json={**ASK, **fields})

    def value(self, name: str, **labels: str) -> float:
        text = self.client.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
        assert len(found) <= 1
        return found[0] if found else 0.0


@pytest.fixture
def gateway(torch_engine: TorchEngine, tmp_path: Path, monkeypatch) -> Iterator[Gateway]:
    monkeypatch.setattr(user_store, "LOCK_TIMEOUT_S", 0.1)
    engine, file = FaultyEngine(torch_engine), tmp_path / "users.sqlite3"
    store = UserStore(f"sqlite:///{file}")
    token = add_key(tmp_path / "keys.json", "shop", ["recommend", "write", "admin", "metrics"], {})
    settings = Settings(window_ms=0, max_waiting=3, max_batch=8, probe_s=1000, stall_s=1000)
    app = create_app(engine, torch_engine.export, store=store, keys=Keys(tmp_path / "keys.json"), settings=settings)
    with running(app) as client:
        made = Gateway(client, engine, file, token)
        yield made
        engine.hang.set()
        made.client.close()
    store.close()


def test_answers_and_stages(gateway: Gateway) -> None:
    for _ in range(3):
        assert gateway.ask().status_code == 200
    gateway.client.post(TEXTS, json={"item_id": "item-1", "max_tokens": 2})
    assert gateway.ask(k=0).status_code == 422
    assert gateway.client.get("/no/such/path").status_code == 404
    assert gateway.value("genrec_requests_total", route=LISTS, status="200") == 3
    assert gateway.value("genrec_requests_total", route=LISTS, status="422") == 1
    assert gateway.value("genrec_requests_total", route="other", status="404") == 1
    assert gateway.value("genrec_batch_size_count", route=LISTS) == 3
    assert gateway.value("genrec_batch_size_count", route=TEXTS) == 1
    for stage, lists in (("queue", 3), ("engine", 3), ("total", 4)):
        assert gateway.value("genrec_stage_seconds_count", route=LISTS, stage=stage) == lists
        assert gateway.value("genrec_stage_seconds_count", route=TEXTS, stage=stage) == 1
    engine_s = gateway.value("genrec_stage_seconds_sum", route=LISTS, stage="engine")
    total_s = gateway.value("genrec_stage_seconds_sum", route=LISTS, stage="total")
    assert 0 < engine_s < total_s


def test_stages_measure_where_the_time_went(gateway: Gateway) -> None:
    """A slow engine: the first request spends its time inside it, the second waits as long in the queue."""
    gateway.engine.hang.clear()
    gateway.engine.delay_s = 0.3
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gateway.ask)
        gateway.engine.inside.acquire()
        second = pool.submit(gateway.ask)
        until(lambda: gateway.value("genrec_queue_length") == 1, "the second to wait")
        gateway.engine.hang.set()
        assert first.result(PATIENCE_S).status_code == second.result(PATIENCE_S).status_code == 200
    assert gateway.value("genrec_stage_seconds_sum", route=LISTS, stage="queue") >= 0.3
    assert gateway.value("genrec_stage_seconds_sum", route=LISTS, stage="engine") >= 0.6
    assert gateway.value("genrec_queue_length") == 0


def test_batches_queue_and_refusals(gateway: Gateway) -> None:
    gateway.engine.hang.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(gateway.ask)]
        gateway.engine.inside.acquire()
        answers += [pool.submit(gateway.ask) for _ in range(3)]
        until(lambda: gateway.value("genrec_queue_length") == 3, "the queue to be full")
        assert gateway.ask().status_code == 503
        gateway.engine.hang.set()
        assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 4
    assert gateway.value("genrec_refusals_total", reason="queue_full") == 1
    assert gateway.value("genrec_batch_size_count", route=LISTS) == 2
    assert gateway.value("genrec_batch_size_sum", route=LISTS) == 4
    assert gateway.value("genrec_batch_size_bucket", route=LISTS, le="1.0") == 1
    assert gateway.value("genrec_batch_size_bucket", route=LISTS, le="4.0") == 2


def test_fallbacks_and_readiness(gateway: Gateway) -> None:
    assert gateway.value("genrec_ready") == 1
    gateway.engine.error = RuntimeError("broken")
    assert gateway.ask().json()["fallback"]
    assert gateway.ask().json()["fallback"]
    assert gateway.value("genrec_ready") == 0
    gateway.engine.error = None
    assert not gateway.ask().json()["fallback"]
    assert gateway.value("genrec_ready") == 1
    gateway.engine.hang.clear()
    assert gateway.ask(timeout_ms=20).json()["reason"] == "deadline"
    assert gateway.value("genrec_fallbacks_total", reason="engine_error") == 2
    assert gateway.value("genrec_fallbacks_total", reason="deadline") == 1
    assert gateway.value("genrec_engine_failures_total", route=LISTS) == 2


def test_keys_events_and_the_store(gateway: Gateway) -> None:
    for headers in ({}, {}, {"authorization": "Bearer genrec_000000000000_x"}):
        assert gateway.anyone.post(LISTS, json=ASK, headers=headers).status_code == 401
    assert gateway.value("genrec_auth_failures_total", reason="missing") == 2
    assert gateway.value("genrec_auth_failures_total", reason="unknown") == 1
    event = {"user_id": "ann", "item_id": "item-1", "event_id": "1"}
    body = {"events": [event, event, {"user_id": "ann", "item_id": "item-2"}]}
    assert gateway.client.post("/v1/events", json=body).status_code == 200
    assert gateway.value("genrec_events_total", result="stored") == 2
    assert gateway.value("genrec_events_total", result="duplicate") == 1
    with sqlite3.connect(gateway.file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert gateway.client.post("/v1/events", json=body).status_code == 503
    assert gateway.value("genrec_store_errors_total", kind="locked") == 1
    assert gateway.value("genrec_events_total", result="stored") == 2


def test_names_that_clients_choose_make_no_new_series(gateway: Gateway) -> None:
    for i in range(20):
        gateway.client.get(f"/v1/made-up-{i}")
    assert "made-up" not in gateway.client.get("/metrics").text
    assert gateway.value("genrec_requests_total", route="other", status="404") == 20


def test_an_exception_is_logged_without_the_words_that_may_quote_a_request(gateway: Gateway, caplog) -> None:
    caplog.set_level("INFO", "genrec")
    gateway.engine.error = RuntimeError("a message that quotes item-1 and ann")
    assert gateway.ask().json()["fallback"]
    (record,) = [record for record in caplog.records if record.name == "genrec.serving.batching"]
    line = JsonFormatter().format(record)
    found = json.loads(line)
    assert (found["level"], found["exception"]) == ("error", "RuntimeError")
    assert "_trip" in found["at"][-1]
    assert "quotes" not in line
    until(lambda: any(r.name == "genrec.access" for r in caplog.records), "the request's line")
    access = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "genrec.access"]
    assert access[-1]["fallback"] == "engine_error"
    assert access[-1]["status"] == 200


def test_what_is_drafted_and_accepted_is_shown_where_the_engine_drafts(torch_engine: TorchEngine) -> None:
    """Counts are read when they are asked for; an engine that cannot draft, or does not, shows no series."""

    class Drafting(FaultyEngine):
        counts: Speculation | None = Speculation(drafts=3, draft_tokens=12, accepted_tokens=5)

        def speculation(self) -> Speculation | None:
            return self.counts

    engine = Drafting(torch_engine)
    with running(create_app(engine, torch_engine.export)) as client:

        def value(name: str) -> float | None:
            families = text_string_to_metric_families(client.get("/metrics").text)
            return next((s.value for family in families for s in family.samples if s.name == name), None)

        assert (value("genrec_draft_tokens_total"), value("genrec_accepted_draft_tokens_total")) == (12, 5)
        engine.counts = Speculation(drafts=4, draft_tokens=16, accepted_tokens=9)
        assert (value("genrec_draft_tokens_total"), value("genrec_accepted_draft_tokens_total")) == (16, 9)
        engine.counts = None
        assert "draft_tokens" not in client.get("/metrics").text
    with running(create_app(torch_engine, torch_engine.export)) as client:
        assert "draft_tokens" not in client.get("/metrics").text
