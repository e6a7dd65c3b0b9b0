"""Kinship: content that the log cares about makes relatives, other content does not, and nothing looks ahead."""

import numpy as np
import torch
from torch.nn import functional as F

from genrec.adapters.kinship import KIN, Kinship
from genrec.adapters.newcomers import Newcomers
from genrec.item_vectors import cooccurrence_factors

N, GROUPS, NEW = 240, 6, 30


def world(seed: int = 0) -> tuple[dict[str, torch.Tensor], list[np.ndarray], np.ndarray, torch.Tensor]:
    """Users take from one group; a text tells an item's group, a picture something louder that nobody cares about."""
    rng = np.random.default_rng(seed)
    group, looks = rng.integers(0, GROUPS, N), rng.integers(0, GROUPS, N)
    known = torch.arange(N) < N - NEW
    log = [rng.choice(np.flatnonzero((group == user % GROUPS) & known.numpy()), 8) for user in range(300)]
    told = torch.from_numpy(np.eye(GROUPS)[group] + 0.4 * rng.normal(size=(N, GROUPS)))
    seen = torch.from_numpy(np.eye(GROUPS)[looks] + 0.1 * rng.normal(size=(N, GROUPS)))
    keys = {"text": F.normalize(told.float(), dim=1), "image": F.normalize(seen.float(), dim=1)}
    return keys, [events.astype(np.int32) for events in log], group, known


def fitted(keys: dict[str, torch.Tensor], log: list[np.ndarray], known: torch.Tensor) -> Kinship:
    factors, events = cooccurrence_factors(log, N, 16, 0), np.bincount(np.concatenate(log), minlength=N)
    return Kinship.fit(keys, factors, events, known)


def of_its_group(keys: dict[str, torch.Tensor], group: np.ndarray, known: torch.Tensor) -> float:
    """Share of new items' relatives that are of their own group."""
    found = Newcomers.nearest(keys, known, 5, 0.0)
    return float((group[found.relatives.numpy()] == group[found.rows.numpy()][:, None]).mean())


def test_relatives_are_those_that_the_same_people_take() -> None:
    keys, log, group, known = world()
    found = of_its_group({KIN: fitted(keys, log, known).keys(keys)}, group, known)
    assert found > of_its_group({"text": keys["text"]}, group, known) - 0.03  # as if told that pictures do not count
    assert found > of_its_group(keys, group, known) + 0.15
    shuffled = [np.random.default_rng(1).permutation(N - NEW)[events].astype(np.int32) for events in log]
    assert found > of_its_group({KIN: fitted(keys, shuffled, known).keys(keys)}, group, known) + 0.3  # the log tells


def test_it_is_a_weighted_ridge_regression() -> None:
    """Against least squares with rows that pull to zero; its keys are unit vectors about the known items' mean."""
    keys, log, _, known = world(1)
    factors, events = cooccurrence_factors(log, N, 16, 0), np.bincount(np.concatenate(log), minlength=N)
    x = torch.cat([keys["image"], keys["text"], torch.ones(N, 1)], 1).numpy().astype(np.float64)
    root = np.sqrt(events / (events + 20.0))[known, None]
    rows = np.concatenate([root * x[known], 3.0**0.5 * np.eye(x.shape[1])])
    wanted = np.concatenate([root * factors[known], np.zeros((x.shape[1], factors.shape[1]))])
    predicted = x @ np.linalg.lstsq(rows, wanted, rcond=None)[0]
    expected = predicted - predicted[known].mean(0)
    found = Kinship.fit(keys, factors, events, known).keys(keys)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)


def test_what_it_was_not_shown_changes_nothing() -> None:
    keys, log, _, known = world(2)
    factors, events = cooccurrence_factors(log, N, 16, 0), np.bincount(np.concatenate(log), minlength=N)
    other = factors.copy()
    other[~known] = 1.0
    changed = {name: torch.where(known[:, None], of, of.flip(0)) for name, of in keys.items()}
    before, after = Kinship.fit(keys, factors, events, known), Kinship.fit(changed, other, events, known)
    assert torch.equal(before.weights, after.weights)


def test_items_without_content_are_nobodys_kin() -> None:
    keys, log, _, known = world(3)
    kinship = fitted(keys, log, known)
    nothing = {name: torch.zeros(2, of.shape[1]) for name, of in keys.items()}
    found = kinship.keys(nothing)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], found[1])
    assert float((found[:1] @ kinship.keys(keys)[known].T).abs().mean()) < 0.5
