"""A real PostgreSQL cluster for one test run: made in a temporary folder, on a free port, gone afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARIES = Path("/usr/lib/postgresql")  # Debian's place


class Cluster:
    """PostgreSQL that the tests may stop and start."""

    def __init__(self, binaries: Path, folder: Path, as_user: list[str]) -> None:
        self._binaries, self._folder, self._as_user = binaries, folder, as_user
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    def call(self, name: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs."""
        command = [*self._as_user, str(self._binaries / name), "-D", str(self._folder / "data"), *arguments]
        with open(self._folder / "calls.log", "a") as log:  # a pipe would stay open as long as the server lives
            done = subprocess.run(command, stdout=log, stderr=log, cwd="/", check=False, timeout=120)
        assert done.returncode == 0, (self._folder / "calls.log").read_text()[-2000:]

    def start(self) -> None:
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1"
        self.call("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "server.log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop: "immediate" is a crash, nothing is flushed and no session is told goodbye."""
        self.call("pg_ctl", "stop", "-w", "-m", mode)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Make, start and remove a cluster; skip where PostgreSQL is not installed."""
    found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        pytest.skip(f"PostgreSQL is not installed: no {BINARIES}/*/bin/initdb (apt-get install postgresql)")
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser to run it as postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    folder = Path(tempfile.mkdtemp(prefix="genrec-pg-"))
    try:
        if as_user:
            shutil.chown(folder, "postgres")
        made = Cluster(found[-1].parent, folder, as_user)
        made.call("initdb", "-U", "tester", "--auth=trust", "--encoding=UTF8", "--locale=C")
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
