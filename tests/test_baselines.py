"""Baselines against loops, on planted logs and on shuffled ones."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from genrec.baselines import ContentKNN, ItemKNN, Markov, Popularity, Ranker, ndcg10, rank
from genrec.errors import ConfigError
from genrec.splits import Cases


def small_log(n_users=30, n_items=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(1, 8)).astype(np.int32) for _ in range(n_users)], n_items


def make_cases(histories, targets):
    return Cases(users=np.arange(len(targets)), histories=histories, targets=np.array(targets, dtype=np.int32))


def successor_log(n_users, n_items, seed, shuffle=False):
    """Each user walks item -> item + 1 from a random start; shuffling leaves items without an order."""
    rng = np.random.default_rng(seed)
    walks = [((rng.integers(n_items) + np.arange(9)) % n_items).astype(np.int32) for _ in range(n_users)]
    if shuffle:
        walks = [rng.permutation(n_items)[:9].astype(np.int32) for _ in walks]
    return [w[:-1] for w in walks], [int(w[-1]) for w in walks]


HISTORIES = [np.array([3], np.int32), np.array([1, 2, 0, 5], np.int32), np.array([4, 4], np.int32)]


def test_popularity_counts():
    train, n_items = small_log()
    model = Popularity()
    model.fit(train, n_items)
    ranker: Ranker = model
    scores = ranker.scores(HISTORIES)
    assert scores.dtype == np.float32
    flat = np.concatenate(train).tolist()
    assert scores.tolist() == [[flat.count(i) for i in range(n_items)]] * 3


def brute_markov(train, n_items, history, decay, backoff):
    flat = np.concatenate(train).tolist()
    total = np.zeros(n_items)
    for lag in (1, 2, 3):
        counts, seen = np.zeros(n_items), 0
        if len(history) >= lag:
            for h in train:
                for place in range(lag, len(h)):
                    if h[place - lag] == history[-lag]:
                        counts[h[place]] += 1
                        seen += 1
        for j in range(n_items):
            share = flat.count(j) / len(flat)
            total[j] += decay ** (lag - 1) * (counts[j] + backoff * share) / (seen + backoff)
    return total


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_markov_equals_a_loop(decay):
    train, n_items = small_log()
    model = Markov(decay=decay, backoff=2.0)
    model.fit(train, n_items)
    scores = model.scores(HISTORIES)
    assert scores.dtype == np.float32
    for row, history in zip(scores, HISTORIES, strict=True):
        np.testing.assert_allclose(row, brute_markov(train, n_items, history, decay, 2.0), rtol=1e-5)


def test_markov_backs_off_to_popularity():
    train = [np.array([0, 1, 1, 2], np.int32), np.array([1, 0], np.int32)]
    model = Markov()
    model.fit(train, 5)
    unknown = model.scores([np.array([4], np.int32), np.array([], np.int32)])
    np.testing.assert_allclose(unknown[0] / unknown[0].sum(), np.array([2, 3, 1, 0, 0]) / 6, rtol=1e-5)
    np.testing.assert_allclose(unknown[0], unknown[1])


def test_item_knn_equals_sklearn():
    train, n_items = small_log()
    columns = np.zeros((len(train), n_items))
    for user, h in enumerate(train):
        columns[user, h] = 1
    cosine = cosine_similarity(columns.T)
    np.fill_diagonal(cosine, 0)
    model = ItemKNN(decay=0.5, shrinkage=0.0)
    model.fit(train, n_items)
    scores = model.scores([*HISTORIES, np.array([], np.int32)])
    assert scores.dtype == np.float32
    for row, history in zip(scores, HISTORIES, strict=False):
        expected = sum(0.5 ** (len(history) - 1 - s) * cosine[i] for s, i in enumerate(history))
        np.testing.assert_allclose(row, expected, atol=5e-6)
    assert scores[3].argmax() == np.bincount(np.concatenate(train)).argmax()  # no history: popularity
    model.shrinkage = 3.0
    shrunk = model.scores(HISTORIES)
    both, takers = columns.T @ columns, columns.sum(axis=0)
    expected = both[3] / (np.sqrt(takers[3] * takers) + 3.0)
    expected[3] = 0
    np.testing.assert_allclose(shrunk[0], expected, atol=5e-6)


@pytest.mark.parametrize("model", [Markov(), ItemKNN()], ids=["markov", "itemknn"])
def test_learns_a_planted_order_and_stays_at_chance_without_it(model):
    n_items = 100
    for shuffle in (False, True):
        histories, targets = successor_log(400, n_items, seed=1, shuffle=shuffle)
        fresh, answers = successor_log(400, n_items, seed=2, shuffle=shuffle)
        model.fit(histories, n_items)
        model.tune(make_cases(histories, targets))
        score, popular = ndcg10(model, make_cases(fresh, answers), True), Popularity()
        popular.fit(histories, n_items)
        floor = ndcg10(popular, make_cases(fresh, answers), True)
        chance = np.sum(1 / np.log2(np.arange(2, 12))) / (n_items - 8)  # a random list without the seen items
        if shuffle:
            assert score < 1.6 * chance
        else:
            assert score > 0.6
            assert score > 5 * floor


def test_tuning_takes_the_best_of_the_grid():
    histories, targets = successor_log(200, 40, seed=3)
    cases = make_cases(histories, targets)
    for model, names in ((Markov(), {"decay", "backoff"}), (ItemKNN(), {"decay", "shrinkage"})):
        model.fit(histories, 40)
        chosen = model.tune(cases)
        assert set(chosen) == names | {"ndcg@10"}
        assert chosen["ndcg@10"] == pytest.approx(ndcg10(model, cases, True))
        assert all(getattr(model, name) == chosen[name] for name in names)
        for decay in model.grid["decay"]:
            model.decay = decay
            assert ndcg10(model, cases, True) <= chosen["ndcg@10"] + 1e-12


def test_content_knn_equals_a_loop():
    rng = np.random.default_rng(3)
    keys = [rng.normal(size=(9, width)).astype(np.float32) for width in (4, 6)]
    keys = [of / np.linalg.norm(of, axis=1, keepdims=True) for of in keys]
    keys[1][2] = 0  # an item without the modality
    model = ContentKNN(decay=0.7)
    model.fit(keys)
    histories = [np.array(h, np.int32) for h in ([], [2], [4, 2, 4, 7])]
    expected = np.zeros((3, 9))
    for row, history in enumerate(histories):
        for of in keys:
            mean = sum((0.7**age * of[item] for age, item in enumerate(history[::-1])), np.zeros(of.shape[1]))
            if np.linalg.norm(mean):
                expected[row] += of @ mean / np.linalg.norm(mean)
    np.testing.assert_allclose(model.scores(histories), expected, atol=1e-6)


@pytest.mark.parametrize("repeats", [True, False])
def test_tuning_finds_out_whether_items_repeat(repeats):
    rng = np.random.default_rng(5)
    walks = [rng.permutation(20)[:6].astype(np.int32) for _ in range(300)]
    targets = [int(w[rng.integers(6)]) if repeats else int(rng.choice(np.setdiff1d(np.arange(20), w))) for w in walks]
    model = ItemKNN()
    model.fit([np.append(w, t).astype(np.int32) for w, t in zip(walks, targets, strict=True)], 20)
    model.similarity += np.eye(20)  # so that what is in the history comes first
    assert model.tune(make_cases(walks, targets), exclude_seen=False)["repeats"] is repeats
    assert np.isneginf(model.scores(walks)).any() is np.bool_(not repeats)


def test_rank_does_not_depend_on_the_batch():
    train, n_items = small_log()
    model = Markov()
    model.fit(train, n_items)
    cases = make_cases(train, [0] * len(train))
    whole = rank(model, cases, exclude_seen=True)
    np.testing.assert_array_equal(whole, rank(model, cases, exclude_seen=True, batch_size=7))
    assert whole.shape == (30, 50)
    assert not any(np.isin(row, h).any() for row, h in zip(whole, train, strict=True))
    assert rank(model, cases[:0], exclude_seen=True).shape == (0, 50)
    allowed = np.arange(n_items) < 5
    assert rank(model, cases, exclude_seen=False, allowed=allowed).max() == 4


def test_rank_leaves_out_what_no_history_shows():
    train, n_items = small_log()
    model = Markov()
    model.fit(train, n_items)
    best = rank(model, make_cases(train, [0] * len(train)), exclude_seen=True)[:, :1].astype(np.int32)
    cases = dataclasses.replace(make_cases(train, [0] * len(train)), unshown=list(best))
    assert not (rank(model, cases, exclude_seen=True, batch_size=7) == best).any()
    np.testing.assert_array_equal(
        rank(model, cases, exclude_seen=False),
        rank(model, dataclasses.replace(cases, unshown=None), exclude_seen=False),
    )


def test_items_outside_the_catalogue_are_named():
    with pytest.raises(ConfigError, match=r"span 2\.\.9, the catalogue has rows 0\.\.4"):
        Popularity().fit([np.array([2, 9], np.int32)], 5)
