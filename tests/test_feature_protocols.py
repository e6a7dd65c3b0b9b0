"""Protocols on features alone: planted content passes them, shuffled content does not."""

import numpy as np
import pytest

from genrec.feature_protocols import alignment_uniformity, item_cf, nearest, unit, zero_shot
from genrec.planted import Planted, plant

TABLE = plant(Planted(n_items=150, n_users=300, nuisance=0.2), 0)
GOOD = np.concatenate([TABLE.features[m].values[:, 0] for m in ("image", "text")], 1)
WRONG = GOOD[np.random.default_rng(0).permutation(len(GOOD))]


def test_true_features_pass_and_those_of_other_items_do_not() -> None:
    good, wrong = (zero_shot(of, TABLE.split.test, exclude_seen=True).mean() for of in (GOOD, WRONG))
    assert good > 2 * wrong
    (cf, agree), (wrong_cf, by_chance) = (item_cf(of, TABLE.split, exclude_seen=True) for of in (GOOD, WRONG))
    assert cf.mean() > 1.5 * wrong_cf.mean()
    assert agree > 0.15
    assert by_chance == pytest.approx(10 / 149, abs=0.03)
    near, far = (alignment_uniformity(of, TABLE.split.train, 0) for of in (GOOD, WRONG))
    assert near[0] < far[0]
    assert near[1] == pytest.approx(far[1], abs=0.1)  # the same cloud of points


def test_alignment_and_uniformity_at_their_ends() -> None:
    histories = [np.array([0, 1, 0, 1], np.int32)]
    same = alignment_uniformity(np.ones((2, 3)), histories, 0)
    opposite = alignment_uniformity(np.array([[1.0, 0], [-2.0, 0]]), histories, 0)
    assert same == pytest.approx((0, 0), abs=1e-6)
    assert opposite == pytest.approx((4, -8), abs=1e-5)


def test_neighbours_leave_the_item_itself_out_and_zero_rows_stay_zero() -> None:
    directions = unit(np.eye(12))
    found = nearest(directions @ directions.T)
    assert (found.diagonal() == 0).all()
    assert np.array_equal(unit(np.zeros((2, 3))), np.zeros((2, 3)))
