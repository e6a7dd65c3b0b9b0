"""Every vector that a system has of some items, indexed together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def dots(user: Tensor, items: Tensor) -> Tensor:
    """Dot products: user [B, C or 1, W], items [B or 1, C, W] -> [B, C]; one product where all share candidates."""
    if user.shape[1] == 1 and items.shape[0] == 1:
        return user[:, 0] @ items[0].T
    return (user * items).sum(-1)


def side_by_side(*vectors: Tensor) -> Tensor:
    """Vectors of users and of candidates, each [B or 1, C or 1, W], in one tensor [B, C, n * W]."""
    return torch.cat(torch.broadcast_tensors(*vectors), -1)


@dataclass(frozen=True)
class ItemViews:
    """Views of items, each of shape [..., W].

    Attributes:
        final: what users are compared with.
        content: what the fusion made of the modalities.
        ids: learned per item; zeros where the system has none.
        modal: modality -> its own vector.
        parts: what the fusion adds for its objectives.
        category: int64 [...].
        rows: int64 [...], catalogue rows.
    """

    final: Tensor
    content: Tensor
    ids: Tensor
    modal: dict[str, Tensor]
    category: Tensor
    rows: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def at(self, index: Tensor) -> ItemViews:
        """The views of ``index`` int64 [...], positions along the first dimension."""
        return self._each(lambda of: of[index])

    def to(self, device: torch.device | str) -> ItemViews:
        """The same on another device."""
        return self._each(lambda of: of.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> ItemViews:
        return ItemViews(
            final=change(self.final),
            content=change(self.content),
            ids=change(self.ids),
            modal={m: change(of) for m, of in self.modal.items()},
            category=change(self.category),
            rows=change(self.rows),
            parts={name: change(of) for name, of in self.parts.items()},
        )
