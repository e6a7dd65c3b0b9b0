"""From ranked lists to metrics.json: every model on the same users, with intervals and paired differences."""

from __future__ import annotations

import io
import logging
import os
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from genrec.artefacts import peak_rss_mb
from genrec.config import Ablation, Baseline
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.metrics import KS, coverage, intervals, invalid_rate, per_user, tail_share
from genrec.splits import Split

log = logging.getLogger(__name__)
MODELS = ("oracle", *get_args(Baseline), "genrec", *get_args(Ablation))  # in the order of tables
GROUP_METRICS = ("recall@10", "ndcg@10")
TABLE_METRICS = ("recall@10", "recall@50", "ndcg@10", "mrr", "cold_recall@10")
TABLE_SHARES = ("coverage", "tail_share", "invalid_rate")  # shown without their interval

PerUser = dict[str, dict[str, np.ndarray]]


def top_items(
    scores: np.ndarray, seen: list[np.ndarray] | None, k: int = 50, allowed: np.ndarray | None = None
) -> np.ndarray:
    """The k best items per row; equal scores go to the lower item row, so lists never depend on the batch.

    Args:
        scores: float32 [B, N]; -inf leaves an item out.
        seen: items that are left out of each row, B arrays; None keeps them.
        k: list length.
        allowed: bool [N]; None allows every item.

    Returns:
        int32 [B, k], best first, -1 where nothing is left.

    Raises:
        DataError: a score is NaN.
    """
    scores = np.array(scores, dtype=np.float32)
    if np.isnan(scores).any():
        raise DataError(f"row {int(np.isnan(scores).any(axis=1).argmax())} of the scores holds NaN; check the model")
    n_rows, n_items = scores.shape
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    if seen is not None:
        for row, items in enumerate(seen):
            scores[row, items] = -np.inf
    top = np.full((n_rows, k), -1, dtype=np.int32)
    if (kept := min(k, n_items)) == 0:
        return top
    least = np.partition(scores, n_items - kept, axis=1)[:, n_items - kept, None]  # [B, 1]: of the k best
    rows, items = np.nonzero((scores >= least) & (scores > -np.inf))  # the k best and what ties with the last
    order = np.lexsort((items, -scores[rows, items], rows))
    rows, items = rows[order], items[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    listed = place < kept
    top[rows[listed], place[listed]] = items[listed]
    return top


def _block(values: PerUser, pairs: list[tuple[str, str]], users: np.ndarray, n_boot: int, seed: int) -> dict[str, Any]:
    """Means, intervals and paired differences of per-user values over the chosen users, in one bootstrap."""
    named = [("models", m, metric, v[users]) for m, of in values.items() for metric, v in of.items()]
    named += [
        ("paired", f"{a}-{b}", metric, values[a][metric][users] - values[b][metric][users])
        for a, b in pairs
        for metric in values[a]
    ]
    block: dict[str, Any] = {"models": {}, "paired": {}}
    if not named or not users.any():
        return block
    columns = np.stack([column for *_, column in named], axis=1)
    for (part, name, metric, column), ends in zip(named, intervals(columns, n_boot, seed), strict=True):
        block[part].setdefault(name, {})[metric] = {
            "mean": float(column.mean()),
            "ci95": [float(e) for e in ends],
        }
    return block


def evaluate(
    rankings: dict[str, np.ndarray],
    split: Split,
    *,
    train_counts: np.ndarray,
    user_groups: dict[str, np.ndarray] | None = None,
    exclude_seen: bool,
    n_boot: int,
    seed: int,
    pairs: list[tuple[str, str]],
    allowed: np.ndarray | None = None,
    data: str = "",
) -> tuple[dict[str, Any], PerUser]:
    """Compare models on a split's test users.

    Args:
        rankings: model -> int32 [U, 50], -1 pads, rows as in ``split.test``.
        split: its name stands beside every number.
        train_counts: [N], training events per item.
        user_groups: group -> bool [U]; recall@10 and ndcg@10 are given per group too.
        exclude_seen: an item that the user had counts as invalid, see `genrec.splits.Cases`.
        n_boot: bootstrap resamples.
        seed: of the bootstrap.
        pairs: (A, B): the difference A - B over the same users.
        allowed: bool [N]; any other item counts as invalid. None allows every item.
        data: the data set's name.

    Returns:
        metrics.json as a dictionary, and per-user values {model: {metric: float64 [U]}}. ``coverage`` is a
        fact about all lists together, so its ``ci95`` is None. ``cold_recall@K`` is recall over the users
        whose target never occurs in training, and is absent when there are none.

    Raises:
        ConfigError: a pair names a model that was not ranked.
        DataError: there are no test users, or lists or groups do not have one row per test user.
    """
    started = time.monotonic()
    cases, n_items = split.test, len(train_counts)
    n_users = len(cases.targets)
    if n_users == 0:
        raise DataError(f"split {split.name}: no test users; use another split or more events per user")
    for kind, arrays in (("model", rankings), ("group", user_groups or {})):
        for name, array in arrays.items():
            if len(array) != n_users:
                raise DataError(f"{kind} {name}: {len(array)} rows, but {split.name} has {n_users} test users")
    if unknown := sorted({name for pair in pairs for name in pair} - set(rankings)):
        raise ConfigError(f"pairs name {unknown}, which were not ranked; ranked: {sorted(rankings)}")
    rankings = {name: rankings[name] for name in sorted(rankings, key=_order)}
    values: PerUser = {}
    for name, top in rankings.items():
        values[name] = per_user(top, cases.targets)
        values[name]["tail_share"] = tail_share(top, train_counts)
        seen = cases.seen if exclude_seen else None
        values[name]["invalid_rate"] = invalid_rate(top, n_items, seen=seen, allowed=allowed)
    everyone = np.ones(n_users, dtype=bool)
    result: dict[str, Any] = {"data": data, "split": split.name, "users": n_users}
    result |= _block(values, pairs, everyone, n_boot, seed)
    for name, top in rankings.items():
        result["models"][name]["coverage"] = {"mean": coverage(top, n_items), "ci95": None}
    cold_users = split.cold[cases.targets]
    recalls = {name: {f"cold_recall@{k}": of[f"recall@{k}"] for k in KS} for name, of in values.items()}
    cold = _block(recalls, pairs, cold_users, n_boot, seed)
    for part in ("models", "paired"):
        for name, of in cold[part].items():
            result[part][name] |= of
    if user_groups:
        small = {name: {metric: of[metric] for metric in GROUP_METRICS} for name, of in values.items()}
        result["groups"] = {
            group: {"users": int(chosen.sum())} | _block(small, pairs, chosen.astype(bool), n_boot, seed)
            for group, chosen in user_groups.items()
        }
    result["seconds"] = round(time.monotonic() - started, 3)
    result["peak_rss_mb"] = round(peak_rss_mb(), 1)
    return result, values


def _order(name: str) -> tuple[int, str]:
    return (MODELS.index(name) if name in MODELS else len(MODELS), name)


def save_per_user(path: Path, values: PerUser) -> None:
    """Write per-user values, {model: {metric: float64 [U]}}, as one compressed .npz (whole or not at all).

    Raises:
        ArtefactError: the disk is full or the folder is read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    arrays: dict[str, Any] = {f"{model}/{metric}": v for model, of in values.items() for metric, v in of.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise ArtefactError(f"{path}: cannot be written ({err.strerror}); free some space and run again") from err


def load_per_user(path: Path) -> PerUser:
    """Read what `save_per_user` wrote.

    Raises:
        ArtefactError: the file is missing or not such a file.
    """
    values: PerUser = {}
    try:
        with np.load(path) as stored:
            for name in stored.files:
                model, metric = name.split("/", 1)
                values.setdefault(model, {})[metric] = stored[name]
    except (OSError, ValueError) as err:
        raise ArtefactError(f"{path}: no per-user values ({err}); run the evaluate stage again") from err
    return values


def cells(block: dict[str, Any], part: str, interval: str = " [{}, {}]") -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table over a block of metrics.json.

    Args:
        block: metrics.json, or one of its groups.
        part: ``"models"`` or ``"paired"``.
        interval: how the two ends follow a mean.

    Returns:
        ["model", metric, ...] without metrics that nobody has, and one row of text per model or pair.
    """
    sign = "+" if part == "paired" else ""
    shown = [m for m in (*TABLE_METRICS, *TABLE_SHARES) if any(m in of for of in block[part].values())]
    if part == "paired":
        shown = [m for m in shown if m not in TABLE_SHARES]
    rows = []
    for name, of in block[part].items():
        row = [name]
        for metric in shown:
            value = of.get(metric)
            text = "" if value is None else f"{value['mean']:{sign}.3f}"
            if value is not None and value["ci95"] is not None and metric not in TABLE_SHARES:
                text += interval.format(*(f"{end:{sign}.3f}" for end in value["ci95"]))
            row.append(text)
        rows.append(row)
    return ["difference" if part == "paired" else "model", *shown], rows


def _blocks(metrics: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(caption, part, block) of each table that metrics.json fills, in reading order."""
    caption = f"{metrics['data']} {metrics['split']}, {metrics['users']} users".strip()
    found = [(caption, metrics)]
    for name, block in metrics.get("groups", {}).items():
        found.append((f"{caption}: group {name}, {block['users']} users", block))
    return [(text, part, block) for text, block in found for part in ("models", "paired") if block[part]]


def format_table(metrics: dict[str, Any], width: int = 120) -> str:
    """metrics.json as plain text for a console `width` characters wide: means over 95 % intervals."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, markup=False, emoji=False)
    for caption, part, block in _blocks(metrics):
        header, rows = cells(block, part, "\n{}..{}")
        if part == "models":
            console.print(caption)
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for column in header:
            table.add_column(
                column.replace("_", "\n"), justify="left" if column == header[0] else "right", no_wrap=True
            )
        for row in rows:
            table.add_row(*row)
        console.print(table)
    return out.getvalue()


def format_markdown(metrics: dict[str, Any]) -> str:
    """metrics.json as Markdown tables, for documents."""
    lines: list[str] = []
    for caption, part, block in _blocks(metrics):
        header, rows = cells(block, part)
        lines += [f"**{caption}**", ""] if part == "models" else []
        lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)
