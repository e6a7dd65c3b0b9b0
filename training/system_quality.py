"""How good a system is: recall of what users took next, GAUC of impressions, by what the item's user had seen of it."""

from __future__ import annotations

import numpy as np
import torch

from genrec.adapters.self_attention import left_pad
from genrec.adapters.system import System
from genrec.adapters.user_models import LONGEST
from genrec.errors import ConfigError
from genrec.planted import Table

TOP = 10


def measure_system(system: System, table: Table, metric: str) -> np.ndarray:
    """One value per user that the metric is about.

    Args:
        system: trained.
        table: with its test cases or impressions.
        metric: recall (of known items among known ones), cold (of new ones among new ones), masked (recall with the
            image kept from it), gauc.

    Returns:
        float64 [n]: hits at 10, or AUC per user.

    Raises:
        ConfigError: the data has no new items, or no impressions.
    """
    if metric == "gauc":
        shown = table.test_impressions
        if shown is None:
            raise ConfigError("metric gauc: the data has no labelled impressions")
        return gauc_of(impression_scores(system, table), table)
    hide = {m: torch.full((table.n_items,), m == "image") for m in system.modalities} if metric == "masked" else None
    return hits(system_scores(system, table, table.split.test.users, hide), table, metric)


def system_scores(
    system: System, table: Table, users: np.ndarray, hide: dict[str, torch.Tensor] | None = None
) -> np.ndarray:
    """Scores of all items for the test cases in their order: float32 [n, N]."""
    device = next(iter(system.buffers())).device
    padded = left_pad([h[-LONGEST:] for h in table.split.test.histories])
    system.eval()
    return system.all_scores(torch.from_numpy(users).long().to(device), padded.to(device), hide).cpu().numpy()


def impression_scores(system: System, table: Table) -> np.ndarray:
    """The score of every test impression, after its user's training history: float32 [n]."""
    shown, split = table.test_impressions, table.split
    assert shown is not None
    row_of = np.full(table.n_users, -1)
    row_of[split.train_users] = np.arange(len(split.train_users))
    device = next(iter(system.buffers())).device
    histories = [h[-LONGEST:] for h in split.train]
    padded = left_pad([histories[row] for row in row_of[shown.users]])
    users, items = (torch.from_numpy(of).long().to(device) for of in (shown.users, shown.items))
    system.eval()
    return system.pair_scores(users, padded.to(device), items).cpu().numpy()


def hits(scores: np.ndarray, table: Table, metric: str = "recall") -> np.ndarray:
    """Hits at 10 of test cases whose target is known (or new): scores [n, N] -> float64 [m]."""
    split, cases = table.split, table.split.test
    new = split.cold[cases.targets]
    wanted = new if metric == "cold" else ~new
    if not wanted.any():
        raise ConfigError(f"metric {metric}: no test case is about such an item; give the data some")
    scores = np.where(split.cold != (metric == "cold"), -np.inf, scores)
    for row, history in enumerate(cases.histories):
        scores[row, history] = -np.inf
    goal = scores[np.arange(len(scores)), cases.targets][:, None]
    rank = (scores > goal).sum(1) + (scores == goal).sum(1) / 2 - 0.5
    return (rank[wanted] < TOP).astype(np.float64)


def gauc_of(scores: np.ndarray, table: Table) -> np.ndarray:
    """AUC of every user's test impressions who took some and left some: scores [n] of all of them -> float64 [m]."""
    shown = table.test_impressions
    assert shown is not None
    values = []
    for user in np.unique(shown.users):
        at = shown.users == user
        labels, given = shown.labels[at] > 0, scores[at]
        if labels.any() and not labels.all():
            above = given[labels][:, None] - given[~labels][None]
            values.append(float((above > 0).mean() + (above == 0).mean() / 2))
    return np.array(values)
