"""Neighbours: what others took beside what this user took, as a score for every item of the catalogue.

Item-to-item counts are the strongest simple signal of sparse logs, and a small generator cannot hold them all in its
weights. Here they are a table. Trained on counts that hold the very event to be predicted, a model would trust them far
too much; so in training the user's own events are left out of the counts, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from genrec.adapters.histories import Histories, side_by_side
from genrec.cooccurrence import users_in_common

SHRINKAGE = 10.0  # first value; added to the cosine's denominator, so that pairs of rare items count less
SCALE = 50.0  # first value; the score's logarithm bends where the summed cosines reach 1 / SCALE
DECAY = 0.8  # first value
STRETCH = 10.0  # the four numbers are stored divided by it: steps that suit matrices would hardly move them


def neighbour_table(histories: Sequence[np.ndarray], n_items: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
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
    of = both.diagonal()
    kept = min(most, max(1, int(both.getnnz(1).max(initial=1))))
    columns = np.full((n_items, kept), n_items, np.int64)
    counts = np.zeros((n_items, kept), np.float32)
    norms = np.ones((n_items, kept), np.float32)
    for item in range(n_items):
        span = slice(both.indptr[item], both.indptr[item + 1])
        others, count = both.indices[span], both.data[span]
        apart = others != item
        others, count = others[apart], count[apart]
        norm = np.sqrt(of[item] * of[others])
        best = np.argsort(-count / (norm + SHRINKAGE), kind="stable")[:kept]
        columns[item, : len(best)] = others[best]
        counts[item, : len(best)] = count[best]
        norms[item, : len(best)] = norm[best]
    return torch.from_numpy(columns), torch.from_numpy(counts), torch.from_numpy(norms)


class Neighbours(nn.Module):
    """Scores of all items from a table of neighbours.

    ``score(i) = weight * log(1 + scale * sum over the history of decay ** age * both / (norm + shrinkage))``, where the
    newest event has age 0; weight, scale, decay and shrinkage are learned.
    """

    def __init__(self, columns: Tensor, counts: Tensor, norms: Tensor):
        """Arguments as `neighbour_table` returns them."""
        super().__init__()
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
        """The constructor's arguments."""
        return {name: self.get_buffer(name) for name in ("columns", "counts", "norms")}

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows, oldest first -> float32 [B, N], 0 where no neighbour leads."""
        items, owner, sizes = side_by_side(histories, self.get_buffer("columns").device)
        age = sizes.cumsum(0)[owner] - 1 - torch.arange(len(items), device=items.device)
        return self._scores(items, owner, age, len(sizes), None)

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores before each event, from earlier events of its history; its user is left out of the counts.

        Arguments and result as for `genrec.adapters.profile.Profile.of_events`.
        """
        at = torch.arange(len(items), device=items.device)
        sizes = at - first
        owner = torch.repeat_interleave(at, sizes)
        begin = sizes.cumsum(0) - sizes
        place = torch.arange(len(owner), device=items.device) - begin[owner] + first[owner]
        own = torch.zeros(len(items), len(self.get_buffer("columns")) + 1, dtype=torch.bool, device=items.device)
        own[first, items] = True  # at the row of a history's first event: everything it holds
        return self._scores(items[place], owner, owner - 1 - place, len(items), own[first[owner]])

    def _scores(self, items: Tensor, owner: Tensor, age: Tensor, n_rows: int, own: Tensor | None) -> Tensor:
        """items, owner, age int64 [H], own bool [H, N + 1] or None -> [n_rows, N]."""
        columns, counts = self.get_buffer("columns")[items], self.get_buffer("counts")[items]  # [H, k]
        if own is not None:
            counts = counts - own.gather(1, columns).to(counts.dtype)
        learned = self.learned()
        fades = learned["decay"] ** age.to(counts.dtype)
        values = fades[:, None] * counts.clamp(min=0) / (self.get_buffer("norms")[items] + learned["shrinkage"])
        width = len(self.get_buffer("columns")) + 1
        total = values.new_zeros(n_rows * width)
        total = total.index_add(0, (owner[:, None] * width + columns).flatten(), values.flatten())
        total = total.view(n_rows, width)[:, :-1]
        return learned["weight"] * torch.log1p(learned["scale"] * total)
