"""Repeats: only the history's own items move, and training sees earlier events alone."""

import numpy as np
import pytest
import torch

from genrec.adapters.histories import earlier_events
from genrec.adapters.repeats import Repeats


@pytest.fixture
def repeats() -> Repeats:
    repeats = Repeats(6)
    repeats.stored.data.fill_(-0.3)
    return repeats


def test_only_items_of_the_history_move(repeats: Repeats) -> None:
    found = repeats([[2, 2, 5], []])
    assert repeats.weight.item() == pytest.approx(-3.0)
    np.testing.assert_allclose(found.detach(), [[0, 0, -3, 0, 0, -3], [0] * 6], atol=1e-6)


def test_events_see_earlier_events_of_their_own_history(repeats: Repeats) -> None:
    histories = [[1, 4, 1], [3], [0, 5]]
    first = torch.tensor([0, 0, 0, 3, 4, 4])
    found = repeats.of_events(torch.tensor([item for history in histories for item in history]), first)
    expected = repeats([history[:end] for history in histories for end in range(len(history))])
    torch.testing.assert_close(found, expected)


def test_pairs_are_those_of_the_docstring() -> None:
    place, owner = earlier_events(torch.tensor([0, 0, 2, 2, 2]))
    assert (place.tolist(), owner.tolist()) == ([0, 2, 2, 3], [1, 3, 4, 4])
