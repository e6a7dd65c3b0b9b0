"""Top lists, metrics.json and the tables made from it."""

import json
from typing import Any

import numpy as np
import pytest

from genrec import metrics
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.evaluate import evaluate, format_markdown, format_table, load_per_user, save_per_user, top_items
from genrec.splits import Cases, Split

N_USERS, N_ITEMS = 60, 80


def make_split(cold_items=(3, 4, 5)):
    rng = np.random.default_rng(0)
    cold = np.zeros(N_ITEMS, dtype=bool)
    cold[list(cold_items)] = True
    warm = np.flatnonzero(~cold)
    train = [rng.choice(warm, 6, replace=False).astype(np.int32) for _ in range(N_USERS)]
    users = np.arange(N_USERS)
    targets = rng.integers(6, N_ITEMS, N_USERS).astype(np.int32)
    targets[:9] = np.tile([3, 4, 5], 3)
    histories = [h[h != t] for h, t in zip(train, targets, strict=True)]
    cases = Cases(users=users, histories=histories, targets=targets)
    return Split(name="leave_one_out", train=train, train_users=users, valid=cases, test=cases, cold=cold)


def make_rankings(split):
    rng = np.random.default_rng(1)
    scores = rng.random((N_USERS, N_ITEMS)).astype(np.float32)
    helped = scores.copy()
    helped[np.arange(N_USERS), split.test.targets] += rng.random(N_USERS).astype(np.float32)
    seen = split.test.histories
    return {"genrec": top_items(helped, seen), "popularity": top_items(scores, seen)}


def run(split, rankings=None, **changes):
    counts = np.bincount(np.concatenate(split.train), minlength=N_ITEMS)
    settings: dict[str, Any] = {"train_counts": counts, "exclude_seen": True, "n_boot": 200, "seed": 0}
    settings |= {"pairs": [("genrec", "popularity")], "data": "toy"} | changes
    return evaluate(rankings or make_rankings(split), split, **settings)


def brute_top(row, seen, k, allowed):
    left = [i for i in range(len(row)) if i not in set(seen) and allowed[i] and row[i] != -np.inf]
    best = sorted(left, key=lambda i: (-row[i], i))[:k]
    return best + [-1] * (k - len(best))


@pytest.mark.parametrize("n_items", [7, 40, 90])
def test_top_items_equal_a_plain_sort(n_items):
    rng = np.random.default_rng(n_items)
    scores = rng.integers(-3, 3, (25, n_items)).astype(np.float32)  # many ties
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[rng.random(scores.shape) < 0.1] = -0.0
    before = scores.copy()
    seen = [rng.integers(0, n_items, rng.integers(0, 5)) for _ in range(25)]
    allowed = rng.random(n_items) < 0.8
    top = top_items(scores, seen, 50, allowed)
    assert top.dtype == np.int32
    assert top.shape == (25, 50)
    assert top.tolist() == [brute_top(row, s, 50, allowed) for row, s in zip(scores, seen, strict=True)]
    np.testing.assert_array_equal(scores, before)
    free = top_items(scores, None, 5)
    assert free.tolist() == [brute_top(row, [], 5, np.ones(n_items, bool)) for row in scores]


def test_top_items_refuse_nan():
    scores = np.zeros((3, 4), dtype=np.float32)
    scores[1, 2] = np.nan
    with pytest.raises(DataError, match="row 1 of the scores holds NaN"):
        top_items(scores, None)


def test_metrics_json_has_the_agreed_shape_and_values():
    split = make_split()
    rankings = make_rankings(split)
    groups = {"first": np.arange(N_USERS) < 20, "nobody": np.zeros(N_USERS, dtype=bool)}
    result, values = run(split, user_groups=groups)
    assert json.loads(json.dumps(result)) == result
    assert (result["data"], result["split"], result["users"]) == ("toy", "leave_one_out", N_USERS)
    assert list(result["models"]) == ["popularity", "genrec"]  # the agreed order, not the caller's
    assert result["seconds"] >= 0
    assert result["peak_rss_mb"] > 10
    expected = metrics.per_user(rankings["genrec"], split.test.targets)["ndcg@10"]
    np.testing.assert_array_equal(values["genrec"]["ndcg@10"], expected)
    entry = result["models"]["genrec"]["ndcg@10"]
    assert entry["mean"] == pytest.approx(expected.mean())
    assert entry["ci95"] == pytest.approx(metrics.ci95(expected, 200, 0))
    difference = expected - values["popularity"]["ndcg@10"]
    assert result["paired"]["genrec-popularity"]["ndcg@10"] == {
        "mean": pytest.approx(difference.mean()),
        "ci95": pytest.approx(metrics.ci95(difference, 200, 0)),
    }
    assert result["models"]["genrec"]["coverage"]["ci95"] is None
    assert result["models"]["genrec"]["invalid_rate"]["mean"] == 0
    group = result["groups"]["first"]
    assert group["users"] == 20
    assert set(group["models"]["genrec"]) == {"recall@10", "ndcg@10"}
    assert group["models"]["genrec"]["ndcg@10"]["mean"] == pytest.approx(expected[:20].mean())
    assert result["groups"]["nobody"] == {"users": 0, "models": {}, "paired": {}}


