"""A gateway on a real port: in a thread of the test, or as a process of its own that can be killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from genrec.serving.connections import PatientProtocol

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60  # no test waits so long unless something is broken


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that will come to pass."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.01)
    return found


def http(base_url: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=base_url, timeout=PATIENCE_S, trust_env=False, **options)


def connect(client: httpx.Client) -> socket.socket:
    """A bare connection to a client's server, for what no HTTP library sends."""
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), PATIENCE_S)


def head(path: str, length: int, *lines: str) -> bytes:
    """A POST's head."""
    fixed = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}")
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    pieces = []
    try:
        while piece := connection.recv(65_536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@contextmanager
def running(app: Any) -> Iterator[httpx.Client]:
    """A server in a thread."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", http=PatientProtocol, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), "the server to start")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with http(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


class Process:
    """A gateway in a process of its own, its log in a file."""

    def __init__(self, log: Path, *command: str, **environment: str) -> None:
        self._log = log
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        with log.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=file, stdout=file, env=env)

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def url(self) -> str:
        """Where it listens, once it does."""

        def found() -> re.Match[str] | None:
            text = self._log.read_text()
            assert self.process.poll() is None, text[-3000:]
            return re.search(r"serving \S+ on (http://[\d.]+:\d+)", text)

        url = until(found, "the process to serve")[1]

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "the process to answer")
        return str(url)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.process.kill()
        self.process.wait(PATIENCE_S)
