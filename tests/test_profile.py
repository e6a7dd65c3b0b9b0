"""The profile against a slow oracle, and what its keys mean."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genrec.adapters.profile import Profile, content_keys
from genrec.encoders.features import Features
from tests.oracles import profile_scores

N = 40


@pytest.fixture
def profile() -> Profile:
    torch.manual_seed(3)
    keys = {m: F.normalize(torch.randn(N, width), dim=1) for m, width in (("text", 6), ("image", 9))}
    keys["image"][::5] = 0  # items without a picture
    profile = Profile(keys)
    for weight in profile.parameters():
        weight.data += torch.randn_like(weight) * 0.3
    return profile


HISTORIES = [[], [5], [0, 5], [7, 3, 3, 21, 8], [2] * 30]


def test_scores_are_the_oracles(profile: Profile) -> None:
    found = profile([np.array(history, np.int32) for history in HISTORIES]).detach().numpy()
    for row, history in zip(found, HISTORIES, strict=True):
        # float32 against float64; another item's key would differ by 0.1 and more
        np.testing.assert_allclose(row, profile_scores(profile, history), atol=1e-4)
    assert (found[0] == 0).all()


def test_events_see_their_own_earlier_events_only(profile: Profile) -> None:
    histories = [[7, 3, 21, 8], [5], [0, 10, 1]]
    items = torch.tensor([item for history in histories for item in history])
    first = torch.tensor([0, 0, 0, 0, 4, 5, 5, 5])
    found = profile.of_events(items, first).detach().numpy()
    before = [history[:end] for history in histories for end in range(len(history))]
    for row, history in zip(found, before, strict=True):
        np.testing.assert_allclose(row, profile_scores(profile, history), atol=1e-4)


def test_a_coherent_history_is_scored_by_what_it_shares() -> None:
    rng = np.random.default_rng(0)
    kinds = np.arange(N) % 8
    values = (np.eye(8)[kinds] + rng.normal(0, 0.1, (N, 8))).astype(np.float32)[:, None]
    keys = content_keys({"text": Features(values, np.ones(N, bool))}, np.ones(N, bool), 8)
    scores = Profile(keys)([np.flatnonzero(kinds == 3)[:3]])[0].detach().numpy()
    assert scores[kinds == 3].min() > scores[kinds != 3].max()


def test_keys_are_unit_cosines_of_standardised_features() -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(N, 2, 7)) * [1, 5, 0.1, 2, 3, 0, 9] + 4).astype(np.float32)
    present = np.arange(N) % 6 != 0
    values[~present] = 0
    fit_on = np.arange(N) < 30
    keys = content_keys({"image": Features(values, present)}, fit_on, 7)["image"].numpy()
    pooled = values.mean(1)
    rows = pooled[fit_on & present]
    scale = np.where(rows.std(0) > 1e-6, rows.std(0), np.inf)  # a constant feature says nothing
    wanted = (pooled - rows.mean(0)) / scale
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose((keys @ keys.T)[np.ix_(present, present)], (wanted @ wanted.T)[np.ix_(present, present)],
                               atol=1e-5)  # fmt: skip
    assert (keys[~present] == 0).all()


def test_narrow_keys_keep_the_widest_axes() -> None:
    values = np.random.default_rng(2).normal(size=(N, 1, 12)).astype(np.float32)
    values[:, :, 6:] = values[:, :, :6]  # six axes hold everything
    features = {"text": Features(values, np.ones(N, bool))}
    wide, narrow = (content_keys(features, np.ones(N, bool), width)["text"].numpy() for width in (12, 6))
    assert narrow.shape == (N, 6)
    np.testing.assert_allclose(narrow @ narrow.T, wide @ wide.T, atol=1e-5)
