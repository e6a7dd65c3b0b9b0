"""The gateway as a process: kill -9 right after a 200, SIGTERM under load and beside a hung engine, the command."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from genrec import cli
from genrec.errors import ConfigError, DataError
from genrec.serving.api_keys import add_key
from genrec.serving.user_store import UserStore
from tests.export_fixture import make_export
from tests.gateway_fixture import PATIENCE_S, Process, http
from tests.postgres_fixture import cluster

GATEWAY = str(Path(__file__).with_name("gateway_process.py"))


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return make_export(tmp_path_factory.mktemp("e"))


@pytest.fixture
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up the process's log; here the process is the tests'."""
    loggers = [logging.getLogger(name) for name in (None, "genrec", "uvicorn")]
    levels = [logger.level for logger in loggers]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def start(export: Path, tmp_path: Path) -> Iterator:
    started: list[Process] = []

    def run(store: str, delay_s: float = 0.0) -> tuple[Process, str]:
        process = Process(tmp_path / f"{len(started)}.log", GATEWAY, str(export), store, str(delay_s))
        started.append(process)
        return process, process.url()

    yield run
    for process in started:
        process.kill()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/users.sqlite3"
        return
    with cluster() as postgres:
        yield postgres.url


def test_kill_9_right_after_a_200_loses_nothing(start, store: str) -> None:
    """Writers write without a pause until the process is gone; whatever got its 200 is in the store."""
    process, url = start(store)
    acknowledged: list[list[str]] = [[] for _ in range(4)]

    def write(writer: int) -> None:
        with http(url) as client:
            for turn in range(10_000):
                name = f"{writer}-{turn}"
                event = {"user_id": name, "item_id": f"item-{turn % 60}", "event_id": name}
                try:
                    answer = client.post("/v1/events", json={"events": [event]})
                except httpx.TransportError:
                    return
                assert answer.status_code == 200, answer.text
                acknowledged[writer].append(name)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + PATIENCE_S
    while min(map(len, acknowledged)) < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    for thread in writers:
        thread.join(PATIENCE_S)
    assert process.process.returncode == -signal.SIGKILL
    assert min(map(len, acknowledged)) >= 20
    found = UserStore(store)
    for name in (name for names in acknowledged for name in names):
        assert found.newest("local", name, 9) == [f"item-{int(name.split('-')[1]) % 60}"], name
    found.close()


def test_sigterm_under_load_finishes_what_was_accepted_and_exits_0(start, tmp_path: Path) -> None:
    """One connection per request, so that none is reused while it closes. The server's log is the other witness."""
    process, url = start(f"sqlite:///{tmp_path}/users.sqlite3", delay_s=0.15)
    answers: dict[str, httpx.Response] = {}
    refused = threading.Event()

    def ask(asker: int) -> None:
        for turn in range(10_000):
            name = f"{asker}-{turn}"
            try:
                with http(url, headers={"x-request-id": name}) as client:
                    answers[name] = client.post("/v1/recommend", json={"history": ["item-1"], "timeout_ms": 30_000})
            except httpx.TransportError:
                return  # the door is closed
            if answers[name].status_code == 503:
                refused.set()

    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(ask, asker) for asker in range(12)]
        deadline = time.monotonic() + PATIENCE_S
        while len(answers) < 24 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.terminate() == 0
        for future in asking:
            future.result(PATIENCE_S)
    logged = [json.loads(line) for line in process.lines()]
    finished = {line["request_id"]: line["status"] for line in logged if line.get("route") == "/v1/recommend"}
    assert finished == {name: answer.status_code for name, answer in answers.items()}
    assert set(finished.values()) == {200, 503}
    assert not any(answer.json()["fallback"] for answer in answers.values() if answer.status_code == 200)
    drained = [answer for answer in answers.values() if answer.status_code == 503]
    assert all("going down" in answer.json()["error"] for answer in drained)
    assert all(answer.headers["retry-after"] == "1" for answer in drained)
    assert logged[-1]["message"] == "stopped"


