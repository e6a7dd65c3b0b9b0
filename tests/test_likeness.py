"""In what a history's items are alike: against random items, in each modality on its own, and on planted users."""

import numpy as np
import pytest
import torch

from genrec.adapters.profile import content_keys
from genrec.config import resolve_recipe
from genrec.likeness import ALIKE, Likeness
from genrec.pipeline import Run
from genrec.synthetic import KINDS
from tests.conftest import tiny_recipe


def _unit(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_random_items_have_a_ratio_of_one_and_equal_ones_their_number() -> None:
    keys = _unit(400, 16, 0)
    keys[300:] = keys[300]
    alike = Likeness({"image": keys})
    rng = np.random.default_rng(0)
    ratios = [alike.ratio("image", rng.choice(300, 8, replace=False)) for _ in range(500)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert alike.ratio("image", range(300, 307)) == pytest.approx(7, rel=1e-5)
    assert alike.words(list(range(300, 307))) == "pictures"


def test_each_modality_speaks_for_itself_and_missing_ones_do_not_count() -> None:
    image, text = _unit(60, 512, 1), _unit(60, 512, 2)
    image[:10], text[5:15] = image[0], text[5]
    image[40:] = 0  # no pictures
    alike = Likeness({"text": text, "image": image})
    assert alike.words(range(4)) == "pictures"
    assert alike.words(range(10, 14)) == "words"
    assert alike.words(range(5, 9)) == "pictures, words"
    assert alike.words([]) == alike.words(range(40, 44)) == alike.words([3]) == "nothing"
    assert alike.ratio("image", [0, 1, 40, 41]) == pytest.approx(2, rel=1e-5)
    # only the newest events count
    assert alike.words([*range(4), *np.arange(50) % 20 + 20]) == "nothing"


def test_planted_tastes_show_in_the_right_modality(tmp_path) -> None:
    run = Run.create(resolve_recipe(tiny_recipe(data={"synthetic": {"n_items": 600, "n_users": 300}})), tmp_path)
    run.prepare()
    run.encode()
    space = run.space
    truth, alike = space.writer.truth, Likeness(content_keys(space.features, ~space.split.cold, 128))
    assert truth is not None
    kind = dict(zip(truth.user_ids, truth.kinds, strict=True))
    cases = space.split.test
    ratios = {
        name: [
            (KINDS[kind[space.user_ids[user]]], alike.ratio(name, history))
            for user, history in zip(cases.users, cases.histories, strict=True)
        ]
        for name in ("image", "text")
    }

    def share(name: str, of: str) -> float:
        return float(np.mean([ratio >= ALIKE for who, ratio in ratios[name] if who == of]))

    assert share("image", "picture") > 0.7
    assert share("text", "text") > 0.6
    for name, others in (("image", ("text", "order")), ("text", ("picture", "order"))):
        assert all(share(name, other) < 0.2 for other in others)
