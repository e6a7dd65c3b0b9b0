"""Intervals over seeds: they hold the truth about as often as they say, where users alone would not."""

import numpy as np
from scipy import stats

from benchmarks.results import over_seeds


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