def test_cold_recall_is_over_users_with_a_cold_target():
    split = make_split()
    result, values = run(split)
    cold = result["models"]["genrec"]["cold_recall@50"]
    assert cold["mean"] == pytest.approx(values["genrec"]["recall@50"][:9].mean())
    assert "cold_recall@50" in result["paired"]["genrec-popularity"]
    without, _ = run(make_split(cold_items=()))
    assert not [m for of in without["models"].values() for m in of if m.startswith("cold")]


def test_invalid_places_are_counted_by_the_settings():
    split = make_split()
    top = top_items(np.zeros((N_USERS, N_ITEMS), dtype=np.float32) - np.arange(N_ITEMS), None)
    lists = {"rankings": {"popularity": top}, "pairs": []}
    strict, _ = run(split, **lists)
    loose, _ = run(split, **lists, exclude_seen=False)
    stock, _ = run(split, **lists, exclude_seen=False, allowed=np.arange(N_ITEMS) >= 4)
    rates = [r["models"]["popularity"]["invalid_rate"]["mean"] for r in (strict, loose, stock)]
    assert rates[0] > 0
    assert rates[1:] == [0, pytest.approx(0.4)]


def test_same_seed_gives_the_same_numbers():
    split = make_split()
    timing = {"seconds": 0, "peak_rss_mb": 0}
    assert run(split)[0] | timing == run(split)[0] | timing
    assert run(split)[0]["models"] != run(split, seed=1)[0]["models"]


def test_wrong_arguments_are_named():
    split = make_split()
    with pytest.raises(ConfigError, match=r"pairs name \['sasrec'\].*ranked: \['genrec', 'popularity'\]"):
        run(split, pairs=[("genrec", "sasrec")])
    with pytest.raises(DataError, match="model markov: 2 rows, but leave_one_out has 60"):
        run(split, rankings={"markov": np.zeros((2, 50), dtype=np.int32)}, pairs=[])
    with pytest.raises(DataError, match="group g: 3 rows"):
        run(split, user_groups={"g": np.ones(3, dtype=bool)})


def test_per_user_values_survive_the_disk(tmp_path):
    _, values = run(make_split())
    path = tmp_path / "deep" / "per_user.npz"
    save_per_user(path, values)
    loaded = load_per_user(path)
    assert list(loaded) == list(values)
    for model, of in values.items():
        assert list(loaded[model]) == list(of)
        for metric, array in of.items():
            np.testing.assert_array_equal(loaded[model][metric], array)
    assert [p.name for p in path.parent.iterdir()] == ["per_user.npz"]
    with pytest.raises(ArtefactError, match=r"missing\.npz: no per-user values"):
        load_per_user(tmp_path / "missing.npz")


def test_tables_show_means_and_intervals():
    result, _ = run(make_split(), user_groups={"first": np.arange(N_USERS) < 20})
    mean = result["models"]["genrec"]["ndcg@10"]["mean"]
    low, high = result["models"]["genrec"]["ndcg@10"]["ci95"]
    text, markdown = format_table(result), format_markdown(result)
    assert max(map(len, text.splitlines())) <= 120
    for part in ("toy leave_one_out, 60 users", "group first, 20 users", f"{mean:.3f}"):
        assert part in text
        assert part in markdown
    assert f"{low:.3f}..{high:.3f}" in text
    assert text.index("popularity") < text.index("genrec")
    assert f"| {mean:.3f} [{low:.3f}, {high:.3f}] |" in markdown
    bars = [{row.count("|") for row in part.splitlines() if "|" in row} for part in markdown.split("\n\n")]
    assert all(len(widths) <= 1 for widths in bars)  # rows as wide as their header
    assert "…" not in text
