"""What to learn from and what to ask: leave one out, a global time cut, or items held out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec.artefacts import write_json
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.interactions import Log

log = logging.getLogger(__name__)
_FILE = "split.npz"


@dataclass(frozen=True)
class Cases:
    """What is asked, and the answer.

    Attributes:
        users: int64 [n], rows of ``Log.user_ids``.
        histories: n arrays of int32 item rows, oldest first, never empty.
        targets: int32 [n], the item that came next.
        unshown: n arrays of int32 item rows that the user had taken by then too, and that the history leaves out
            because they are held out; None: there are none.
    """

    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray
    unshown: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, rows: slice | np.ndarray) -> Cases:
        """Some of them."""
        chosen = np.arange(len(self))[rows]
        histories = [self.histories[row] for row in chosen]
        unshown = None if self.unshown is None else [self.unshown[row] for row in chosen]
        return Cases(self.users[chosen], histories, self.targets[chosen], unshown)

    @property
    def seen(self) -> list[np.ndarray]:
        """n arrays of int32 item rows: what a list leaves out that leaves out what the user had."""
        if self.unshown is None:
            return self.histories
        return [np.concatenate(both) for both in zip(self.histories, self.unshown, strict=True)]


@dataclass(frozen=True)
class Split:
    """One way to part a log.

    Attributes:
        name: stands beside every number that is printed.
        train: int32 histories to learn from, oldest item first.
        train_users: int64, the user of each.
        valid: cases to choose by.
        test: cases to report on.
        cold: bool [N], items that are in no training history.
    """

    name: str
    train: list[np.ndarray]
    train_users: np.ndarray
    valid: Cases
    test: Cases
    cold: np.ndarray

    def save(self, folder: Path) -> None:
        """Write ``split.npz`` and, for people, ``split.json`` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {"name": np.array(self.name), "cold": self.cold}
        arrays |= _pack("train", self.train, self.train_users)
        for part, cases in (("valid", self.valid), ("test", self.test)):
            arrays |= _pack(part, cases.histories, cases.users) | {f"{part}_targets": cases.targets}
            if cases.unshown is not None:
                arrays |= _pack(f"{part}_unshown", cases.unshown, cases.users)
        with (folder / _FILE).open("wb") as handle:
            np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]
        write_json(folder / "split.json", self.summary())

    @classmethod
    def load(cls, folder: Path) -> Split:
        """Read what `save` wrote.

        Raises:
            ArtefactError: there is no split in `folder`, or it is damaged.
        """
        try:
            with np.load(folder / _FILE, allow_pickle=False) as file:
                arrays = dict(file)
            return cls(
                name=str(arrays["name"]),
                train=_unpack("train", arrays),
                train_users=arrays["train_users"],
                valid=_cases("valid", arrays),
                test=_cases("test", arrays),
                cold=arrays["cold"],
            )
        except (OSError, ValueError, KeyError) as err:
            raise ArtefactError(f"{folder / _FILE}: no split there ({err}); run `genrec run`") from err

    def summary(self) -> dict[str, int | str]:
        """Sizes."""
        return {
            "name": self.name,
            "train_histories": len(self.train),
            "train_events": sum(map(len, self.train)),
            "valid_cases": len(self.valid),
            "test_cases": len(self.test),
            "cold_items": int(self.cold.sum()),
        }


def _pack(part: str, histories: list[np.ndarray], users: np.ndarray) -> dict[str, np.ndarray]:
    lengths = np.array([len(history) for history in histories], np.int64)
    flat = np.concatenate(histories) if histories else np.zeros(0, np.int32)
    return {f"{part}_items": flat, f"{part}_lengths": lengths, f"{part}_users": users}


def _cases(part: str, arrays: dict[str, np.ndarray]) -> Cases:
    unshown = _unpack(f"{part}_unshown", arrays) if f"{part}_unshown_items" in arrays else None
    return Cases(arrays[f"{part}_users"], _unpack(part, arrays), arrays[f"{part}_targets"], unshown)


