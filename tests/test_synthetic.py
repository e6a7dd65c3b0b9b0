"""The embedded catalogue: what is planted is there, and nothing else is."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genrec.catalog import Catalogue, read_catalogue
from genrec.config import Synthetic
from genrec.errors import ArtefactError
from genrec.synthetic import (
    BRANDS,
    CATEGORIES,
    KINDS,
    MATERIALS,
    RELEASE,
    START_S,
    STEP_UTILITY,
    USES,
    UTILITY,
    YEAR_S,
    Truth,
    make_synthetic,
)
from genrec.synthetic_pictures import COLOURS, PATTERNS, SHAPES, draw_picture

PICTURE, TEXT, ORDER = range(3)


def histories_of(folder: Path, truth: Truth) -> list[np.ndarray]:
    """Item rows per user of the truth, oldest first."""
    log = pq.read_table(folder / "interactions.parquet").to_pandas().sort_values(["user_id", "timestamp"])
    row = {item: index for index, item in enumerate(truth.item_ids)}
    events = log.groupby("user_id")["item_id"].agg(lambda ids: np.array([row[i] for i in ids]))
    return [events[user] for user in truth.user_ids]


def ndcg_at_10(scores: np.ndarray, histories: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """N@10 per user with the history excluded; ties count against the target."""
    scores = scores.copy()
    for row, history in enumerate(histories):
        scores[row, history] = -np.inf
    mine = scores[np.arange(len(targets)), targets]
    rank = (scores >= mine[:, None]).sum(axis=1)
    return np.where(rank <= 10, 1 / np.log2(rank + 1), 0.0)


def last_event(folder: Path, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """N@10 per user of the oracle and of popularity on the last event."""
    events = histories_of(folder, truth)
    before, targets = [e[:-1] for e in events], np.array([e[-1] for e in events])
    counts = np.bincount(np.concatenate(before), minlength=len(truth.item_ids)).astype(float)
    counts += np.random.default_rng(0).uniform(0, 0.5, len(counts))  # popularity's ties at random
    popularity = np.tile(counts, (len(events), 1))
    oracle = truth.scores(truth.user_ids, before)
    return ndcg_at_10(oracle, before, targets), ndcg_at_10(popularity, before, targets)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, Truth]:
    folder = tmp_path_factory.mktemp("shop")
    return folder, make_synthetic(Synthetic(), 0, folder)


@pytest.fixture(scope="module")
def catalogue(shop) -> Catalogue:
    found, _ = read_catalogue(
        shop[0] / "items.jsonl", {}, max_bad_share=0.0, max_text_chars=20_000, max_pixels=40_000_000
    )
    return found


def test_the_reader_takes_every_row_and_picture(shop, catalogue):
    _, truth = shop
    assert catalogue.item_ids == truth.item_ids
    assert all(image is not None for image in catalogue.images)
    assert np.isfinite(catalogue.prices).all()


def test_text_and_ids_never_name_what_the_picture_shows(catalogue):
    words = set(re.findall(r"[a-z]+", " ".join([*catalogue.texts(), *catalogue.item_ids]).lower()))
    assert {"oak", "kestrel", "travel", "lamp"} <= words
    assert not words & {name for names in (SHAPES, COLOURS, PATTERNS) for name in names}


def test_text_names_the_text_attributes(shop, catalogue):
    truth = shop[1]
    for row in range(0, 600, 37):
        text = catalogue.texts()[row]
        for name, values in (
            ("brand", BRANDS),
            ("material", MATERIALS),
            ("use", USES),
            ("category", CATEGORIES),
        ):
            assert values[truth.attributes[name][row]] in text


def test_events_follow_the_rules(shop):
    folder, truth = shop
    log = pq.read_table(folder / "interactions.parquet").to_pandas()
    assert log["timestamp"].is_monotonic_increasing
    assert log["timestamp"].between(START_S, START_S + YEAR_S + 16).all()
    assert not log.duplicated(["user_id", "item_id"]).any()
    assert not log.duplicated(["user_id", "timestamp"]).any()
    per_user = log.groupby("user_id").size()
    assert len(per_user) == 3000
    assert (per_user.min(), per_user.max()) == (6, 16)
    assert truth.user_ids == sorted(truth.user_ids)
    assert np.bincount(truth.kinds).tolist() == [1000, 1000, 1000]


def agreement(values: np.ndarray, events: list[np.ndarray]) -> float:
    """Share of pairs of events of one user that agree in an attribute, mean over users."""
    shares = []
    for history in events:
        counts = np.bincount(values[history])
        shares.append((counts * (counts - 1)).sum() / (len(history) * (len(history) - 1)))
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("kind", "names", "others"),
    [
        (PICTURE, ("colour", "shape"), ("brand", "material")),
        (TEXT, ("brand", "material"), ("colour", "shape")),
    ],
)
def test_users_share_what_their_kind_looks_at_and_nothing_else(shop, kind, names, others):
    folder, truth = shop
    events = [h for h, k in zip(histories_of(folder, truth), truth.kinds, strict=True) if k == kind]
    shuffle = np.random.default_rng(0).permutation(600)
    for name in names:
        values = truth.attributes[name]
        chance = 1 / (values.max() + 1)
        assert agreement(values, events) > 3 * chance
        assert agreement(values[shuffle], events) < 1.3 * chance
    for name in others:
        values = truth.attributes[name]
        assert agreement(values, events) < 1.3 / (values.max() + 1)


def test_order_users_follow_the_cycle_and_others_do_not(shop):
    folder, truth = shop
    category = truth.attributes["category"]
    follows: list[list[float]] = [[], [], []]
    for kind, history in zip(truth.kinds, histories_of(folder, truth), strict=True):
        path = category[history]
        follows[kind].append(float((truth.successor[path[:-1]] == path[1:]).mean()))
    shares = [np.mean(share) for share in follows]
    assert shares[ORDER] > 0.6
    assert max(shares[PICTURE], shares[TEXT]) < 0.08  # 1 of 20 by chance
    start, seen = 0, []
    for _ in category[:20]:
        seen.append(start)
        start = int(truth.successor[start])
    assert sorted(seen) == list(range(20))  # one cycle through all categories


def test_oracle_is_in_its_band_for_every_kind_and_popularity_is_low(shop):
    oracle, popularity = last_event(*shop)
    assert 0.25 < oracle.mean() < 0.35
    by_kind = [oracle[shop[1].kinds == kind].mean() for kind in range(3)]
    assert min(by_kind) > 0.18
    assert max(by_kind) < 0.42
    assert popularity.mean() < 0.04


def test_scores_are_log_probabilities_by_the_formula(shop):
    _, truth = shop
    rng = np.random.default_rng(0)
    for kind in range(3):
        user = int(np.flatnonzero(truth.kinds == kind)[0])
        history = rng.choice(600, 5, replace=False)
        found = truth.scores([truth.user_ids[user]], [history])[0]
        names = (("colour", "shape", "pattern"), ("brand", "material", "use"), ("brand",))[kind]
        free = [item for item in range(600) if item not in history]
        weights, popular = [], []
        for item in free:
            gain = 0.0
            for place, name in enumerate(names):
                if truth.attributes[name][item] == truth.interests[user, 0, place]:
                    gain += UTILITY[kind][place]
            last = truth.attributes["category"][history[-1]]
            if kind == ORDER and truth.attributes["category"][item] == truth.successor[last]:
                gain += STEP_UTILITY
            weights.append(np.exp(gain + truth.log_popularity[item]))
            popular.append(np.exp(truth.log_popularity[item]))
        expected = np.log(0.9 * np.array(weights) / np.sum(weights) + 0.1 * np.array(popular) / np.sum(popular))
        np.testing.assert_allclose(found[free], expected, rtol=1e-5)
        assert np.isfinite(found).all()


def test_scores_take_an_empty_history_and_refuse_a_stranger(shop):
    _, truth = shop
    found = truth.scores(truth.user_ids[:3], [np.array([], dtype=np.int32)] * 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(KeyError, match="nobody"):
        truth.scores(["nobody"], [np.array([0])])


def test_truth_survives_the_disk(shop):
    folder, truth = shop
    again = Truth.load(folder)
    assert (again.user_ids, again.item_ids, again.noise) == (truth.user_ids, truth.item_ids, truth.noise)
    histories = [np.array([1, 2]), np.array([3])]
    users = truth.user_ids[:2]
    np.testing.assert_array_equal(again.scores(users, histories), truth.scores(users, histories))
    with pytest.raises(ArtefactError, match=r"truth.npz: not found; only the embedded catalogue"):
        Truth.load(folder / "pictures")


def test_same_seed_same_bytes_other_seed_other_log(tmp_path):
    small = Synthetic(n_items=40, n_users=60)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_synthetic(small, seed, tmp_path / name)
    for file in ("interactions.parquet", "items.jsonl", "pictures/item-000007.png", "truth.npz"):
        first = (tmp_path / "a" / file).read_bytes()
        assert first == (tmp_path / "b" / file).read_bytes(), file
        assert first != (tmp_path / "c" / file).read_bytes(), file


def test_pictures_of_the_same_kind_differ():
    rng = np.random.default_rng(0)
    first, second = (np.asarray(draw_picture(0, 0, 1, rng)) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("shares", "kind"),
    [
        ({"image_share": 1.0}, 0),
        ({"image_share": 0.0, "text_share": 1.0}, 1),
        ({"image_share": 0, "text_share": 0}, 2),
    ],
)
def test_shares_choose_the_kind_of_user(tmp_path, shares, kind):
    truth = make_synthetic(Synthetic(n_items=20, n_users=30, **shares), 0, tmp_path)
    assert {KINDS[k] for k in truth.kinds} == {KINDS[kind]}


def test_all_noise_leaves_the_oracle_with_popularity(tmp_path):
    truth = make_synthetic(Synthetic(noise=1.0, n_users=1500), 0, tmp_path)
    oracle, popularity = last_event(tmp_path, truth)
    assert abs(oracle.mean() - popularity.mean()) < 0.01  # one standard error is about 0.004
    np.testing.assert_allclose(np.diff(truth.scores(truth.user_ids[:4], [np.array([0])] * 4), axis=0), 0, atol=1e-5)


def test_cold_items_come_late(tmp_path):
    truth = make_synthetic(Synthetic(cold_share=0.2, n_users=1500, n_items=200), 0, tmp_path)
    log = pq.read_table(tmp_path / "interactions.parquet").to_pandas()
    late = (log["timestamp"] - START_S) / YEAR_S >= RELEASE
    cold = log["item_id"].isin({truth.item_ids[row] for row in np.flatnonzero(truth.cold)})
    assert truth.cold.sum() == 40
    assert not (cold & ~late).any()
    assert 0.15 < cold[late].mean() < 0.35  # then like any other, a little more as nobody has them yet


def test_more_interests_spread_a_user(tmp_path):
    spread = []
    for n_interests in (1, 3):
        settings = Synthetic(image_share=1.0, n_interests=n_interests, n_users=400, n_items=300)
        truth = make_synthetic(settings, 0, tmp_path / str(n_interests))
        spread.append(agreement(truth.attributes["colour"], histories_of(tmp_path / str(n_interests), truth)))
    assert spread[1] < 0.7 * spread[0]
