"""What a batch of a system's training is made of: events, impressions, items, or items that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genrec.adapters.self_attention import left_pad
from genrec.errors import ConfigError
from genrec.planted import Table


@dataclass(frozen=True)
class Batch:
    """One step's rows.

    Attributes:
        users: int64 [B].
        histories: int64 [B, T], -1 where empty.
        items: int64 [B], what was taken, seen, or is looked at.
        others: int64 [B], an item that belongs with it; itself where pairs have none.
        negatives: int64 [B, n], random known items.
        labels: float32 [B], 1 where it was taken.
    """

    users: Tensor
    histories: Tensor
    items: Tensor
    others: Tensor
    negatives: Tensor
    labels: Tensor


Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Whose:
    """Whose histories a stage learns from: a share of all users, of the first half of them, or of the second."""

    users: str = "all"
    share: float = 1.0


def _known(table: Table, whose: Whose) -> list[int]:
    second = table.split.train_users >= table.n_users // 2
    there = {"all": second | True, "first": ~second, "second": second}[whose.users]
    long = [row for row, h in enumerate(table.split.train) if len(h) > 1 and there[row]]
    if not long:
        raise ConfigError("pairs: no training history has two events; systems need an order or company of events")
    return long[: max(1, round(whose.share * len(long)))]


def clicks(table: Table, whose: Whose) -> Draw:
    """A random event of a history, and all its other events as the history: no order."""
    split, rows = table.split, np.array(_known(table, whose))

    def draw(rng: np.random.Generator, size: int) -> tuple:
        who = rng.choice(rows, size)
        at = [int(rng.integers(len(split.train[r]))) for r in who]
        items = np.array([split.train[r][i] for r, i in zip(who, at, strict=True)])
        rest = [np.delete(split.train[r], i) for r, i in zip(who, at, strict=True)]
        return split.train_users[who], rest, items, items, np.ones(size, np.float32)

    return draw


def sequences(table: Table, whose: Whose) -> Draw:
    """A random event but the first, and what came before it."""
    split, rows = table.split, np.array(_known(table, whose))

    def draw(rng: np.random.Generator, size: int) -> tuple:
        who = rng.choice(rows, size)
        at = [int(rng.integers(1, len(split.train[r]))) for r in who]
        items = np.array([split.train[r][i] for r, i in zip(who, at, strict=True)])
        before = [split.train[r][:i] for r, i in zip(who, at, strict=True)]
        return split.train_users[who], before, items, items, np.ones(size, np.float32)

    return draw


def impressions(table: Table, whose: Whose) -> Draw:
    """A shown item and whether it was taken; where the log has no such thing, half events and half random items."""
    split, shown = table.split, table.train_impressions
    row_of = {int(user): row for row, user in enumerate(split.train_users)}
    if shown is None:
        positive, known = clicks(table, whose), np.flatnonzero(~split.cold)

        def made(rng: np.random.Generator, size: int) -> tuple:
            users, rest, items, _, labels = positive(rng, size)
            labels[size // 2 :] = 0
            items = np.where(labels > 0, items, rng.choice(known, size))
            return users, rest, items, items, labels

        return made

    def draw(rng: np.random.Generator, size: int) -> tuple:
        at = rng.integers(round(whose.share * len(shown.items)), size=size)
        users = shown.users[at]
        rest = [split.train[row_of[int(u)]] for u in users]
        return users, rest, shown.items[at], shown.items[at], shown.labels[at]

    return draw


def items(table: Table, whose: Whose) -> Draw:
    """Known items alone."""
    known = np.flatnonzero(~table.split.cold)

    def draw(rng: np.random.Generator, size: int) -> tuple:
        rows = rng.choice(known, size)
        return np.zeros(size, np.int64), [np.empty(0, np.int64)] * size, rows, rows, np.ones(size, np.float32)

    return draw


def together(table: Table, whose: Whose) -> Draw:
    """Two events of one history."""
    split, rows = table.split, np.array(_known(table, whose))
    events, lengths = np.concatenate(split.train), np.array([len(h) for h in split.train])
    starts = lengths.cumsum() - lengths

    def draw(rng: np.random.Generator, size: int) -> tuple:
        who = rng.choice(rows, size)
        first, second = rng.integers(lengths[who]), rng.integers(lengths[who] - 1)
        second += second >= first
        nothing = [np.empty(0, np.int64)] * size
        one, other = events[starts[who] + first], events[starts[who] + second]
        return split.train_users[who], nothing, one, other, np.ones(size, np.float32)

    return draw


def across_domains(table: Table, whose: Whose) -> Draw:
    """Two events of one history in different domains; raises ConfigError where the data has one domain only."""
    if len(np.unique(table.domains)) < 2:
        raise ConfigError(
            "pairs across_domains: the items are of one domain; name a column of domains, or use together"
        )
    pair = together(table, whose)

    def draw(rng: np.random.Generator, size: int) -> tuple:
        users, rest, first, second, labels = pair(rng, 4 * size)
        good = np.flatnonzero(table.domains[first] != table.domains[second])[:size]
        return users[good], [rest[i] for i in good], first[good], second[good], labels[good]

    return draw


PAIRS: dict[str, Callable[[Table, Whose], Draw]] = {
    "clicks": clicks,
    "sequences": sequences,
    "impressions": impressions,
    "items": items,
    "together": together,
    "across_domains": across_domains,
}


def batches(
    table: Table, pairs: str, *, steps: int, size: int, negatives: int, whose: Whose, seed: int
) -> Iterator[Batch]:
    """A stage's batches, each drawn when it is asked for.

    Raises:
        ConfigError: unknown pairs, or the data lacks what they need; before the first is drawn.
    """
    if pairs not in PAIRS:
        raise ConfigError(f"pairs {pairs!r}; there are {', '.join(PAIRS)}")
    rng = np.random.default_rng(seed)
    draw, known = PAIRS[pairs](table, whose), np.flatnonzero(~table.split.cold)

    def drawn() -> Batch:
        users, histories, rows, others, labels = draw(rng, size)
        return Batch(
            torch.from_numpy(np.asarray(users, np.int64)),
            left_pad(histories),
            torch.from_numpy(rows.astype(np.int64)),
            torch.from_numpy(others.astype(np.int64)),
            torch.from_numpy(rng.choice(known, (len(rows), negatives))),
            torch.from_numpy(labels),
        )

    return (drawn() for _ in range(steps))
