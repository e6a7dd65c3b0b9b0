"""Intervals hold the truth about as often as they say, and the tables follow from what is kept per user."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import new_items, posters
from benchmarks.accuracy import KEPT
from benchmarks.kept import Kept
from benchmarks.lists import METRICS, values
from benchmarks.results import RESULTS, over_seeds, over_users_and_seeds


def test_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(0.1, 1, 50) for _ in range(5)]
    mean, ends = over_seeds(parts)
    expected = stats.ttest_1samp([part.mean() for part in parts], 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, *ends], [np.mean(parts), expected.low, expected.high])


def test_seeds_that_differ_are_not_hidden_by_many_users() -> None:
    rng = np.random.default_rng(1)
    held = {"seeds": 0, "users": 0}
    for _ in range(400):
        parts = [rng.normal(0, 0.1) + rng.normal(0, 1, 1000) for _ in range(5)]  # the truth is 0
        for name, of in (("seeds", parts), ("users", [np.concatenate(parts)])):
            low, high = over_seeds(of)[1]
            held[name] += low <= 0 <= high
    assert 0.92 < held["seeds"] / 400 < 0.98
    assert held["users"] / 400 < 0.8  # the control: users alone are far too sure


def test_users_and_seeds_are_both_resampled() -> None:
    rng = np.random.default_rng(2)
    held = {"both": 0, "users": 0}
    for _ in range(150):
        grid = rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.5, (1, 200)) + rng.normal(0, 1, (8, 200))  # the truth is 0
        for name, of in (("both", list(grid)), ("users", [grid.mean(0)])):
            low, high = over_users_and_seeds(of, 300)[1]
            held[name] += low <= 0 <= high
    assert held["both"] / 150 > 0.88  # few seeds: a little short of 95
    assert held["users"] < held["both"]


def test_a_place_gives_both_metrics() -> None:
    places = np.array([0, 1, 2, 10, 11, 50], np.uint8)
    assert values(places, "recall@10").tolist() == [0, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(values(places, "ndcg@10"), [0, 1, 1 / np.log2(3), 1 / np.log2(11), 0, 0])


def shown(text: str, model: str) -> list[float]:
    """The first two numbers of a model's row."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
    return [float(cell.split()[0]) for cell in row.split("|")[2:4]]


def test_the_tables_follow_from_what_is_kept() -> None:
    kept = Kept(KEPT)
    tables = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))["tables"]
    checked = 0
    for heading, text in tables.items():
        name = heading.split(",")[0]
        if "leave-one-out" in heading:
            seeds = [kept.get(f"lists/{name}/{seed}/genrec") for seed in kept.below(f"lists/{name}")]
            places = [of["places"] for of in seeds if of]  # of some seeds there are only baselines yet
            found = [np.mean([values(one, metric) for one in places]) for metric in METRICS]
            np.testing.assert_allclose(shown(text, "genrec"), found, atol=5.1e-5)
        elif "posters, a sample" in heading:
            measured = kept.below(posters.PART)
            for model in set.intersection(*(set(kept.below(f"{posters.PART}/{seed}")) for seed in measured)):
                row = posters.KINDS[model]
                places = [kept.get(f"{posters.PART}/{seed}/{model}")["places"] for seed in measured]
                found = [np.mean([values(one, metric) for one in places]) for metric in METRICS]
                np.testing.assert_allclose(shown(text, row), found, atol=5.1e-5)
        elif "items held out" in heading:
            hits = [kept.get(f"new-items/{name}/{seed}") for seed in kept.below(f"new-items/{name}")]
            for row in (new_items.PLAIN, new_items.RIVALS[1]):
                found = [np.mean([of[f"{part}/{row}"].mean() for of in hits]) for part in ("new", "warm")]
                np.testing.assert_allclose(shown(text, row), found, atol=5.1e-5)
        else:
            continue
        checked += 1
    assert checked


def test_what_is_kept_grows_part_by_part(tmp_path: Path) -> None:
    path = tmp_path / "kept.npz"
    Kept(path).put("lists/a/0/x", {"places": np.arange(3), "cost": np.ones(2)}, 5)
    kept = Kept(path)
    kept.put("lists/a/10/x", {"places": np.arange(4)}, 1)
    kept.put("lists/a/2/x", {"places": np.arange(5)}, 2)
    assert kept.below("lists/a") == ["0", "2", "10"]
    kept.put("lists/a/0/x", {"places": np.arange(6)}, 3)
    again = Kept(path)
    assert {name: len(of) for name, of in again.get("lists/a/0/x").items()} == {"places": 6}
    assert again.seconds == 6
    assert again.below("lists/b") == []
    assert [line.split(" | ")[0] for line in again.runs().splitlines()[2:]] == [f"| lists/a/{n}" for n in (0, 10, 2)]


def test_new_items_are_judged_by_their_sets_lift_beside_the_best_rival() -> None:
    judged = new_items.name_of(new_items.JUDGED)
    assert judged in map(new_items.name_of, new_items.LIFTS)
    worse, best, worst = new_items.RIVALS
    new = {judged: np.array([1.0, 0, 1, 0]), best: np.array([0.0, 0, 1, 0]), worse: np.zeros(4), worst: np.zeros(4)}
    warm = {judged: np.array([1.0, 1, 0, 0]), new_items.PLAIN: np.array([1.0, 1, 1, 0])}
    gain, ratio, loss = new_items.checks_of("amazon-scientific", [new_items.NewItemsSeed(new, warm)])
    assert gain.value == 0.25
    assert best in gain.check
    assert (ratio.value, ratio.holds) == (2.0, True)
    assert loss.value == pytest.approx(1 / 3)
    assert not loss.holds
