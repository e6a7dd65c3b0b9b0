"""Repeats: what an item gains or loses because the history already holds it.

Some logs repeat items (music, groceries), others never do (films, durable goods), and content alone would always put
the history's own items first. One learned number says which kind of log this is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.histories import Histories, earlier_events, side_by_side

STRETCH = 10.0  # the weight is stored divided by it: steps that suit matrices would hardly move it


class Repeats(nn.Module):
    """``score(i) = weight`` for the items of the history and 0 for all others; the weight, in nats, is learned."""

    def __init__(self, n_items: int):
        super().__init__()
        self.n_items = n_items
        self.stored = nn.Parameter(torch.zeros(()))

    @property
    def weight(self) -> Tensor:
        """Nats, a scalar."""
        return STRETCH * self.stored

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows -> float32 [B, N]."""
        items, owner, sizes = side_by_side(histories, self.stored.device)
        return self._scores(items, owner, len(sizes))

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores [M, N] before each event; arguments as for `genrec.adapters.profile.Profile.of_events`."""
        place, owner = earlier_events(first)
        return self._scores(items[place], owner, len(items))

    def _scores(self, items: Tensor, owner: Tensor, n_rows: int) -> Tensor:
        held = torch.zeros(n_rows, self.n_items, device=items.device)
        held[owner, items] = 1
        return self.weight * held
