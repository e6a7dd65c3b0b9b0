"""Named views of a batch: what objectives compare.

| name | vector [B, W] |
|---|---|
| user, item, other | of the pair; `other` is the item that belongs with it |
| ids, content, MODALITY | the item's, before they are mixed |
| user_ids, user_content, user_MODALITY | the history's mean of the same |
| early, late, thinned | the user from the history's first half, its second half, or with events left out |
| other_content, other_MODALITY | the other item's |
| any of the fusion's parts | such as shared_image |
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from genrec.adapters.item_views import ItemViews
from genrec.adapters.system import System
from genrec.adapters.user_models import masked_mean
from genrec.errors import ConfigError
from genrec.training.pairs import Batch

THINNED = 0.4  # of the events are left out


class Views:
    """A batch through a system, each item read once."""

    def __init__(self, system: System, batch: Batch, *, swap: float = 0.0, drop_modality: float = 0.0):
        self.system, self.batch, self.drop = system, batch, drop_modality
        named = [batch.histories[batch.histories >= 0], batch.items, batch.others, batch.negatives.flatten()]
        rows = torch.cat(named).unique()
        if system.graph is not None:
            rows = torch.arange(system.n_items, device=rows.device)
        self.rows = rows
        self.place = torch.zeros(system.n_items, dtype=torch.long, device=rows.device)
        self.place[rows] = torch.arange(len(rows), device=rows.device)
        hide = self._hidden(len(rows), rows.device) if drop_modality else None
        self.every = system.items(rows, swap=swap, hide=hide)
        self.graph_users: Tensor | None = None
        if system.graph is not None:
            self.graph_users, self.every = system.spread(self.every)
        self.there = batch.histories >= 0

    def _hidden(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """Modality -> bool [n]; at most one modality of an item is hidden."""
        names = self.system.modalities
        which = torch.randint(len(names), (n,), device=device)
        gone = torch.rand(n, device=device) < self.drop
        return {m: gone & (which == at) for at, m in enumerate(names)}

    @cached_property
    def history(self) -> ItemViews:
        return self.of(self.batch.histories.clamp(min=0))

    @cached_property
    def item(self) -> ItemViews:
        return self.of(self.batch.items)

    def of(self, rows: Tensor) -> ItemViews:
        """Views of catalogue rows that are in the batch, [...]."""
        return self.every.at(self.place[rows])

    def user_for(self, target: ItemViews, there: Tensor | None = None) -> Tensor:
        """User vectors before `target` [B, C, ...], from the events that are `there`: [B, C or 1, W]."""
        seen = self.there if there is None else self.there & there
        return self.system.users_of(self.batch.users, self.history, seen, target, self.graph_users)

    @cached_property
    def user(self) -> Tensor:
        return self.user_for(self.of(self.batch.items[:, None]))[:, 0]

    def scores(self, rows: Tensor) -> Tensor:
        """Scores of items [B, C], or [1, C] for the same ones, for the batch's users: [B, C]."""
        target = self.of(rows)
        return self.system.score(self.user_for(target), target)

    def _part(self, there: Tensor) -> Tensor:
        return self.user_for(self.of(self.batch.items[:, None]), there)[:, 0]

    def __getitem__(self, name: str) -> Tensor:
        """The view called `name`, [B, W]; raises ConfigError when there is none."""
        half = self.there.cumsum(1) * 2 <= self.there.sum(1, keepdim=True)
        made = {
            "user": lambda: self.user,
            "item": lambda: self.item.final,
            "other": lambda: self.of(self.batch.others).final,
            "early": lambda: self._part(half),
            "late": lambda: self._part(~half),
            "thinned": lambda: self._part(torch.rand(self.there.shape, device=half.device) >= THINNED),
        }
        if name in made:
            return made[name]()
        if name.startswith("user_"):
            found = self._plain(self.history, name.removeprefix("user_"))
            if found is not None:
                return masked_mean(found, self.there)
        source = self.of(self.batch.others) if name.startswith("other_") else self.item
        found = self._plain(source, name.removeprefix("other_"))
        if found is None:
            raise ConfigError(
                f"objective on view {name!r}: there are {', '.join(made)}, ids, content, "
                f"{', '.join([*self.item.modal, *self.item.parts])}, and user_ or other_ before the last ones"
            )
        return found

    @staticmethod
    def _plain(views: ItemViews, name: str) -> Tensor | None:
        named = {"ids": views.ids, "content": views.content, **views.modal, **views.parts}
        return named.get(name)
