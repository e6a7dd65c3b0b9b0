"""Ranking metrics per user, list-level counts, and bootstrap intervals over users.

Every user has one target: recall@K is a hit in the first K places, and the ideal DCG is 1. An example::

    top = [[7, 3, 9], [4, 1, -1]], targets = [3, 8]
    rank of the target (from 0): 1, none
    recall@1 = [0, 0]; recall@3 = [1, 0]; ndcg@3 = [1 / log2(3), 0]; mrr = [1/2, 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec.errors import DataError

KS = (1, 5, 10, 50)
NDCG_KS = (5, 10)
HEAD_SHARE = 0.2
CHUNK_WEIGHTS = 4_000_000  # bootstrap weights held at once: 32 MB


def per_user(top: np.ndarray, targets: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Accuracy of ranked lists, one value per user.

    Args:
        top: int32 [U, >= max(ks)], item rows from best to worst, -1 where the list ended.
        targets: int32 [U], the item each user took.
        ks: cut-offs of recall.

    Returns:
        float64 [U] under ``recall@K`` for each K, ``ndcg@5``, ``ndcg@10`` and ``mrr`` (0 past the end).

    Raises:
        DataError: shapes do not fit each other or the cut-offs, or a target is no item.
    """
    if top.ndim != 2 or targets.shape != top.shape[:1]:
        raise DataError(f"found lists {top.shape} and targets {targets.shape}; expected [U, K] and [U]")
    if top.shape[1] < max(*ks, *NDCG_KS):
        raise DataError(f"lists hold {top.shape[1]} items, recall@{max(ks)} needs as many; pad them with -1")
    if (targets < 0).any():
        raise DataError(f"user {int(np.argmax(targets < 0))} has a negative target; expected an item's row")
    hits = top == targets[:, None]
    rank = np.where(hits.any(axis=1), hits.argmax(axis=1), top.shape[1])
    inside = rank < top.shape[1]
    gain = 1.0 / np.log2(rank + 2.0)
    values = {f"recall@{k}": (rank < k).astype(np.float64) for k in ks}
    values |= {f"ndcg@{k}": np.where(rank < k, gain, 0.0) for k in NDCG_KS}
    return values | {"mrr": np.where(inside, 1.0 / (rank + 1.0), 0.0)}


def coverage(top: np.ndarray, n_items: int, k: int = 10) -> float:
    """Share of the catalogue in anyone's first `k` places; top is int32 [U, >= k] with -1 pads."""
    shown = np.unique(top[:, :k])
    return float(((shown >= 0) & (shown < n_items)).sum() / n_items)


def tail_share(top: np.ndarray, train_counts: np.ndarray, k: int = 10) -> np.ndarray:
    """Share of each user's first `k` places with an item outside the most popular fifth of the catalogue.

    Args:
        top: int32 [U, >= k], -1 pads (they count as no tail item).
        train_counts: [N], training events per item; ties go to the lower row.

    Returns:
        float64 [U], in 0..1.
    """
    n_items = len(train_counts)
    tail = np.ones(n_items, dtype=bool)
    tail[np.argsort(-train_counts, kind="stable")[: int(np.ceil(HEAD_SHARE * n_items))]] = False
    shown = top[:, :k]
    real = (shown >= 0) & (shown < n_items)
    return (real & tail[np.where(real, shown, 0)]).sum(axis=1) / k


def invalid_rate(
    top: np.ndarray,
    n_items: int,
    *,
    seen: list[np.ndarray] | None = None,
    allowed: np.ndarray | None = None,
    k: int = 10,
) -> np.ndarray:
    """Share of each user's first `k` places that should not be there.

    A place is invalid when it is empty (-1), no row of the catalogue, a repetition of a higher place, in the
    user's `seen` items, or outside `allowed`.

    Args:
        top: int32 [U, >= k].
        n_items: rows of the catalogue, N.
        seen: U histories whose items must not come back; None when they may.
        allowed: bool [N]; None allows every item.

    Returns:
        float64 [U], in 0..1.
    """
    shown = top[:, :k]
    real = (shown >= 0) & (shown < n_items)
    bad = ~real
    if allowed is not None:
        bad |= ~allowed[np.where(real, shown, 0)]
    earlier = np.tril(np.ones((shown.shape[1], shown.shape[1]), dtype=bool), -1)
    bad |= ((shown[:, :, None] == shown[:, None, :]) & earlier).any(axis=2)
    if seen is not None:
        for user, items in enumerate(seen):
            bad[user] |= np.isin(shown[user], items)
    return bad.sum(axis=1) / k


def intervals(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """95 % percentile bootstrap intervals of several means over the same users.

    Each resample is one draw of multinomial counts that weighs every column alike, so column differences are
    paired (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: float64 [U, M].
        n_boot: resamples.
        seed: of the resamples.

    Returns:
        float64 [M, 2], lower and upper end.

    Raises:
        DataError: there are no users, or a value is not finite.
    """
    n_users, n_columns = values.shape
    if n_users == 0 or not np.isfinite(values).all():
        raise DataError(f"a bootstrap needs finite values of at least one user; found {n_users} users")
    rng = np.random.default_rng(seed)
    equal = np.full(n_users, 1.0 / n_users)
    chunk = max(1, CHUNK_WEIGHTS // n_users)
    means = np.empty((n_boot, n_columns))
    for start in range(0, n_boot, chunk):
        weights = rng.multinomial(n_users, equal, size=min(chunk, n_boot - start))
        means[start : start + len(weights)] = weights.astype(np.float64) @ values / n_users
    return np.percentile(means, (2.5, 97.5), axis=0).T


def ci95(values: np.ndarray, n_boot: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values, float64 [U], over users."""
    low, high = intervals(values[:, None], n_boot, seed)[0]
    return float(low), float(high)


def paired(a: np.ndarray, b: np.ndarray, n_boot: int, seed: int) -> dict[str, Any]:
    """Mean over the same users of a - b (both float64 [U]) with its bootstrap interval.

    Returns:
        ``{"mean": float, "ci95": [low, high]}``.
    """
    return {"mean": float((a - b).mean()), "ci95": list(ci95(a - b, n_boot, seed))}