def test_sigterm_lets_a_stream_end(start, tmp_path: Path) -> None:
    process, url = start(f"sqlite:///{tmp_path}/users.sqlite3", delay_s=0.5)
    talk = {"model": "any", "messages": [{"role": "user", "content": "blue, 2 items"}], "stream": True}
    with http(url) as client, client.stream("POST", "/v1/chat/completions", json=talk) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        process.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"role": "assistant"' in first
    assert '"finish_reason": "stop"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert process.process.wait(PATIENCE_S) == 0


def test_sigterm_beside_a_hung_engine_still_ends_with_0(start, tmp_path: Path) -> None:
    process, url = start(f"sqlite:///{tmp_path}/users.sqlite3", delay_s=-1)
    with http(url) as client:
        found = client.post("/v1/recommend", json={"history": [], "timeout_ms": 100}).json()
        assert found["reason"] == "deadline"
        assert process.terminate() == 0
    assert "the engine hangs; leaving without it" in process.lines()[-1]


def test_the_command_serves_with_keys_and_logs_json_without_histories(export: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    token = add_key(keys, "shop", ["recommend", "write"], {})
    command = ["-m", "genrec.cli", "serve", str(export), "--engine", "torch", "--host", "0.0.0.0", "--port", "0"]
    options = ["--store", f"sqlite:///{tmp_path}/own.sqlite3", "--keys", str(keys)]
    process = Process(tmp_path / "log", *command, *options, GENREC_LOG_SALT="salt")
    try:
        url = process.url()
        with http(url, headers={"authorization": f"Bearer {token}"}) as client:
            event = {"user_id": "ann@example.org", "item_id": "item-7"}
            assert client.post("/v1/events", json={"events": [event]}).status_code == 200
            body = {"user_id": "ann@example.org", "history": ["item-33"], "k": 3}
            answers = [client.post("/v1/recommend", json=body) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert client.post("/v1/recommend", json={"history": ["item-666"]}).status_code == 422
        assert httpx.post(f"{url}/v1/recommend", json=body, trust_env=False).status_code == 401
        assert process.terminate() == 0
    finally:
        process.kill()
    text = "\n".join(process.lines())
    for secret in ("ann@example.org", "item-7", "item-33", "item-666", token, token.split("_", 2)[2]):
        assert secret not in text
    logged = [line for line in map(json.loads, process.lines()) if line["logger"] == "genrec.access"]
    lists = [line for line in logged if line["route"] == "/v1/recommend"]
    assert [line["status"] for line in lists] == [200, 200, 422, 401]
    assert [line["tenant"] for line in lists] == ["shop", "shop", "shop", None]
    assert lists[0]["user"] == lists[1]["user"]
    assert len(lists[0]["user"]) == 16
    assert lists[0]["request_id"] == answers[0].headers["x-request-id"] != lists[1]["request_id"]
    assert all(line["ms"] > 0 for line in lists)
    assert (tmp_path / "own.sqlite3").exists()


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--host", "0.0.0.0"], ConfigError, "without API keys"),
        (["--keys", "nowhere.json"], ConfigError, "nowhere.json: no file of API keys"),
        (["--store", "mysql://x/y"], ConfigError, "no store of kind 'mysql'"),
        (["--store", "postgresql://me:hunter2@h/d"], ConfigError, "GENREC_STORE"),
        (["--engine", "tpu", "--store", "none"], ConfigError, "no engine named 'tpu'"),
    ],
)
def test_the_command_refuses_before_it_serves(export: Path, options: list[str], error, message: str) -> None:
    assert issubclass(error, (ConfigError, DataError))
    with pytest.raises(error, match=message) as raised:
        CliRunner().invoke(cli.app, ["serve", str(export), "--port", "0", *options], catch_exceptions=False)
    assert "hunter2" not in str(raised.value)


@pytest.mark.usefixtures("own_logging")
def test_a_store_from_the_environment_may_hold_a_password(export: Path) -> None:
    """It gets as far as the server that is not there."""
    env = {"GENREC_STORE": "postgresql://me:hunter2@127.0.0.1:1/db"}
    done = CliRunner().invoke(cli.app, ["serve", str(export), "--port", "0"], env={**os.environ, **env})
    assert "is gone" in str(done.exception)
    assert "hunter2" not in str(done.exception)
