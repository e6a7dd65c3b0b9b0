"""Objectives on scores: what was taken above what was not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.system import System
from genrec.planted import Table
from genrec.training.views import Views


class Bpr(nn.Module):
    """``-log sigmoid(score(item) - score(negative))`` (Rendle et al. 2009, arXiv:1205.2618), in nats."""

    def __init__(self, system: System, table: Table):
        super().__init__()

    def forward(self, views: Views) -> Tensor:
        """Needs negatives in the batch."""
        rows = torch.cat([views.batch.items[:, None], views.batch.negatives], 1)
        scores = views.scores(rows)
        return -F.logsigmoid(scores[:, :1] - scores[:, 1:]).mean()


class Bce(nn.Module):
    """Binary cross-entropy of the score against the label, in nats."""

    def __init__(self, system: System, table: Table):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, views: Views) -> Tensor:
        scores = views.scores(views.batch.items[:, None])[:, 0]
        return F.binary_cross_entropy_with_logits(scores + self.bias, views.batch.labels)


class Softmax(nn.Module):
    """Cross-entropy over every known item, in nats; reads the whole catalogue each step."""

    known: Tensor
    place: Tensor

    def __init__(self, system: System, table: Table):
        super().__init__()
        known = (~system.cold).nonzero()[:, 0]
        self.register_buffer("known", known, persistent=False)
        place = torch.full((system.n_items,), -1)
        place[known] = torch.arange(len(known))
        self.register_buffer("place", place, persistent=False)

    def forward(self, views: Views) -> Tensor:
        system = views.system
        every = views.every if system.graph is not None else system.items(self.known)
        target = every.at(
            (self.known if system.graph is not None else torch.arange(len(self.known), device=self.known.device))[None]
        )
        return F.cross_entropy(system.score(views.user_for(target), target), self.place[views.batch.items])


class SampledSoftmax(nn.Module):
    """Cross-entropy over the batch's items, or random ones, or both (ItemSage: arXiv:2205.11728), in nats.

    A popular item is often another row's negative; ``logq`` takes the logarithm of that chance off its score.
    """

    log_chance: Tensor

    def __init__(self, system: System, table: Table, source: str = "batch", correct: str = "logq"):
        super().__init__()
        self.batch, self.random, self.correct = source != "random", source in ("random", "mixed"), correct == "logq"
        counts = torch.bincount(
            torch.cat([torch.from_numpy(h).long() for h in table.split.train]), minlength=system.n_items
        )
        self.register_buffer("log_chance", (counts.clamp(min=1) / counts.sum()).log(), persistent=False)

    def forward(self, views: Views) -> Tensor:
        items = views.batch.items
        scores = views.scores(items[:, None])
        if self.batch:
            others = views.scores(items[None])
            if self.correct:
                others = others - self.log_chance[items]
                scores = scores - self.log_chance[items][:, None]
            same = items[:, None] == items[None]
            scores = torch.cat([scores, others.masked_fill(same, torch.finfo(others.dtype).min)], 1)
        if self.random:
            negatives = views.batch.negatives
            wrong = views.scores(negatives)
            if self.batch and self.correct:  # drawn evenly
                wrong = wrong + torch.log(torch.tensor(float((~views.system.cold).sum())))
            hit = negatives == items[:, None]
            scores = torch.cat([scores, wrong.masked_fill(hit, torch.finfo(wrong.dtype).min)], 1)
        return F.cross_entropy(scores, torch.zeros(len(items), dtype=torch.long, device=items.device))
