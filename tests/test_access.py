"""Who may come in, over real HTTP: keys, scopes, tenants, rates, hosts."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from genrec.errors import ConfigError
from genrec.serving import access
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.gateway import create_app
from genrec.serving.server import listen, open_store, own_hosts
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.gateway_fixture import ROOT, connect, head, received, running
from tests.understanding import understand

ASK = {
    "/v1/recommend": {"history": ["item-1"], "k": 3},
    "/v1/describe": {"item_id": "item-1", "max_tokens": 2},
    "/v1/events": {"events": [{"user_id": "ann", "item_id": "item-1", "event_id": "1"}]},
    "/v1/items": {},
    "/metrics": None,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("k") / "keys.json"
    found = {scope: add_key(file, "shop", [scope], {}) for scope in ("recommend", "write", "admin", "metrics")}
    found["news"] = add_key(file, "news", ["recommend", "write"], {})
    limits = {"requests_per_s": 0.01, "beams_per_s": 0.01, "tokens_per_s": 0.01}
    found["slow"] = add_key(file, "slow", ["recommend"], {"requests_per_s": 1e6, "beams_per_s": 0.01})
    found["slower"] = add_key(file, "slower", ["recommend"], limits)
    found["writer"] = add_key(file, "writer", ["recommend"], {"tokens_per_s": 0.01})
    found["file"] = str(file)
    return found


@pytest.fixture(scope="module")
def client(torch_engine: TorchEngine, tokens, tmp_path_factory) -> Iterator[httpx.Client]:
    store = UserStore(f"sqlite:///{tmp_path_factory.mktemp('s')}/users.sqlite3")
    with running(create_app(torch_engine, torch_engine.export, store=store, keys=Keys(Path(tokens["file"])))) as http:
        yield http
    store.close()


def ask(client: httpx.Client, path: str, token: str | None, **more) -> httpx.Response:
    body = ASK[path] if "json" not in more else more.pop("json")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return client.request("GET" if body is None else "POST", path, json=body, headers=headers, **more)


@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize("scope", ["recommend", "write", "admin", "metrics"])
def test_each_route_takes_its_scope_only(client: httpx.Client, tokens, path: str, scope: str) -> None:
    answer = ask(client, path, tokens[scope])
    needed = {"/v1/recommend": "recommend", "/v1/describe": "recommend", "/v1/events": "write", "/v1/items": "admin"}
    if needed.get(path, "metrics") == scope:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 403
        assert f"lacks the scope {needed.get(path, 'metrics')!r}" in answer.json()["error"]


@pytest.mark.parametrize("path", ASK)
def test_no_route_answers_without_a_key(client: httpx.Client, path: str) -> None:
    for header in (None, "", "Basic abc", "Bearer", "Bearer nope", "Bearer genrec_0_x"):
        headers = {} if header is None else {"authorization": header}
        method, content = ("GET", None) if ASK[path] is None else ("POST", b"{}")
        answer = client.request(method, path, content=content, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "API key" in answer.json()["error"]


def test_unknown_paths_and_new_routes_are_closed(client: httpx.Client, torch_engine: TorchEngine, tokens) -> None:
    assert client.get("/v1/nothing").status_code == 401
    assert ask(client, "/metrics", tokens["admin"]).status_code == 403
    app = create_app(torch_engine, torch_engine.export, understand=understand)
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert paths - {"/docs/oauth2-redirect"} == access.PUBLIC | access.NEEDS.keys() | access.READS.keys()


def test_health_is_public(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_a_key_is_refused_before_its_body_is_read(client: httpx.Client) -> None:
    with connect(client) as connection:
        connection.sendall(head("/v1/recommend", 100_000))  # and not a byte of the body
        assert received(connection).startswith(b"HTTP/1.1 401 ")


def test_tenants_do_not_see_each_others_users(client: httpx.Client, tokens) -> None:
    lists = {}
    event = {"events": [{"user_id": "carl", "item_id": "item-7", "event_id": "x"}]}
    assert ask(client, "/v1/events", tokens["write"], json=event).json() == {"stored": 1, "duplicates": 0}
    for name in ("recommend", "news"):
        answer = ask(client, "/v1/recommend", tokens[name], json={"user_id": "carl", "k": 5, "exclude_seen": False})
        lists[name] = answer.json()["items"]
    seen = ask(client, "/v1/recommend", tokens["news"], json={"history": ["item-7"], "k": 5, "exclude_seen": False})
    new = ask(client, "/v1/recommend", tokens["news"], json={"history": [], "k": 5})

    def scores(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Item -> score; an extended prompt's scores differ from a whole one's by float32 rounding."""
        return {item["item_id"]: pytest.approx(item["score"], abs=1e-4) for item in items}

    def shown(items: list[dict[str, Any]]) -> dict[str, float]:
        return {item["item_id"]: item["score"] for item in items}

    assert shown(lists["recommend"]) == scores(seen.json()["items"])
    assert shown(lists["news"]) == scores(new.json()["items"])
    assert list(shown(lists["news"])) != list(shown(seen.json()["items"]))
    # the other tenant's event of the same name is another event
    assert ask(client, "/v1/events", tokens["news"], json=event).json() == {"stored": 1, "duplicates": 0}


