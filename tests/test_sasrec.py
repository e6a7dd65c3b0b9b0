"""SASRec learns a planted order, nothing from a shuffled one, and never notices padding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genrec.adapters.catalogue_loss import ROWS, catalogue_loss
from genrec.adapters.self_attention import Network, left_pad
from genrec.baselines import Popularity, Ranker, ndcg10
from genrec.errors import ConfigError
from genrec.sasrec import SASRec
from genrec.splits import Cases

N_ITEMS = 60


def make_cases(walks):
    targets = np.array([w[-1] for w in walks], dtype=np.int32)
    return Cases(users=np.arange(len(walks)), histories=[w[:-1] for w in walks], targets=targets)


def planted(n_users, seed, shuffle=False):
    """Walks along a hidden permutation: the next item is the successor of the last; or random items."""
    order = np.random.default_rng(99).permutation(N_ITEMS)
    successor = dict(zip(order, np.roll(order, -1), strict=True))
    rng = np.random.default_rng(seed)
    walks = []
    for _ in range(n_users):
        walk = [rng.integers(N_ITEMS)]
        while len(walk) < rng.integers(5, 10):
            walk.append(successor[walk[-1]])
        if shuffle:
            walk = list(rng.permutation(N_ITEMS)[: len(walk)])
        walks.append(np.array(walk, dtype=np.int32))
    return walks


def fitted(walks, **settings):
    model = SASRec(**({"epochs": 20, "width": 32, "patience": 5, "dropout": 0.2} | settings))
    found = model.fit([w[:-1] for w in walks], N_ITEMS, make_cases(walks[:150]))
    return model, found


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(20, max_history=12, width=16, layers=2, heads=2, dropout=0.4).eval()


HISTORIES = [np.array(h, dtype=np.int32) for h in ([1, 5, 2, 19, 3, 3, 0], [4, 7], [9, 8, 7, 6], [0, 0, 0])]


def test_learns_a_planted_order_far_above_popularity():
    walks, fresh = planted(400, seed=1), make_cases(planted(200, seed=2))
    model, found = fitted(walks)
    ranker: Ranker = model
    popular = Popularity()
    popular.fit(walks, N_ITEMS)
    assert ndcg10(ranker, fresh, True) > 0.8
    assert ndcg10(popular, fresh, True) < 0.2
    assert found["ndcg@10"] == ndcg10(model, make_cases(walks[:150]), True)  # the best state came back
    assert found["ndcg@10"] == max(point["valid_ndcg@10"] for point in model.curve)
    assert model.curve[-1]["loss"] < 0.5 * model.curve[0]["loss"]


def test_stays_at_chance_when_there_is_no_order():
    model, _ = fitted(planted(400, seed=3, shuffle=True), epochs=10)
    score = ndcg10(model, make_cases(planted(600, seed=4, shuffle=True)), True)
    chance = np.sum(1 / np.log2(np.arange(2, 12))) / (N_ITEMS - 6)  # a random list without about 6 seen items
    assert score == pytest.approx(chance, abs=0.035)  # about 3.5 standard errors of 600 users


def test_batched_loss_equals_one_history_at_a_time(network, monkeypatch):
    def by_hand(history):
        """One history alone, unpadded, one place after the other."""
        inputs = torch.from_numpy(history[:-1].astype(np.int64))[None]
        logits = (network(inputs, network.table())[0] @ network.items.weight.T).detach()
        picked = torch.log_softmax(logits, -1)
        return [-float(picked[t, history[t + 1]]) for t in range(len(history) - 1)]

    expected = np.mean([loss for h in HISTORIES for loss in by_hand(h)])
    network.requires_grad_(False)
    for rows in (1, 3, 16):  # padded together
        monkeypatch.setattr("genrec.adapters.self_attention.ROWS", rows)
        assert float(network.loss(HISTORIES)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("events", "size"), [(1, 1.0), (ROWS, 1.0), (2 * ROWS + 7, 1.0), (ROWS + 1, 1e3)])
def test_the_loss_over_the_catalogue_is_torchs(events, size):
    """Value and both gradients, scaled by what comes after; also where an exponential of the logits would overflow."""
    torch.manual_seed(3)
    x, table = (size * torch.randn(n, 8, dtype=torch.float64) for n in (events, 23))
    targets = torch.randint(23, (events,))
    found: list[torch.Tensor | None] = []
    expected: list[torch.Tensor | None] = []
    for results, loss in ((found, catalogue_loss), (expected, lambda x, t, y: F.cross_entropy(x @ t.T, y))):
        ends = x.clone().requires_grad_(), table.clone().requires_grad_()
        value = loss(*ends, targets)
        (3 * value).backward()
        results += [value.detach(), *(end.grad for end in ends)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_ignore_padding(network, monkeypatch):
    def gradients(rows):
        monkeypatch.setattr("genrec.adapters.self_attention.ROWS", rows)
        network.zero_grad()
        network.loss(HISTORIES).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    none, much = gradients(1), gradients(len(HISTORIES))
    for name, gradient in none.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(much[name], gradient, atol=1e-6, rtol=1e-4)


def test_states_ignore_padding(network):
    inputs = left_pad([HISTORIES[0]])
    wide = torch.nn.functional.pad(inputs, (5, 0), value=-1)
    table = network.table()
    torch.testing.assert_close(network(wide, table)[:, 5:], network(inputs, table), atol=1e-6, rtol=1e-4)


def test_no_place_sees_what_comes_after(network):
    inputs = left_pad([HISTORIES[0]])
    changed = inputs.clone()
    changed[0, 4:] = 11
    before, after = network(inputs, network.table()), network(changed, network.table())
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert not torch.allclose(before[0, 4:], after[0, 4:], atol=1e-3)


def test_scores_do_not_depend_on_the_batch_and_use_the_newest_events():
    walks = planted(60, seed=5)
    model = SASRec(epochs=1, width=16, max_history=4)
    model.fit(walks, N_ITEMS)
    together = model.scores([*walks, np.array([], dtype=np.int32)])
    assert together.shape == (61, N_ITEMS)
    assert together.dtype == np.float32
    assert not together[60].any()
    alone = np.concatenate([model.scores([w]) for w in walks])
    np.testing.assert_allclose(together[:60], alone, atol=1e-5)
    np.testing.assert_allclose(model.scores([w[-4:] for w in walks]), alone, atol=1e-5)


def test_same_seed_same_model_and_the_global_generator_is_left_alone():
    walks = planted(60, seed=6)
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, second, other = (SASRec(epochs=2, width=16, seed=seed) for seed in (0, 0, 1))
    for model in (first, second, other):
        model.fit(walks, N_ITEMS)
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first.scores(walks), second.scores(walks))
    assert not np.allclose(first.scores(walks), other.scores(walks))


def test_search_takes_the_better_settings(monkeypatch):
    monkeypatch.setattr("genrec.sasrec.GRID", {"lr": (1e-2, 1e-7), "width": (8,)})
    walks = planted(150, seed=7)
    model = SASRec(epochs=6, width=16, lr=1e-6, dropout=0.1)
    found = model.fit([w[:-1] for w in walks], N_ITEMS, make_cases(walks), search=True)
    assert found["lr"] == 1e-2
    assert found["ndcg@10"] == ndcg10(model, make_cases(walks), True)
    assert model.network.items.weight.shape[1] == found["width"]


def test_features_teach_about_items_that_training_never_shows():
    """Items 30 to 59 share a feature with items 0 to 29 and are never trained on: only features can rank them."""
    kind = np.tile(np.arange(6), 10)  # the next item is of the next kind
    features = torch.nn.functional.one_hot(torch.from_numpy(kind), 6).float()
    rng = np.random.default_rng(8)

    def walks(low, high, n):
        starts = rng.integers(6, size=n)
        pick = [[rng.choice(np.flatnonzero(kind[low:high] == (s + t) % 6)) + low for t in range(6)] for s in starts]
        return [np.array(w, dtype=np.int32) for w in pick]

    train, fresh = walks(0, 30, 300), make_cases(walks(30, 60, 200))
    scores = {}
    for name, given in (("ids", None), ("features", features), ("shuffled", features[rng.permutation(60)])):
        model = SASRec(epochs=15, width=16, dropout=0.1, features=given)
        model.fit(train, N_ITEMS)
        # among the new items alone
        top = model.scores(fresh.histories)[:, 30:]
        scores[name] = float(np.mean(kind[30:][top.argmax(1)] == kind[fresh.targets]))
    assert scores["features"] > 0.9
    assert max(scores["ids"], scores["shuffled"]) < 0.4


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ConfigError, match="none of 2 training histories has two events"):
        SASRec().fit([np.array([1], np.int32), np.array([], np.int32)], 5)
    with pytest.raises(ConfigError, match="a search needs validation cases"):
        SASRec().fit([np.array([1, 2], np.int32)], 5, search=True)
    with pytest.raises(ConfigError, match=r"span 1\.\.9"):
        SASRec().fit([np.array([1, 9], np.int32)], 5)
