"""Kinship: content that the log cares about makes relatives and fame, other content does not, nothing looks ahead."""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F

from genrec.adapters.kinship import DOUBT, FAME_RIDGE, RIDGE, Kinship
from genrec.adapters.newcomers import Newcomers
from genrec.item_vectors import cooccurrence_factors

N, GROUPS, NEW = 240, 6, 30
Keys = dict[str, torch.Tensor]


def world(seed: int = 0) -> tuple[Keys, sparse.csr_matrix, list[np.ndarray], np.ndarray, torch.Tensor]:
    """Users take from one group, and from the second half of a group oftener; a text tells an item's group, a fact its
    half, and a picture something louder that nobody cares about."""
    rng = np.random.default_rng(seed)
    group, half, looks = (rng.integers(0, of, N) for of in (GROUPS, 2, GROUPS))
    known = torch.arange(N) < N - NEW
    log = []
    for user in range(300):
        rows = np.flatnonzero((group == user % GROUPS) & known.numpy())
        log.append(rng.choice(rows, 8, p=(1 + 4 * half[rows]) / (1 + 4 * half[rows]).sum()).astype(np.int32))
    told = torch.from_numpy(np.eye(GROUPS)[group] + 0.4 * rng.normal(size=(N, GROUPS)))
    seen = torch.from_numpy(np.eye(GROUPS)[looks] + 0.1 * rng.normal(size=(N, GROUPS)))
    keys = {"text": F.normalize(told.float(), dim=1), "image": F.normalize(seen.float(), dim=1)}
    return keys, sparse.csr_matrix(np.eye(2, dtype=np.float32)[half]), log, group, known


def of_log(log: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return cooccurrence_factors(log, N, 16, 0), np.bincount(np.concatenate(log), minlength=N)


def fitted(keys: Keys, facts: sparse.csr_matrix, log: list[np.ndarray], known: torch.Tensor) -> Kinship:
    return Kinship.fit(keys, facts, *of_log(log), known)


def of_its_group(keys: torch.Tensor, group: np.ndarray, known: torch.Tensor) -> float:
    """Share of new items' relatives that are of their own group."""
    found = Newcomers.nearest(keys, torch.zeros(N), known, 5, 0.0)
    return float((group[found.relatives.numpy()] == group[found.rows.numpy()][:, None]).mean())


def test_relatives_are_those_that_the_same_people_take() -> None:
    keys, facts, log, group, known = world()
    found = of_its_group(fitted(keys, facts, log, known).of(keys, facts)[0], group, known)
    assert found > of_its_group(keys["text"], group, known) - 0.03  # as if told that pictures do not count
    assert found > of_its_group(torch.cat([*keys.values()], 1), group, known) + 0.15  # by all of them
    shuffled = [np.random.default_rng(1).permutation(N - NEW)[events].astype(np.int32) for events in log]
    by_chance = fitted(keys, facts, shuffled, known).of(keys, facts)[0]
    assert found > of_its_group(by_chance, group, known) + 0.3  # the log tells


def test_fame_is_of_those_whose_like_is_taken_often() -> None:
    keys, facts, log, _, known = world(4)
    kinship = fitted(keys, facts, log, known)
    fame, half = kinship.of(keys, facts)[1], facts.toarray()[:, 1] > 0
    assert abs(float(fame[known].mean())) < 1e-4
    taken = np.log1p(of_log(log)[1])
    apart = float(taken[known.numpy() & half].mean() - taken[known.numpy() & ~half].mean())
    new = ~known.numpy()
    assert 0.7 * apart < float(fame[new & half].mean() - fame[new & ~half].mean()) < 1.1 * apart
    assert fame[new & half].min() > fame[new & ~half].max()


def least_squares(x: Any, said: Any, sure: Any, known: torch.Tensor, penalty: float) -> np.ndarray:
    """Ridge regression as least squares with rows that pull to zero: predictions about the known items' mean."""
    root = np.sqrt(sure)[known, None]
    rows = np.concatenate([root * x[known], penalty**0.5 * np.eye(x.shape[1])])
    wanted = np.concatenate([root * said[known], np.zeros((x.shape[1], said.shape[1]))])
    predicted = x @ np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return predicted - predicted[known].mean(0)


def test_it_is_two_ridge_regressions(monkeypatch) -> None:
    monkeypatch.setattr("genrec.adapters.kinship.BLOCK", 37)
    keys, facts, log, _, known = world(1)
    factors, events = of_log(log)
    x = np.concatenate([keys["image"], keys["text"], facts.toarray(), np.ones((N, 1))], 1).astype(np.float64)
    expected = least_squares(x, factors, events / (events + DOUBT), known, RIDGE)
    kinship = Kinship.fit(keys, facts, factors, events, known)
    found, fame = kinship.of(keys, facts)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)
    expected = least_squares(x, np.log1p(events)[:, None], np.ones(N), known, FAME_RIDGE)
    np.testing.assert_allclose(fame[:, None], expected, atol=1e-4)


def test_what_it_was_not_shown_changes_nothing() -> None:
    keys, facts, log, _, known = world(2)
    factors, events = of_log(log)
    other, counts, stated = factors.copy(), events.copy(), facts.tolil()
    other[~known], counts[~known], stated[np.flatnonzero(~known)] = 1.0, 9, 1.0
    changed = {name: torch.where(known[:, None], of, of.flip(0)) for name, of in keys.items()}
    before = Kinship.fit(keys, facts, factors, events, known)
    after = Kinship.fit(changed, stated.tocsr(), other, counts, known)
    assert torch.equal(before.weights, after.weights)


def test_items_without_content_are_nobodys_kin() -> None:
    keys, facts, log, _, known = world(3)
    kinship = fitted(keys, facts, log, known)
    nothing = {name: torch.zeros(2, of.shape[1]) for name, of in keys.items()}, sparse.csr_matrix((2, 2), dtype="f4")
    found = kinship.of(*nothing)[0]
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], found[1])
    assert float((found[:1] @ kinship.of(keys, facts)[0][known].T).abs().mean()) < 0.5
