"""Where systems start from, so that a control loses nothing, and the pairs that they learn from."""

from typing import Any

import numpy as np
import torch

from genrec.planted import Planted, plant
from genrec.system_recipe import load_system
from genrec.system_run import MOST_TIMES, lengthened
from genrec.training.pairs import Whose, batches
from genrec.training.system_quality import impression_scores
from genrec.training.systems import fresh
from tests.tiny_worlds import TINY, tiny


def test_a_cross_encoder_starts_as_the_mean_of_the_history() -> None:
    recipe = load_system("cross_encoder")
    table = tiny(recipe)
    reads: Any = fresh(recipe, table, 0).eval()
    mean = fresh(recipe.changed(recipe.prove.without), table, 0).eval()
    mean.load_state_dict(reads.state_dict(), strict=False)
    same = impression_scores(reads, table), impression_scores(mean, table)
    torch.testing.assert_close(*map(torch.from_numpy, same))
    torch.nn.init.normal_(reads.user.out.weight)
    assert not np.allclose(impression_scores(reads, table), same[1])


def test_stages_grow_with_the_log_and_never_shrink() -> None:
    recipe = load_system("clcrec")
    world = recipe.prove.world
    short, same = [stage.steps for stage in recipe.stages], world.n_users * world.events
    for n_users, times in ((20, 1), (world.n_users, 1), (3 * world.n_users, 3)):
        table = plant(Planted(n_users=n_users, events=world.events), 0)
        assert [stage.steps for stage in lengthened(recipe, table).stages] == [times * steps for steps in short]
    table = plant(Planted(n_users=same, events=100, n_items=200), 0)
    assert [stage.steps for stage in lengthened(recipe, table).stages] == [MOST_TIMES * steps for steps in short]


def test_domains_start_with_one_map_and_may_part() -> None:
    recipe = load_system("uniembedding")
    table = tiny(recipe)
    apart: Any = fresh(recipe, table, 0)
    one = fresh(recipe.changed(recipe.prove.without), table, 0)
    one.load_state_dict(apart.state_dict(), strict=False)
    rows = torch.arange(table.n_items)
    torch.testing.assert_close(apart.items(rows).content, one.items(rows).content)
    with torch.no_grad():
        apart.fusion.differences[:, 1] += 1
    moved = (apart.items(rows).content != one.items(rows).content).any(1)
    assert torch.equal(moved, torch.from_numpy(table.domains == 1))


def test_pairs_are_two_events_of_one_history() -> None:
    table = plant(Planted(**TINY), 0)
    for batch in batches(table, "together", steps=3, size=64, negatives=0, whose=Whose(), seed=0):
        for user, one, other in zip(batch.users, batch.items, batch.others, strict=True):
            history = table.split.train[int(user)].tolist()
            assert one != other
            assert int(one) in history
            assert int(other) in history
    drawn = batches(table, "together", steps=40, size=256, negatives=0, whose=Whose(), seed=1)
    pairs = {(int(u), int(a), int(b)) for of in drawn for u, a, b in zip(of.users, of.items, of.others, strict=True)}
    assert len(pairs) == 40 * 6 * 5, "some pair of a history is never drawn"
