"""Metrics against ranx, scipy and loops."""

import numpy as np
import pytest
import scipy.stats

from genrec import metrics
from genrec.errors import DataError


def random_lists(n_users=40, n_items=80, seed=0):
    rng = np.random.default_rng(seed)
    top = np.stack([rng.permutation(n_items)[:50] for _ in range(n_users)]).astype(np.int32)
    top[::5, 30:] = -1
    targets = rng.integers(0, n_items, n_users).astype(np.int32)
    targets[:10] = top[:10, rng.integers(0, 12, 10)].diagonal()
    return top, targets


def test_worked_example():
    top = np.full((2, 50), -1, dtype=np.int32)
    top[0, :3], top[1, :2] = [7, 3, 9], [4, 1]
    values = metrics.per_user(top, np.array([3, 8], dtype=np.int32))
    assert set(values) == {"recall@1", "recall@5", "recall@10", "recall@50", "ndcg@5", "ndcg@10", "mrr"}
    assert values["recall@1"].tolist() == [0, 0]
    assert values["recall@5"].tolist() == [1, 0]
    assert values["ndcg@5"].tolist() == [1 / np.log2(3), 0]
    assert values["mrr"].tolist() == [0.5, 0]
    assert all(v.dtype == np.float64 for v in values.values())


def test_per_user_equals_ranx():
    ranx = pytest.importorskip("ranx")
    top, targets = random_lists()
    qrels = ranx.Qrels({f"u{u:02d}": {f"i{t}": 1} for u, t in enumerate(targets)})
    run = ranx.Run(
        {f"u{u:02d}": {f"i{i}": 50.0 - place for place, i in enumerate(row) if i >= 0} for u, row in enumerate(top)}
    )
    ours = metrics.per_user(top, targets)
    for name in ("recall@10", "ndcg@10", "mrr"):
        theirs = ranx.evaluate(qrels, run, [name], return_mean=False)
        np.testing.assert_allclose(ours[name], theirs, atol=1e-12, err_msg=name)
    assert 0 < ours["recall@10"].mean() < 1


def test_random_lists_stay_at_chance():
    rng = np.random.default_rng(1)
    top = np.stack([rng.permutation(200)[:50] for _ in range(4000)]).astype(np.int32)
    values = metrics.per_user(top, rng.integers(0, 200, 4000).astype(np.int32))
    assert values["recall@10"].mean() == pytest.approx(10 / 200, abs=4 * np.sqrt(0.05 * 0.95 / 4000))


@pytest.mark.parametrize(
    ("top", "targets", "match"),
    [
        (np.zeros((2, 50), int), np.zeros(3, int), r"\(2, 50\) and targets \(3,\)"),
        (np.zeros((2, 20), int), np.zeros(2, int), "lists hold 20 items, recall@50"),
        (np.zeros((2, 50), int), np.array([0, -1]), "user 1 has a negative target"),
    ],
)
def test_bad_shapes_are_named(top, targets, match):
    with pytest.raises(DataError, match=match):
        metrics.per_user(top, targets)


def test_coverage_and_tail_share():
    top = np.full((2, 50), -1, dtype=np.int32)
    top[0, :3], top[1, :2] = [0, 1, 2], [2, 9]
    counts = np.array([5, 9, 1, 1, 1, 1, 1, 1, 1, 0])  # the head is items 1 and 0
    assert metrics.coverage(top, 10) == 4 / 10
    assert metrics.tail_share(top, counts).tolist() == [0.1, 0.2]
    top[0, 12] = 5  # below the tenth place: not counted
    assert metrics.coverage(top, 10) == 4 / 10


def test_invalid_rate_counts_every_kind_once():
    top = np.arange(50, dtype=np.int32)[None].repeat(6, axis=0)
    top[1, 3] = -1
    top[2, 4] = 60
    top[3, 5] = 0
    top[5, :2] = -1  # two empty places: two bad ones, not a repetition on top
    seen = [np.array([], dtype=np.int32)] * 4 + [np.array([2, 2, 3, 49])] + [np.array([], dtype=np.int32)]
    assert metrics.invalid_rate(top, 50, seen=seen).tolist() == [0, 0.1, 0.1, 0.1, 0.2, 0.2]
    assert metrics.invalid_rate(top, 50).tolist() == [0, 0.1, 0.1, 0.1, 0, 0.2]
    allowed = np.ones(50, dtype=bool)
    allowed[9] = False
    assert metrics.invalid_rate(top, 50, allowed=allowed)[0] == 0.1


def test_interval_equals_scipy_and_the_normal_formula():
    values = np.random.default_rng(2).gamma(2.0, size=400)
    low, high = metrics.ci95(values, 4000, seed=0)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    error = values.std() / np.sqrt(400)
    # two percentiles of 4,000 resamples differ by about 0.04 standard errors
    assert abs(low - theirs.low) < 0.15 * error
    assert abs(high - theirs.high) < 0.15 * error
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_interval_is_repeatable_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(4).random((30, 2))
    whole = metrics.intervals(values, 200, seed=5)
    monkeypatch.setattr(metrics, "CHUNK_WEIGHTS", 70)
    np.testing.assert_allclose(metrics.intervals(values, 200, seed=5), whole, rtol=1e-12)
    assert not np.allclose(metrics.intervals(values, 200, seed=6), whole)
    assert metrics.ci95(values[:, 0], 200, seed=5) == pytest.approx(tuple(whole[0]))


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(6)
    inside = 0
    for trial in range(300):
        low, high = metrics.ci95((rng.random(150) < 0.3).astype(float), 300, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.99


def test_pairing_is_tighter_than_two_intervals():
    rng = np.random.default_rng(7)
    base = rng.random(500)
    other = base - 0.02 + 0.01 * rng.standard_normal(500)
    difference = metrics.paired(base, other, 500, seed=0)
    low, high = difference["ci95"]
    assert difference["mean"] == pytest.approx((base - other).mean())
    assert 0 < low < 0.02 < high < 0.03
    assert metrics.paired(base, base, 500, seed=0) == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_no_users_is_an_error():
    with pytest.raises(DataError, match="found 0 users"):
        metrics.ci95(np.array([]), 100, seed=0)
