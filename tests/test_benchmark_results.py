"""Intervals hold the truth about as often as they say, and the tables follow from what is kept per user."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from benchmarks import new_items
from benchmarks.accuracy import METRICS, values
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


def test_the_tables_follow_from_the_places() -> None:
    if not (RESULTS / "accuracy-places.npz").is_file():
        pytest.skip("no run with lists is kept")
    tables = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))["tables"]
    with np.load(RESULTS / "accuracy-places.npz") as places:
        for heading, text in tables.items():
            if "leave-one-out" not in heading:
                continue
            name = heading.split(",")[0]
            seeds = [key for key in places.files if re.fullmatch(rf"{name}/\d+/genrec", key)]
            found = [np.mean([values(places[key], metric) for key in seeds]) for metric in METRICS]
            np.testing.assert_allclose(shown(text, "genrec"), found, atol=5.1e-5)


def test_the_tables_of_new_items_follow_from_the_hits() -> None:
    if not (RESULTS / "accuracy-new-items.npz").is_file():
        pytest.skip("no run with new items is kept")
    tables = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))["tables"]
    with np.load(RESULTS / "accuracy-new-items.npz") as hits:
        for heading, text in tables.items():
            if "items held out" not in heading:
                continue
            name = heading.split(",")[0]
            for part, value in zip(("new", "warm"), shown(text, new_items.RIVAL), strict=True):
                keys = [k for k in hits.files if re.fullmatch(rf"{name}/\d+/{part}/{new_items.RIVAL}", k)]
                assert value == pytest.approx(np.mean([hits[k].mean() for k in keys]), abs=5.1e-5)


def test_the_largest_cheap_lift_is_chosen() -> None:
    recalls = {"plain": 0.100, "lift 0": 0.101, "lift 0.25": 0.0985, "lift 0.5": 0.0975, "lift 1": 0.09, "lift 2": 0.08}
    assert new_items.choose(recalls) == "lift 0.25"
    assert new_items.choose(dict.fromkeys(recalls, 0.1)) == "lift 2"
    assert new_items.choose({**dict.fromkeys(recalls, 0.05), "plain": 0.1}) == "lift 0"  # none is cheap
