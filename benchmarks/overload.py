"""A gateway offered twice what it can do: a real process on a real port, open loop, for minutes.

Two cores serve and send at once here, so the engine gets one thread; the 99th percentile of the sender's own lag is in
the table, and where it is not small the machine was the bottleneck.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from benchmarks.results import Check
from benchmarks.serving_model import random_export
from genrec.serving import loadtest

log = logging.getLogger("benchmarks.serving")
DEADLINE_MS = 9_000
CAPACITY_S = 20  # of one load test in the search for the capacity
USERS = 100
PATIENCE_S = 120  # for the gateway to be ready
GROWTH = 1.05


@contextmanager
def gateway(export: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`genrec serve` as one types it; yields its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "genrec.cli", "serve", str(export)]
    command += ["--engine", "torch", "--port", str(port), "--store", f"sqlite:///{folder}/users.sqlite3"]
    with (folder / "gateway.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the gateway did not get ready; see {folder / 'gateway.log'}")
            time.sleep(0.5)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def ready(url: str) -> bool:
    """Whether a gateway says that its engine answers."""
    try:
        return httpx.get(f"{url}/readyz", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def resident_mb(pid: int) -> float:
    """Memory that a process holds now, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def overload(runs: Path, items: int, seconds: float) -> tuple[list[Check], dict[str, str]]:
    """Find the capacity, offer twice of it, and look at answers, refusals and memory."""
    folder = runs / "overload"
    folder.mkdir(parents=True, exist_ok=True)
    test = partial(loadtest.measure, users=USERS, seed=0, deadline_ms=DEADLINE_MS, key=None)
    with gateway(random_export(runs, items), folder) as (url, process):
        capacity = loadtest.find_capacity(lambda rate: test(url, rate=rate, seconds=CAPACITY_S), 16.0)
        if capacity is None:
            raise RuntimeError(f"{url}: no rate at which {DEADLINE_MS} ms are kept")
        memory, done = [], threading.Event()

        def watch() -> None:
            while not done.wait(1) and process.poll() is None:
                memory.append(resident_mb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            load = test(url, rate=2 * capacity.rate, seconds=seconds)
        finally:
            done.set()
            watcher.join()
        alive = process.poll() is None and ready(url)
    tenth = max(1, len(memory) // 10)
    middle, end = np.median(memory[len(memory) // 2 - tenth : len(memory) // 2 + tenth]), np.median(memory[-tenth:])
    p99, growth = load.latency_ms["p99"] or float("inf"), float(end / middle)
    unclean = sum(load.errors.values()) + sum(kind["bare"] for kind in load.refused.values())
    refused = sum(kind["retry_after"] for kind in load.refused.values())
    what = f"gateway at 2 x {capacity.rate:.3g} lists/s for {seconds:g} s"
    checks = [
        Check(f"{what}: alive and ready afterwards", float(alive), None, "1", alive),
        Check(f"{what}: p99 of accepted, share of the deadline", p99 / DEADLINE_MS, None, "at most 1",
              p99 <= DEADLINE_MS),
        Check(f"{what}: neither answered nor refused with Retry-After", unclean, None, "0", unclean == 0),
        Check(f"{what}: memory at the end over the middle", growth, None, f"at most {GROWTH}", growth <= GROWTH),
    ]  # fmt: skip
    table = ["| offered | accepted | of these fallbacks | late | refused | p50 ms | p99 ms | sender's lag, p99 ms |"]
    table += ["|---|---|---|---|---|---|---|---|"]
    table += [
        f"| {load.offered} | {load.accepted} | {load.fallbacks} | {load.late} | {refused} | "
        f"{load.latency_ms['p50']} | {p99} | {load.sender_lag_ms} |"
    ]
    shown = f"Resident memory, MB: {memory[0]:.0f} at the start, {middle:.0f} in the middle, {end:.0f} at the end."
    return checks, {"Overload": "\n".join([*table, "", shown])}
