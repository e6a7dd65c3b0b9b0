"""Newcomers: items that no training history holds inherit a share of what their nearest relatives in content have.

A log says nothing of an item that nobody has taken, so its own score lacks the part that decides among known items, and
it never comes up. Here its probability is a weighted mean of the probabilities of the known items that are most alike,
times a factor: the lift says how much of the lists new items may take from known ones. Nothing is trained, so an item
that arrives after training is treated like one that was held out before it. Dropping a new item's own collaborative
part and going through content is the idea of cold-start hybrids such as CLCRec (Wei et al. 2021, arXiv:2107.05315) and
LIGER (Yang et al. 2024, arXiv:2411.18814).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHARPNESS = 10.0  # of the weights, per unit of cosine
BLOCK = 1024  # new items compared at once


class Newcomers(nn.Module):
    """``score(i) = lift + log sum over relatives j of w_ij * exp(score(j))`` for new items; others keep theirs."""

    def __init__(self, rows: Tensor, relatives: Tensor, weights: Tensor, lift: Tensor):
        """
        Args:
            rows: int64 [M], the new items.
            relatives: int64 [M, k], known items.
            weights: float32 [M, k], rows that sum to 1.
            lift: float32 [], nats.
        """
        super().__init__()
        for name, value in (("rows", rows), ("relatives", relatives), ("weights", weights), ("lift", lift)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def nearest(cls, keys: dict[str, Tensor], known: Tensor, most: int, lift: float) -> Newcomers:
        """Find each new item's relatives by the mean cosine over modalities, missing ones counting 0.

        Args:
            keys: modality -> float32 [N, E_m], from `genrec.adapters.profile.content_keys`.
            known: bool [N], items that training histories hold; at least one.
            most: relatives per new item, k.
            lift: nats.
        """
        rows, others = (~known).nonzero()[:, 0], known.nonzero()[:, 0]
        best = []
        for block in rows.split(BLOCK):
            cosines = sum(of[block] @ of[others].T for of in keys.values()) / len(keys)
            best.append(torch.as_tensor(cosines).topk(min(most, len(others)), dim=1))
        relatives = others[torch.cat([found.indices for found in best])]
        weights = (SHARPNESS * torch.cat([found.values for found in best])).softmax(1)
        return cls(rows, relatives, weights, torch.tensor(float(lift)))

    def arrays(self) -> dict[str, Tensor]:
        """The constructor's arguments."""
        return {name: self.get_buffer(name) for name in ("rows", "relatives", "weights", "lift")}

    def forward(self, scores: Tensor) -> Tensor:
        """float32 [B, N], nats up to a constant per row -> the same with new items' scores replaced."""
        of = self.arrays()
        inherited = (scores[:, of["relatives"]] + of["weights"].log()).logsumexp(2)  # [B, M]
        return scores.index_copy(1, of["rows"], inherited + of["lift"])
