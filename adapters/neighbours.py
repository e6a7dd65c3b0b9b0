"""Neighbours and followers: what others took beside, or soon after, what this user took, as a score for every item.

Item-to-item counts are the strongest simple signal of sparse logs, and a small generator cannot hold them all in its
weights. Here they are tables: one of users that took both items in whatever order, one of those that took the second at
most `WINDOW` events after the first. Trained on counts that hold the very event to be predicted, a model would trust
them far too much; so in training the user's own events are left out of the counts, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from genrec.adapters.histories import Histories, ages, faded_sums, side_by_side
from genrec.cooccurrence import users_in_common, users_in_turn

WINDOW = 3  # events within which a follower follows
SHRINKAGE = 10.0  # first value; added to the cosine's denominator, so that pairs of rare items count less
SCALE = 50.0  # first value; the score's logarithm bends where the summed cosines reach 1 / SCALE
DECAY = 0.8  # first value
STRETCH = 10.0  # the four numbers are stored divided by it: steps that suit matrices would hardly move them


Table = tuple[Tensor, Tensor, Tensor]


def neighbour_table(histories: Sequence[np.ndarray], n_items: int, most: int) -> Table:
    """The items most often taken by the same users, per item.

    Args:
        histories: int32 catalogue rows, one array per user.
        n_items: N.
        most: neighbours kept per item, the highest cosines.

    Returns:
        columns int64 [N, k], N where an item has fewer; users that took both, float32 [N, k]; and, float32 [N, k],
        ``sqrt(users(i) * users(j))``.
    """
    both = users_in_common(histories, n_items)
    users = both.diagonal()
    return _best(both, np.sqrt(users), np.sqrt(users), most)


def follower_table(histories: Sequence[np.ndarray], n_items: int, most: int) -> Table:
    """The items most often taken at most `WINDOW` events after an item.

    Arguments and result as for `neighbour_table`, but the second array counts users that took the column's item so soon
    after the row's, and the third is ``users(i)``.
    """
    users = users_in_common(histories, n_items).diagonal()
    return _best(users_in_turn(histories, n_items, WINDOW), users, np.ones_like(users), most)


def grown_table(table: Table, n_items: int) -> Table:
    """The table of a catalogue that has grown to N' items, whose new ones no history holds: nothing is near them."""
    columns, counts, norms = table
    old, more = len(columns), n_items - len(columns)
    columns = torch.where(columns == old, n_items, columns)
    return (
        torch.cat([columns, columns.new_full((more, columns.shape[1]), n_items)]),
        torch.cat([counts, counts.new_zeros(more, counts.shape[1])]),
        torch.cat([norms, norms.new_ones(more, norms.shape[1])]),
    )


def _best(pairs: sparse.csr_matrix, of_row: np.ndarray, of_column: np.ndarray, most: int) -> Table:
    """Of each row of [N, N] counts, the `most` with the highest ``count / (of_row * of_column + SHRINKAGE)``."""
    n_items = len(of_row)
    kept = min(most, max(1, int(pairs.getnnz(1).max(initial=1))))
    columns = np.full((n_items, kept), n_items, np.int64)
    counts = np.zeros((n_items, kept), np.float32)
    norms = np.ones((n_items, kept), np.float32)
    for item in range(n_items):
        span = slice(pairs.indptr[item], pairs.indptr[item + 1])
        others, count = pairs.indices[span], pairs.data[span]
        apart = others != item
        others, count = others[apart], count[apart]
        norm = of_row[item] * of_column[others]
        best = np.argsort(-count / (norm + SHRINKAGE), kind="stable")[:kept]
        columns[item, : len(best)] = others[best]
        counts[item, : len(best)] = count[best]
        norms[item, : len(best)] = norm[best]
    return torch.from_numpy(columns), torch.from_numpy(counts), torch.from_numpy(norms)


