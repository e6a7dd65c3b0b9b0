"""One form for every benchmark: a list of checks with values, intervals and verdicts, and the page that shows them."""

from __future__ import annotations

import json
import os
import platform
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from genrec.artefacts import git_commit, peak_rss_mb, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
RESAMPLES = 200  # at once: users times this many weights in memory


@dataclass(frozen=True)
class Check:
    """One line that has to hold; `must` says in words what of `value` or `ci95`."""

    check: str
    value: float
    ci95: list[float] | None
    must: str
    holds: bool


def over_seeds(parts: list[np.ndarray]) -> tuple[float, list[float]]:
    """Mean of the seeds' means and its 95 % interval, Student's t over seeds.

    Users of one seed share a catalogue and a training, so resampled users alone would give intervals that are too
    narrow. With one seed the interval is over its users.

    Args:
        parts: one float64 [U] per seed; for a difference, that of the same users.

    Returns:
        the mean and ``[low, high]``.
    """
    values = np.array([part.mean() for part in parts]) if len(parts) > 1 else parts[0]
    mean, error = float(values.mean()), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, [mean - reach, mean + reach]


def over_users_and_seeds(parts: list[np.ndarray], n_boot: int = 2000) -> tuple[float, list[float]]:
    """Mean and its 95 % percentile bootstrap interval, where every seed has the same users: both are resampled.

    Args:
        parts: one float64 [U] per seed, rows in the same order.
        n_boot: resamples.

    Returns:
        the mean and ``[low, high]``; with one seed over its users alone.
    """
    grid = np.stack(parts)  # [S, U]
    rng = np.random.default_rng(0)
    n_seeds, n_users = grid.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_boot) / n_seeds  # [n_boot, S]
    means = np.empty(n_boot)
    for start in range(0, n_boot, RESAMPLES):
        chosen = slice(start, min(start + RESAMPLES, n_boot))
        users = rng.multinomial(n_users, np.full(n_users, 1 / n_users), chosen.stop - start) / n_users
        means[chosen] = ((users @ grid.T) * seeds[chosen]).sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(grid.mean()), [float(low), float(high)]


def machine() -> str:
    """Processor, cores, memory and GPU, in words."""
    model = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}"


def finish(
    name: str, command: str, seeds: list[int], seconds: float, checks: list[Check], tables: dict[str, str]
) -> int:
    """Write benchmarks/results/NAME.json, render docs/results.md, print the checks.

    Args:
        name: the benchmark.
        command: what runs it again.
        seeds: of this run.
        seconds: it took in all, earlier parts of a resumed run included.
        checks: its lines.
        tables: heading -> Markdown to show below them.

    Returns:
        the exit code: 0 when every check holds, else 1.
    """
    result: dict[str, Any] = {
        "command": command,
        "commit": git_commit(),
        "machine": machine(),
        "seeds": seeds,
        "seconds": round(seconds),
        "peak_rss_mb": round(max(peak_rss_mb(), peak_rss_mb(resource.RUSAGE_CHILDREN))),
        "checks": [asdict(check) for check in checks],
        "tables": tables,
    }
    write_json(RESULTS / f"{name}.json", result)
    render()
    table = Table("check", "value", "95 % interval", "must", "holds")
    for check in checks:
        table.add_row(
            check.check, f"{check.value:.4f}", _interval(check.ci95), check.must, "yes" if check.holds else "NO"
        )
    Console(width=160).print(table)
    return 0 if all(check.holds for check in checks) else 1


def _interval(ci95: list[float] | None) -> str:
    return "" if ci95 is None else f"{ci95[0]:.4f} .. {ci95[1]:.4f}"


def render() -> None:
    """docs/results.md from every file in benchmarks/results."""
    lines = [
        "# Results",
        "",
        "Made by the benchmarks from `benchmarks/results/*.json`; do not edit. Every number has its command, commit,",
        "seeds and machine. Seconds depend on the machine and its other work: compare them inside one table only.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            "",
            f"## {path.stem}",
            "",
            f"`{result['command']}`: commit {str(result['commit'])[:12]}, seeds {result['seeds']}, "
            f"{result['seconds']} s, peak memory {result['peak_rss_mb']} MB, {result['machine']}.",
            "",
            "| check | value | 95 % interval | must | holds |",
            "|---|---|---|---|---|",
        ]
        for c in result["checks"]:
            verdict = "yes" if c["holds"] else "**no**"
            lines.append(f"| {c['check']} | {c['value']:.4f} | {_interval(c['ci95'])} | {c['must']} | {verdict} |")
        for heading, text in result["tables"].items():
            lines += ["", f"### {heading}", "", text]
    write_text(PAGE, "\n".join(lines) + "\n")
