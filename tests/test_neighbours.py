"""The tables of neighbours and followers against brute force, and that training leaves the user's own events out."""

import numpy as np
import pytest
import torch

from genrec.adapters.item_scores import ItemScores
from genrec.adapters.neighbours import SHRINKAGE, WINDOW, Neighbours, Table, follower_table, neighbour_table
from tests.oracles import neighbour_scores

N = 25
LOG = [np.random.default_rng(7).integers(0, N - 2, size) for size in (3, 8, 1, 5, 6, 9, 4, 7, 2, 6)]


def brute(log: list[np.ndarray], i: int, j: int) -> tuple[int, float]:
    """Users that took both, and the root of the product of those that took each."""
    took = [set(history.tolist()) for history in log]
    of = [sum(item in one for one in took) for item in (i, j)]
    return sum({i, j} <= one for one in took), float(np.sqrt(of[0] * of[1]))


def test_the_table_holds_the_best_neighbours() -> None:
    columns, counts, norms = (table.numpy() for table in neighbour_table(LOG, N, 4))
    assert columns.shape == (N, 4)
    for item in range(N):
        pairs = {j: brute(LOG, item, j) for j in range(N) if j != item}
        cosines = sorted((b / (norm + SHRINKAGE) for b, norm in pairs.values() if b), reverse=True)[:4]
        found = [(int(j), c, n) for j, c, n in zip(columns[item], counts[item], norms[item], strict=True) if j < N]
        np.testing.assert_allclose([c / (n + SHRINKAGE) for _, c, n in found], cosines, rtol=1e-6)
        for j, count, norm in found:
            assert pairs[j] == (count, pytest.approx(norm))


def test_scores_are_the_oracles() -> None:
    neighbours = Neighbours(*neighbour_table(LOG, N, N))
    histories = [[], [3], [5, 3, 3, 9], [N - 1, 2]]  # the last item was never taken
    found = neighbours([np.array(history, np.int32) for history in histories]).detach().numpy()
    for row, history in zip(found, histories, strict=True):
        np.testing.assert_allclose(row, neighbour_scores(neighbours, history), atol=1e-5)
    assert (found[0] == 0).all()
    assert found[2].max() > 0


def in_turn(log: list[np.ndarray], i: int, j: int) -> int:
    """Users that took j at most WINDOW events after i."""
    return sum(
        any(one[a] == i and one[b] == j for a in range(len(one)) for b in range(a + 1, min(a + 1 + WINDOW, len(one))))
        for one in log
    )


def test_followers_are_counted_in_turn() -> None:
    columns, counts, norms = (table.numpy() for table in follower_table(LOG, N, N))
    for item in range(N):
        expected = {j: in_turn(LOG, item, j) for j in range(N) if j != item and in_turn(LOG, item, j)}
        found = [(int(j), c, n) for j, c, n in zip(columns[item], counts[item], norms[item], strict=True) if j < N]
        assert {j: count for j, count, _ in found} == expected
        assert all(norm == sum(item in one for one in LOG) for _, _, norm in found)


@pytest.mark.parametrize("in_order", [False, True])
def test_training_sees_the_counts_of_the_other_users_alone(in_order: bool) -> None:
    log = [one if in_order else np.unique(one) for one in LOG]
    table = follower_table(log, N, N) if in_order else neighbour_table(log, N, N)
    neighbours = Neighbours(*table, within=WINDOW if in_order else None)
    columns, _, norms = table
    users = (5, 1, 8)
    side_by_side = torch.from_numpy(np.concatenate([log[user] for user in users]))
    sizes = [len(log[user]) for user in users]
    first = torch.repeat_interleave(torch.tensor([0, *np.cumsum(sizes)[:-1]]), torch.tensor(sizes))
    found = neighbours.of_events(side_by_side, first)
    for user, rows in zip(users, found.split(sizes), strict=True):
        history = log[user]
        others = [one for row, one in enumerate(log) if row != user]
        counts = torch.zeros(columns.shape)
        for item in range(N):
            for place, column in enumerate(columns[item].tolist()):
                of = in_turn(others, item, column) if in_order else brute(others, item, column)[0]
                counts[item, place] = 0 if column == N else of
        # only what the user took is corrected; for all else the counts were those of others anyway
        without = Neighbours(columns, counts, norms)
        for end in range(len(history)):
            np.testing.assert_allclose(
                rows[end].detach().numpy(), neighbour_scores(without, history[:end].tolist()), atol=1e-5
            )
        leaked = neighbours([history[:-1]])[0, history[-1]]
        assert rows[-1, history[-1]] < leaked


@pytest.mark.parametrize(
    "tables", [(neighbour_table(LOG, N, 3), follower_table(LOG, N, 4)), (neighbour_table(LOG, N, 3), None)]
)
def test_saved_scores_come_back(tmp_path, tables: tuple[Table, Table | None]) -> None:
    scores = ItemScores(None, *tables)
    scores.save(tmp_path / "item_scores.safetensors")
    again = ItemScores.load(tmp_path / "item_scores.safetensors")
    assert again.profile is None
    assert torch.equal(again([[3, 4]]), scores([[3, 4]]))


def test_first_values_are_those_that_the_constants_say() -> None:
    learned = Neighbours(*neighbour_table(LOG, N, 3)).learned()
    assert {name: round(value.item(), 4) for name, value in learned.items()} == {
        "weight": 1.0, "scale": 50.0, "shrinkage": 10.0, "decay": 0.8,
    }  # fmt: skip
