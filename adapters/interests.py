"""Interest encoder-decoder (MISSRec: Wang et al. 2023, arXiv:2308.11175)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.fused import Sizes
from genrec.adapters.item_views import ItemViews
from genrec.adapters.qformer import CrossAttention

SHARPNESS = 8.0


class InterestUser(nn.Module):
    """A history's interests apart from each other: [B, S, W], to be compared by the `interests` head.

    Learned centres take the events that lie near them; an interest is the mean of its events, drawn towards the
    mean of all where it has few, and has looked at the other interests.
    """

    slots = 8

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        width = sizes.width
        self.centres = nn.Parameter(torch.randn(self.slots, width))
        self.norm, self.mix = nn.LayerNorm(width), CrossAttention(width, 2)
        self.trust = nn.Parameter(torch.tensor(1.5))
        nn.init.zeros_(self.mix.out.weight)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        """Views as every user model's -> [B, S, W]."""
        near = F.normalize(history.content, dim=-1) @ F.normalize(self.centres, dim=-1).T
        belongs = (near * SHARPNESS).softmax(-1) * there[..., None]  # [B, T, S]
        many = belongs.sum(1)[..., None]  # [B, S, 1]
        whole = (history.final * there[..., None]).sum(1, keepdim=True) / there.sum(1)[:, None, None].clamp(min=1)
        own = belongs.transpose(1, 2) @ history.final
        interests = (own + whole * self.trust.exp()) / (many + self.trust.exp())
        normed = self.norm(interests)
        return interests + self.mix(normed, normed, torch.ones_like(many[..., 0], dtype=torch.bool))