class Neighbours(nn.Module):
    """Scores of all items from a table of neighbours.

    ``score(i) = weight * log(1 + scale * sum over the history of decay ** age * count / (norm + shrinkage))``, where
    the newest event has age 0; weight, scale, decay and shrinkage are learned.
    """

    def __init__(self, columns: Tensor, counts: Tensor, norms: Tensor, within: int | None = None):
        """
        Args:
            columns, counts, norms: as `neighbour_table` or `follower_table` returns them.
            within: the table counts users that took the second item at most so many events after the first; None: in
                any order.
        """
        super().__init__()
        self.within = within
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("norms", norms, persistent=False)
        for name, value in (
            ("log_weight", 0.0),
            ("log_scale", np.log(SCALE)),
            ("log_shrinkage", np.log(SHRINKAGE)),
            ("logit_decay", np.log(DECAY / (1 - DECAY))),
        ):
            setattr(self, name, nn.Parameter(torch.tensor(float(value) / STRETCH)))

    def learned(self) -> dict[str, Tensor]:
        """Weight, scale, shrinkage and decay, as scalars."""
        raw = {name: STRETCH * value for name, value in self.named_parameters()}
        return {
            "weight": raw["log_weight"].exp(),
            "scale": raw["log_scale"].exp(),
            "shrinkage": raw["log_shrinkage"].exp(),
            "decay": raw["logit_decay"].sigmoid(),
        }

    def tables(self) -> dict[str, Tensor]:
        """The constructor's first three arguments."""
        return {name: self.get_buffer(name) for name in ("columns", "counts", "norms")}

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows, oldest first -> float32 [B, N], 0 where no neighbour leads."""
        items, owner, sizes = side_by_side(histories, self.get_buffer("columns").device)
        columns, values = self._rows(items, None)
        values = values * self.learned()["decay"] ** ages(owner, sizes)[:, None]
        width = len(self.get_buffer("columns")) + 1
        total = values.new_zeros(len(sizes) * width)
        total = total.index_add(0, (owner[:, None] * width + columns).flatten(), values.flatten())
        return self._score(total.view(len(sizes), width)[:, :-1])

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores before each event, from earlier events of its history; its user is left out of the counts.

        Arguments and result as for `genrec.adapters.profile.Profile.of_events`.
        """
        columns, values = self._rows(items, self._own(items, first))
        n_items = len(self.get_buffer("columns"))
        rows = values.new_zeros(len(items), n_items + 1).scatter(1, columns, values)[:, :n_items]
        return self._score(faded_sums(rows, first, self.learned()["decay"]))

    def _rows(self, items: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns int64 [H, k] of items int64 [H] and what each adds, scaled, float32 [H, k]; `own` bool [H, N + 1]."""
        columns, counts = self.get_buffer("columns")[items], self.get_buffer("counts")[items]
        if own is not None:
            counts = counts - own.gather(1, columns).to(counts.dtype)
        learned = self.learned()
        norms = self.get_buffer("norms")[items] + learned["shrinkage"]
        return columns, learned["scale"] * counts.clamp(min=0) / norms

    def _own(self, items: Tensor, first: Tensor) -> Tensor:
        """bool [M, N + 1]: the items that an event's user counts for at that event's row of the table."""
        n_items = len(self.get_buffer("columns"))
        if self.within is None:  # everything that the history holds, before and after
            own = torch.zeros(len(items), n_items + 1, dtype=torch.bool, device=items.device)
            own[first, items] = True
            return own[first]
        pairs, row = (first * n_items + items).unique(return_inverse=True)  # an item may come twice in a history
        own = torch.zeros(len(pairs), n_items + 1, dtype=torch.bool, device=items.device)
        for lag in range(1, self.within + 1):
            same = (first[lag:] == first[:-lag]).nonzero()[:, 0]
            own[row[same], items[same + lag]] = True
        return own[row]

    def _score(self, total: Tensor) -> Tensor:
        return self.learned()["weight"] * torch.log1p(total)
