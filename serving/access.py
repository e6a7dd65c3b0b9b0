"""Who may come in: host, API key, scope and rate, by the headers alone, before any byte of the body is read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from genrec.serving import api_keys
from genrec.serving.api_keys import Keys, Limits
from genrec.serving.metrics import Metrics
from genrec.serving.openai_format import CHAT_PATH
from genrec.serving.problems import RefusalError
from genrec.serving.rate_limit import RateLimiter

# a path that stands nowhere here is closed to everyone who has no key with the scope "admin"
PUBLIC = {"/", "/page.css", "/page.js", "/healthz", "/readyz", "/openapi.json", "/docs"}
READS: dict[str, api_keys.Scope] = {  # GET alone; other methods of the same path ask for what NEEDS says
    "/v1/items": "recommend",
    "/v1/items/{item_id:path}/image": "recommend",
    "/v1/categories": "recommend",
    "/v1/users": "read",
    "/v1/users/{user_id:path}/history": "read",
}
NEEDS: dict[str, api_keys.Scope] = {
    "/v1/recommend": "recommend",
    "/v1/describe": "recommend",
    CHAT_PATH: "recommend",
    "/v1/events": "write",
    "/v1/items": "admin",
    "/metrics": "metrics",
}
_PATTERNS = {path: compile_path(path)[0] for path in READS}
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def route_of(path: str) -> str | None:
    """The route that a path belongs to, as it is written in `PUBLIC`, `NEEDS` or `READS`; None: none of them."""
    if path in PUBLIC or path in NEEDS:
        return path
    return next((route for route, pattern in _PATTERNS.items() if pattern.match(path)), None)


def scope_of(method: str, path: str) -> api_keys.Scope:
    """The scope that a request needs where there are keys."""
    if method == "GET":
        for route, pattern in _PATTERNS.items():
            if pattern.match(path):
                return READS[route]
    return NEEDS.get(path, "admin")


@dataclass(frozen=True)
class Caller:
    """Whose request it is."""

    tenant: str
    scopes: frozenset[str]
    limits: Limits


LOCAL = Caller("local", frozenset(api_keys.SCOPES), Limits())  # when there are no keys


@dataclass
class Drain:
    """Whether the server is going down."""

    since: float | None = field(default=None)  # of time.monotonic

    def start(self) -> None:
        """Refuse new requests from now on."""
        self.since = time.monotonic()


class Gate:
    """ASGI middleware: refuses, or names the caller in ``scope["state"]["caller"]``."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None,
        limiter: RateLimiter,
        metrics: Metrics,
        drain: Drain,
        hosts: frozenset[str] | None = None,
    ) -> None:
        """
        Args:
            app: what is behind the gate.
            keys: None lets everyone in as `LOCAL`: for a loopback address only.
            limiter: of the tenants' requests.
            metrics: counts refusals.
            drain: set when the server goes down.
            hosts: names by which the server may be asked, None for any: a page in a browser on this machine could
                otherwise point its own name here and read the answers (DNS rebinding).
        """
        self.app, self._keys, self._limiter = app, keys, limiter
        self._metrics, self._drain, self._hosts = metrics, drain, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets
        try:
            scope.setdefault("state", {})["caller"] = self._admit(scope["method"], scope["path"], Headers(scope=scope))
        except RefusalError as err:
            counter = self._metrics.auth_failures if err.status in (401, 403) else self._metrics.refusals
            counter.labels(err.reason).inc()
            await err.response(scope["path"], connection="close")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, method: str, path: str, headers: Headers) -> Caller:
        host = headers.get("host", "").rpartition(":")
        name = host[0] if host[0] and host[2].isdigit() else "".join(host)
        if self._hosts is not None and name.lower() not in self._hosts:
            raise RefusalError(403, f"this server answers as {', '.join(sorted(self._hosts))} only", "host")
        caller = LOCAL if self._keys is None else self._caller(method, path, headers)
        if path.startswith("/v1/"):
            if self._drain.since is not None:
                raise RefusalError(503, "this server is going down; send the request to another", "draining", 1)
            wait_s = self._limiter.take(caller.tenant, "requests", 1, caller.limits.requests_per_s)
            if wait_s:
                raise RefusalError(429, "the rate limit of requests is reached; try again later", "rate", wait_s)
        return caller

    def _caller(self, method: str, path: str, headers: Headers) -> Caller:
        assert self._keys is not None
        if path in PUBLIC:
            return Caller("anyone", frozenset(), Limits())
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise RefusalError(401, "no API key; send it as `Authorization: Bearer KEY`", "missing")
        found = self._keys.find(token.strip())
        if found is None:
            raise RefusalError(401, "this API key is not known here; ask for a new one", "unknown")
        key, limits = found
        needed = scope_of(method, path)
        if needed not in key.scopes:
            raise RefusalError(403, f"this API key lacks the scope {needed!r}", "scope")
        return Caller(key.tenant, frozenset(key.scopes), limits)
