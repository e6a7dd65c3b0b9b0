"""Which texts are measured: users whose texts were never trained, each with an item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genrec.errors import DataError
from genrec.reader import CANDIDATES
from genrec.training.texts import held_out_items, held_out_users
from genrec.workspace import Workspace


@dataclass(frozen=True)
class Subject:
    """One text to write: for whom, about what, in which style."""

    user: str
    history: list[int]
    row: int
    style: str


def _cases_of_held_out_users(space: Workspace) -> list[int]:
    apart = held_out_users(len(space.user_ids), space.recipe.seed)
    return [i for i, user in enumerate(space.split.test.users) if apart[user]]


def subjects(space: Workspace, n: int, seed: int) -> list[Subject]:
    """Users about whom no text was trained, each with one random available item that is not in the history.

    Raises:
        DataError: too few such users for the reader.
    """
    cases, found = space.split.test, _cases_of_held_out_users(space)
    if len(found) < CANDIDATES:
        raise DataError(f"{len(found)} held-out users with a test case, the reader needs {CANDIDATES}; use more users")
    rng = np.random.default_rng([seed, 3])
    rows = np.flatnonzero(space.catalogue.available)
    chosen = []
    for i in rng.permutation(found)[:n]:
        history = cases.histories[i].tolist()
        user = space.user_ids[cases.users[i]]
        row = int(rng.choice(np.setdiff1d(rows, history)))
        chosen.append(Subject(user, history, row, space.writer.style(user, rng)))
    return chosen


def human_subjects(space: Workspace, n: int, seed: int) -> tuple[list[Subject], list[str]]:
    """At most n texts that people wrote and training never saw, each with whom it is for and what it is about.

    Held-out users' reviews of their test items; where these are fewer than n, copy of held-out items too, each for a
    random held-out user who has not had the item.
    """
    cases, found, human = space.split.test, _cases_of_held_out_users(space), space.human_texts
    rng = np.random.default_rng([seed, 6])
    pairs: list[tuple[int, int, str]] = []  # case, item, text
    for i in rng.permutation(found):
        row = int(cases.targets[i])
        if text := human.review(space.user_ids[cases.users[i]], row):
            pairs.append((int(i), row, text))
    apart = held_out_items(len(space.catalogue), space.recipe.seed) & space.catalogue.available
    for row in rng.permutation(np.flatnonzero(apart)) if found else []:
        i = int(rng.choice(found))
        if (text := human.copy(int(row))) and row not in cases.histories[i]:
            pairs.append((i, int(row), text))
    chosen = []
    for i, row, _ in pairs[:n]:
        user = space.user_ids[cases.users[i]]
        chosen.append(Subject(user, cases.histories[i].tolist(), row, space.writer.style(user, rng)))
    return chosen, [text for *_, text in pairs[:n]]