def _unpack(part: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    flat = arrays[f"{part}_items"]
    ends = np.cumsum(arrays[f"{part}_lengths"]).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class _Builder:
    """Collects users, histories, targets and what is not shown; keeps the newest `max_history` events of a history."""

    def __init__(self, max_history: int) -> None:
        self.max_history = max_history
        self.users: list[int] = []
        self.histories: list[np.ndarray] = []
        self.targets: list[int] = []
        self.unshown: list[np.ndarray] = []

    def add(self, user: int, history: np.ndarray, target: int | None = None, unshown: np.ndarray | None = None) -> None:
        if len(history):
            self.users.append(user)
            self.histories.append(history[-self.max_history :])
            if target is not None:
                self.targets.append(target)
            if unshown is not None:
                self.unshown.append(unshown)

    def cases(self) -> Cases:
        users, targets = np.array(self.users, np.int64), np.array(self.targets, np.int32)
        return Cases(users, self.histories, targets, self.unshown or None)


def split_log(
    log_: Log,
    n_items: int,
    name: str,
    *,
    seed: int,
    max_history: int,
    cold_share: float,
    test_share: float,
    max_users: int | None,
) -> Split:
    """Part a log into training histories, validation cases and test cases.

    A user with events ``a b c d`` (and ``max_history`` large enough):

    - ``leave_one_out``: train ``a b``; valid ``a b -> c``; test ``a b c -> d``. With fewer than three events:
      train only.
    - ``temporal``, cuts before ``c`` and before ``d``: the same; other users' cuts fall at the same moments.
    - ``cold_items``, ``c`` held out: test ``a b -> c``, train ``a b``, valid ``a b -> d``: the last of the
      user's events that can be learned from is kept for validation. Held-out items that came before a target are in
      no history, but the user had them: `Cases.unshown`.

    Args:
        log_: the log.
        n_items: items in the catalogue, N.
        name: ``leave_one_out``, ``temporal`` or ``cold_items``.
        seed: of the users that are sampled and the items that are held out.
        max_history: newest events kept in every history.
        cold_share: share of items that ``cold_items`` holds out.
        test_share: share of events after the cut of ``temporal``; as many just before it validate.
        max_users: sample this many users (None: all).

    Raises:
        ConfigError: an unknown name, or a `test_share` that leaves nothing to learn from.
        DataError: no user can be tested or validated this way.
    """
    n_users = len(log_.user_ids)
    users = np.arange(n_users)
    if max_users is not None and max_users < n_users:
        users = np.sort(np.random.default_rng([seed, 0]).choice(n_users, max_users, replace=False))
        log.info("a sample of %d of %d users", max_users, n_users)
    train, valid, test = (_Builder(max_history) for _ in range(3))
    if name == "leave_one_out":
        _leave_one_out(log_, users, train, valid, test)
        remedy = "no user has the three events that it needs"
    elif name == "temporal":
        _temporal(log_, users, test_share, train, valid, test)
        remedy = "no user has events on both sides of a cut; another data.test_share or data.split may do"
    elif name == "cold_items":
        held_out = np.zeros(n_items, bool)
        n_cold = max(1, round(cold_share * n_items))
        held_out[np.random.default_rng([seed, 1]).choice(n_items, n_cold, replace=False)] = True
        _cold_items(log_, users, held_out, train, valid, test)
        remedy = "no user has both a held-out item and two others; raise data.cold_share or use another data.split"
    else:
        raise ConfigError(f"unknown split {name!r}; expected leave_one_out, temporal or cold_items")
    for part, builder in (("test", test), ("validation", valid)):
        if not builder.users:
            raise DataError(f"split {name} leaves no {part} case among {len(users)} users: {remedy}")
    cold = np.ones(n_items, bool)
    cold[np.concatenate(train.histories)] = False
    split = Split(name, train.histories, np.array(train.users, np.int64), valid.cases(), test.cases(), cold)
    log.info("split %s; %d users have no test case", split.summary(), len(users) - len(split.test))
    return split


def _leave_one_out(log_: Log, users: np.ndarray, train: _Builder, valid: _Builder, test: _Builder) -> None:
    for user in users.tolist():
        items = log_.history(user)
        if len(items) < 3:
            train.add(user, items)
            continue
        train.add(user, items[:-2])
        valid.add(user, items[:-2], items[-2])
        test.add(user, items[:-1], items[-1])


def _temporal(
    log_: Log, users: np.ndarray, test_share: float, train: _Builder, valid: _Builder, test: _Builder
) -> None:
    if test_share >= 0.5:
        raise ConfigError(
            f"data.test_share is {test_share}; temporal takes it twice (test and validation), so below 0.5"
        )
    owner = np.repeat(np.arange(len(log_.user_ids)), np.diff(log_.offsets))
    times = np.sort(log_.times[np.isin(owner, users)])
    first_test = times[min(round((1 - test_share) * len(times)), len(times) - 1)]
    first_valid = times[min(round((1 - 2 * test_share) * len(times)), len(times) - 1)]
    if not times[0] < first_valid < first_test:
        raise DataError(
            f"split temporal: times run from {times[0]} to {times[-1]}, and too many are equal to cut "
            f"{test_share:.0%} and as much before it off their end; use finer timestamps "
            "or split: leave_one_out"
        )
    for user in users.tolist():
        items = log_.history(user)
        own = log_.times[log_.offsets[user] : log_.offsets[user + 1]]
        n_train, n_before_test = np.searchsorted(own, [first_valid, first_test])
        train.add(user, items[:n_train])
        if n_train < n_before_test:
            valid.add(user, items[:n_train], items[n_train])
        if n_before_test < len(items):
            test.add(user, items[:n_before_test], items[n_before_test])


def _cold_items(
    log_: Log, users: np.ndarray, held_out: np.ndarray, train: _Builder, valid: _Builder, test: _Builder
) -> None:
    for user in users.tolist():
        items = log_.history(user)
        is_cold = held_out[items]
        warm = items[~is_cold]
        if len(warm) < 2:
            train.add(user, warm)
        else:
            train.add(user, warm[:-1])
            before = items[: np.flatnonzero(~is_cold)[-1]]
            valid.add(user, warm[:-1], warm[-1], before[held_out[before]])
        if is_cold.any():
            last = np.flatnonzero(is_cold)[-1]
            before = items[:last]
            test.add(user, before[~is_cold[:last]], items[last], before[is_cold[:last]])
