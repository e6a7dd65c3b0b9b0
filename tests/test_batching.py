"""The engine's worker: order, batches, bounds, failures and hangs, with a real engine behind a switch."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest

from genrec.errors import DataError
from genrec.serving.batching import Batch, EngineWorker, QueueFullError, StalledError
from genrec.serving.engine import RecommendRequest, TextRequest
from tests.engines import FaultyEngine
from tests.gateway_fixture import PATIENCE_S, until

PROBE = RecommendRequest([], k=1)
USUAL = {"max_waiting": 64, "max_batch": 16, "window_s": 0.003, "stall_s": 30.0, "probe_s": 5.0}


@pytest.fixture
def make(faulty_engine: FaultyEngine) -> Iterator:
    workers = []

    def build(**options) -> EngineWorker:
        workers.append(EngineWorker(faulty_engine, **{**USUAL, **options}))
        return workers[-1]

    yield build
    faulty_engine.hang.set()
    for worker in workers:
        assert worker.close(PATIENCE_S)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def wish(row: int, **fields) -> RecommendRequest:
    return RecommendRequest([f"item-{row}"], k=3, **fields)


def test_what_comes_together_is_one_call_and_each_gets_its_own(make, faulty_engine, torch_engine) -> None:
    worker = make(window_s=PATIENCE_S, max_batch=5)  # the window ends when the batch is full
    jobs = [worker.submit("recommend", wish(row), soon()) for row in range(5)]
    found = [job.future.result(PATIENCE_S) for job in jobs]
    assert found == torch_engine.recommend([wish(row) for row in range(5)])
    assert [len(call) for call in faulty_engine.calls] == [5]


def test_an_idle_engine_waits_no_longer_than_the_window(make, faulty_engine) -> None:
    worker = make(window_s=0.01, max_batch=99)
    assert worker.submit("recommend", wish(1), soon()).future.result(PATIENCE_S)
    assert worker.submit("recommend", wish(2), soon()).future.result(PATIENCE_S)
    assert [len(call) for call in faulty_engine.calls] == [1, 1]


def test_what_waits_behind_a_call_becomes_batches_of_one_kind_in_order(make, faulty_engine) -> None:
    worker = make(window_s=0, max_batch=3)
    faulty_engine.hang.clear()
    jobs = [worker.submit("recommend", wish(0), soon())]
    faulty_engine.inside.acquire()
    jobs.append(worker.submit("generate", TextRequest("item-1", max_tokens=2), soon()))
    jobs += [worker.submit("recommend", wish(row), soon()) for row in range(1, 6)]
    jobs.append(worker.submit("generate", TextRequest("item-2", max_tokens=2), soon()))
    assert worker.waiting == 7
    faulty_engine.hang.set()
    for job in jobs:
        job.future.result(PATIENCE_S)
    kinds = [(type(call[0]).__name__, len(call)) for call in faulty_engine.calls]
    assert kinds == [
        ("RecommendRequest", 1),
        ("TextRequest", 2),
        ("RecommendRequest", 3),
        ("RecommendRequest", 2),
    ]
    assert [request.history for call in faulty_engine.calls[2:] for request in call] == [
        [f"item-{i}"] for i in range(1, 6)
    ]


def test_conversations_are_read_one_at_a_time_with_lists_between(make, faulty_engine) -> None:
    """Each with the engine itself, in its thread; one that fails spoils no other."""
    batches: list[Batch] = []
    worker = make(window_s=0, on_batch=batches.append)
    faulty_engine.hang.clear()
    jobs = [worker.submit("recommend", wish(0), soon())]
    faulty_engine.inside.acquire()

    def refuse(_) -> None:
        raise DataError("no conversation")

    jobs.append(worker.submit("understand", lambda engine: (engine, threading.current_thread().name), soon()))
    jobs.append(worker.submit("recommend", wish(1), soon()))
    bad = worker.submit("understand", refuse, soon())
    jobs.append(worker.submit("understand", lambda engine: len(engine.recommend([wish(2)])), soon()))
    faulty_engine.hang.set()
    found = [job.future.result(PATIENCE_S) for job in jobs]
    assert found[1] == (faulty_engine, "genrec-engine")
    assert found[3] == 1
    with pytest.raises(DataError, match="no conversation"):
        bad.future.result(PATIENCE_S)
    assert worker.state == "ok"
    until(lambda: len(batches) == 5, "all calls to be counted")
    assert [(batch.kind, batch.size) for batch in batches] == [
        ("recommend", 1),
        ("understand", 1),
        ("recommend", 1),
        ("understand", 1),
        ("understand", 1),
    ]


def test_the_queue_is_bounded_and_a_cancelled_request_frees_its_place(make, faulty_engine) -> None:
    worker = make(window_s=0, max_waiting=2)
    faulty_engine.hang.clear()
    first = worker.submit("recommend", wish(0), soon())
    faulty_engine.inside.acquire()
    waiting = [worker.submit("recommend", wish(row), soon()) for row in (1, 2)]
    with pytest.raises(QueueFullError, match="try again in") as raised:
        worker.submit("recommend", wish(3), soon())
    assert raised.value.retry_after_s >= 1
    worker.cancel(waiting[0])
    last = worker.submit("recommend", wish(4), soon())
    faulty_engine.hang.set()
    assert first.future.result(PATIENCE_S)
    assert last.future.result(PATIENCE_S)
    assert ["item-1"] not in [request.history for call in faulty_engine.calls for request in call]


def test_what_is_past_its_deadline_never_reaches_the_engine(make, faulty_engine) -> None:
    worker = make(window_s=0)
    late = worker.submit("recommend", wish(7), time.monotonic() - 1)
    assert worker.submit("recommend", wish(8), soon()).future.result(PATIENCE_S)
    assert [request.history for call in faulty_engine.calls for request in call] == [["item-8"]]
    assert not late.future.done()


def test_a_bad_request_spoils_no_other(make, faulty_engine, torch_engine) -> None:
    worker = make(window_s=PATIENCE_S, max_batch=3)
    bad = wish(1, categories=["no such category"])
    jobs = [worker.submit("recommend", request, soon()) for request in (wish(0), bad, wish(2))]
    with pytest.raises(DataError, match="no such category"):
        jobs[1].future.result(PATIENCE_S)
    assert jobs[0].future.result(PATIENCE_S) == torch_engine.recommend([wish(0)])[0]
    assert jobs[2].future.result(PATIENCE_S) == torch_engine.recommend([wish(2)])[0]
    assert [len(call) for call in faulty_engine.calls] == [3, 1, 1, 1]
    assert worker.state == "ok"


def test_a_failed_engine_says_so_until_a_probe_finds_it_well(make, faulty_engine) -> None:
    worker = make(window_s=0, probe_s=0.02, probes={"recommend": PROBE})
    faulty_engine.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.submit("recommend", wish(0), soon()).future.result(PATIENCE_S)
    assert worker.state == "failed"
    until(lambda: [PROBE] in faulty_engine.calls, "a probe")
    assert worker.state == "failed"
    faulty_engine.error = None
    until(lambda: worker.state == "ok", "the probe to succeed")


def test_an_engine_that_wants_to_leave_takes_nobody_with_it(make, faulty_engine) -> None:
    worker = make(window_s=0)
    faulty_engine.error = SystemExit(3)
    with pytest.raises(RuntimeError, match="the engine raised SystemExit"):
        worker.submit("recommend", wish(0), soon()).future.result(PATIENCE_S)
    faulty_engine.error = None
    assert worker.submit("recommend", wish(0), soon()).future.result(PATIENCE_S)


def test_wrong_numbers_of_answers_are_a_failure(make, faulty_engine, monkeypatch) -> None:
    worker = make(window_s=0)
    monkeypatch.setattr(faulty_engine, "recommend", lambda requests: [])
    with pytest.raises(RuntimeError, match="0 answers to 1 requests"):
        worker.submit("recommend", wish(0), soon()).future.result(PATIENCE_S)


def test_a_hung_engine_is_stalled_and_recovers(make, faulty_engine) -> None:
    worker = make(window_s=0, stall_s=0.05)
    faulty_engine.hang.clear()
    job = worker.submit("recommend", wish(0), soon())
    until(lambda: worker.state == "stalled", "the stall to show")
    with pytest.raises(StalledError):
        worker.submit("recommend", wish(1), soon())
    assert not worker.close(0.01)  # the thread is inside the engine
    faulty_engine.hang.set()
    assert job.future.result(PATIENCE_S)
    until(lambda: worker.state == "ok", "the engine to return")


def test_only_one_thread_ever_calls_the_engine(make, faulty_engine, monkeypatch) -> None:
    threads, within = set(), faulty_engine.within.recommend

    def recommend(requests):
        threads.add(threading.get_ident())
        return within(requests)

    monkeypatch.setattr(faulty_engine, "recommend", recommend)
    worker = make(window_s=0, max_waiting=100)
    jobs = []

    def ask() -> None:
        for row in range(5):
            jobs.append(worker.submit("recommend", wish(row), soon()))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for job in jobs:
        assert job.future.result(PATIENCE_S)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_every_call_is_reported(make, faulty_engine) -> None:
    seen: list[Batch] = []
    worker = make(window_s=PATIENCE_S, max_batch=2, on_batch=seen.append)
    jobs = [worker.submit("recommend", wish(row), soon()) for row in range(2)]
    for job in jobs:
        job.future.result(PATIENCE_S)
    faulty_engine.error = RuntimeError("gone")
    jobs = [worker.submit("recommend", wish(row), soon()) for row in range(2)]
    for job in jobs:
        with pytest.raises(RuntimeError, match="gone"):
            job.future.result(PATIENCE_S)
    found = [(batch.size, len(batch.waited_s), batch.failed) for batch in seen]
    assert found == [(2, 2, False), (2, 0, True), (1, 1, True), (1, 1, True)]
    assert all(dataclasses.asdict(batch)["engine_s"] > 0 for batch in seen)


def test_a_closed_worker_takes_nothing(make) -> None:
    worker = make()
    assert worker.close(PATIENCE_S)
    with pytest.raises(QueueFullError):
        worker.submit("recommend", wish(0), soon())