def test_rates_are_refused_with_a_time_to_wait(client: httpx.Client, tokens) -> None:
    found = [ask(client, "/v1/recommend", tokens["slower"]) for _ in range(2)]
    assert [answer.status_code for answer in found] == [200, 429]
    assert 1 <= int(found[1].headers["retry-after"]) <= 100
    assert "rate limit of requests" in found[1].json()["error"]
    assert ask(client, "/v1/recommend", tokens["recommend"]).status_code == 200  # another tenant


def test_beams_and_tokens_are_limited(client: httpx.Client, tokens) -> None:
    wide = {"history": [], "beams": 60}
    found = [ask(client, "/v1/recommend", tokens["slow"], json=wide) for _ in range(4)]
    assert [answer.status_code for answer in found] == [200, 200, 200, 429]  # a bucket of 200 beams
    assert "rate limit of beams" in found[3].json()["error"]
    assert int(found[3].headers["retry-after"]) > 1
    text = {"item_id": "item-1", "max_tokens": 300, "timeout_ms": 1}
    assert ask(client, "/v1/describe", tokens["writer"], json=text).status_code in (200, 504)
    refused = ask(client, "/v1/describe", tokens["writer"], json=text)
    assert refused.status_code == 429
    assert "rate limit of tokens" in refused.json()["error"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_open_address_without_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"--host {host} without API keys would let everyone.*genrec keys add"):
        listen(host, 0, with_keys=False)


def test_with_keys_any_address_will_do() -> None:
    with listen("0.0.0.0", 0, with_keys=True) as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_keys(host: str) -> None:
    with (
        listen(host, 0, with_keys=False) as listener,
        pytest.raises(ConfigError, match=r"cannot listen.*take another port"),
    ):
        listen(host, listener.getsockname()[1], with_keys=False)


def test_no_such_address() -> None:
    with pytest.raises(ConfigError, match="no such address"):
        listen("no host name", 0, with_keys=True)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_are_refused_without_keys(torch_engine: TorchEngine, host: str) -> None:
    """DNS rebinding: a page whose name was pointed at 127.0.0.1 still sends its own name."""
    with running(create_app(torch_engine, torch_engine.export, hosts=access.LOOPBACK_HOSTS)) as http:
        answer = http.get("/healthz", headers={"host": host})
        assert answer.status_code == 403
        assert "localhost" in answer.json()["error"]
        for own in (http.base_url.netloc.decode(), "localhost:1", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
            assert http.get("/healthz", headers={"host": own}).status_code == 200


def test_any_loopback_address_answers_by_its_own_name() -> None:
    with listen("127.1.2.3", 0, with_keys=False) as listener:
        assert own_hosts(listener) == access.LOOPBACK_HOSTS | {"127.1.2.3"}


def test_without_fastapi_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None; import genrec.serving.server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "ConfigError: the gateway needs fastapi; install genrec[serve]" in done.stderr


def test_a_typed_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GENREC_STORE") as raised:
        open_store("postgresql://me:hunter2@127.0.0.1:1/db", tmp_path, typed=True)
    assert "hunter2" not in str(raised.value)
    assert open_store("none", tmp_path) is None
    made = open_store(None, tmp_path / "export")
    assert made is not None
    assert (tmp_path / "users.sqlite3").exists()
    made.close()
