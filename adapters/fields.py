"""What an item is, and what it was made into, as fields of one ranker (EASE's exit: Qiu et al., CIKM 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.fused import Sizes
from genrec.adapters.item_views import ItemViews


class Fields(nn.Module):
    """One map of the modalities' own vectors and of the content, side by side and each of one size.

    The content's part is zero at first: a ranker starts from the features alone, and content that says nothing of
    use stays out of it.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.own = nn.Linear(len(sizes.modalities) * sizes.width, sizes.width, bias=False)
        self.made = nn.Linear(sizes.width, sizes.width, bias=False)
        nn.init.zeros_(self.made.weight)

    def forward(self, views: ItemViews) -> Tensor:
        """Views of [..., W] -> the final vector [..., W]."""
        own = torch.cat(list(views.modal.values()), -1)
        return self.own(_sized(own)) + self.made(_sized(views.content))


def _sized(vectors: Tensor) -> Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])
