"""Planted worlds: what is planted is there, what is not is not, and the truth ranks best."""

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from genrec.planted import Planted, plant
from genrec.training.system_quality import gauc_of, hits

SMALL = {"n_items": 120, "n_users": 150}


def test_the_same_seed_gives_the_same_world_and_another_does_not() -> None:
    one, same, other = (plant(Planted(**SMALL), seed) for seed in (3, 3, 4))
    assert all(np.array_equal(one.features[m].values, same.features[m].values) for m in one.features)
    assert all(np.array_equal(a, b) for a, b in zip(one.split.train, same.split.train, strict=True))
    assert not np.array_equal(one.features["image"].values, other.features["image"].values)


def test_the_truth_ranks_far_better_than_chance_and_a_shuffled_truth_does_not() -> None:
    table = plant(Planted(**SMALL), 0)
    assert table.oracle is not None
    truth = table.oracle[table.split.test.users]
    wrong = truth[:, np.random.default_rng(0).permutation(table.n_items)]
    assert hits(truth, table).mean() > 0.6
    assert hits(wrong, table).mean() < 0.2  # chance is 10 of about 108


def test_new_items_are_in_no_training_history_and_are_asked_for() -> None:
    table = plant(Planted(**SMALL, cold_share=0.3), 0)
    assert not table.split.cold[np.concatenate(table.split.train)].any()
    asked = table.split.cold[table.split.test.targets]
    assert asked.sum() == len(asked) / 2


def test_only_new_items_lack_a_picture_where_the_new_ones_do() -> None:
    table = plant(Planted(**SMALL, cold_share=0.3, missing_new=0.5), 0)
    there, cold = table.features["image"].present, table.split.cold
    assert there[~cold].all()
    assert 0 < there[cold].mean() < 1
    assert not table.features["image"].values[~there].any()
    assert table.features["text"].present.all()


def test_a_history_holds_no_item_twice() -> None:
    for knobs in (Planted(**SMALL), Planted(**SMALL, order=2.0)):
        table = plant(knobs, 0)
        for history, target in zip(table.split.test.histories, table.split.test.targets, strict=True):
            assert len({*history, target}) == len(history) + 1


def test_kinds_are_shared_and_a_fashion_moves_the_second_half_alone() -> None:
    plain, moved = (plant(Planted(**SMALL, interests=2, fashion=f), 0).oracle for f in (1e-9, 2.0))
    assert plain is not None
    assert moved is not None
    change = moved - plain
    assert np.abs(change[:75]).max() < 1e-5
    assert np.allclose(change[75:], change[75], atol=1e-4)
    assert change[75].std() > 1
    one = plant(Planted(**SMALL, interests=1, kinds=1, patches=2, patch_by_category=True), 0).oracle
    assert one is not None
    assert np.allclose(one, one[0], atol=1e-5)  # one kind of interest: all want the same


def test_words_tell_the_text_latent_and_wrong_ones_another_item_s() -> None:
    right, wrong = (plant(Planted(**SMALL, words=True, wrong_words=w), 0) for w in (False, True))
    assert right.texts is not None
    assert wrong.texts is not None
    assert sorted(right.texts) == sorted(wrong.texts)
    assert np.mean([a == b for a, b in zip(right.texts, wrong.texts, strict=True)]) < 0.1
    assert np.array_equal(right.features["text"].values, wrong.features["text"].values)
    read = np.array([[word[1:] for word in text.split()] for text in right.texts])
    shown = right.features["text"].values[:, 0]
    low, high = (shown[read[:, 0] == end].mean(0) for end in ("ana", "uti"))
    assert np.linalg.norm(high - low) > 2  # quarters of one latent lie apart behind the rotation


def test_gauc_agrees_with_sklearn() -> None:
    table = plant(Planted(**SMALL, impressions=20), 0)
    shown = table.test_impressions
    assert shown is not None
    scores = np.random.default_rng(1).integers(5, size=len(shown.items)).astype(np.float64)  # with ties
    wanted = []
    for user in range(table.n_users):
        at = shown.users == user
        if 0 < shown.labels[at].sum() < at.sum():
            wanted.append(roc_auc_score(shown.labels[at], scores[at]))
    assert gauc_of(scores, table) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patch_by_category": True}, "needs patches above 1"),
        ({"interest_by_category": True}, "needs interests above 1"),
        ({"drift": True}, "needs order above 0"),
        ({"interests": 4, "kinds": 3}, "cannot be below interests"),
        ({"wrong_words": True}, "needs words: true"),
        ({"missing_new": 0.5}, "needs cold_share above 0"),
        ({"n_item": 5}, "n_item"),
    ],
)
def test_impossible_knobs_are_refused(knobs: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Planted(**knobs)
