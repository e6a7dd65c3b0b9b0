"""Heads: a user's vector and a candidate's views to one score.

Called with ``user`` [B, C or 1, W] and ``target`` views [B or 1, C, ...], 1 where all users have the same candidates;
returns float [B, C].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.fused import Sizes
from genrec.adapters.item_views import ItemViews, dots, side_by_side


class DotHead(nn.Module):
    """The dot product: the only head that a nearest-neighbour index can serve."""

    def __init__(self, sizes: Sizes):
        super().__init__()

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        return dots(user, target.final)


class RankerHead(nn.Module):
    """An MLP over the user, the item and their product, added to the dot product (DeepFM's two halves)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.mlp = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        both = user * target.final
        return self.mlp(side_by_side(user, target.final, both))[..., 0] + both.sum(-1)


class DynamicHead(nn.Module):
    """``sum_m softmax(a s_m) s_m`` over modalities' scores s_m, one learned a (MISSRec: arXiv:2308.11175)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(1.0))

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        scores = torch.stack([dots(user, of) for of in target.modal.values()], -1)
        return ((self.sharpness * scores).softmax(-1) * scores).sum(-1)


class ModalHead(nn.Module):
    """Each modality of the candidate with the user vector that is meant for it; user [B, C or 1, M * W]."""

    def __init__(self, sizes: Sizes):
        super().__init__()

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        return dots(user, torch.cat(list(target.modal.values()), -1))


class GatedHead(nn.Module):
    """Each user weighs the modalities: ``M sum_m softmax(G(u))_m <u_m, item_m>`` (GMMF's interest gate, MM 2022)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        many, width = len(sizes.modalities), sizes.width
        self.gate = nn.Sequential(nn.Linear(many * width, 2 * width), nn.GELU(), nn.Linear(2 * width, many))

    def gates(self, user: Tensor) -> Tensor:
        """user [..., M * W] -> how much each modality counts, [..., M]; 1 each at parity."""
        gates = self.gate(user).softmax(-1)
        return gates * gates.shape[-1]

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        weighed = user.unflatten(-1, (len(target.modal), -1)) * self.gates(user)[..., None]
        return dots(weighed.flatten(-2), torch.cat(list(target.modal.values()), -1))


class CosineHead(nn.Module):
    """The cosine: for objectives that train directions only."""

    def __init__(self, sizes: Sizes):
        super().__init__()

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        return dots(F.normalize(user, dim=-1), F.normalize(target.final, dim=-1))


class InterestHead(nn.Module):
    """The best of a user's interests, smoothed: user [B, S, W], one row of candidates or each user's own."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(0.1))

    def forward(self, user: Tensor, target: ItemViews) -> Tensor:
        fits = target.final @ user.transpose(1, 2)  # [B, C, S]
        return ((self.sharpness * fits).softmax(-1) * fits).sum(-1)


HEADS: dict[str, type[nn.Module]] = {
    "dot": DotHead,
    "ranker": RankerHead,
    "dynamic": DynamicHead,
    "gated": GatedHead,
    "cosine": CosineHead,
    "modal": ModalHead,
    "interests": InterestHead,
}
