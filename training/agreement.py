"""Objectives on two views of the same thing: they should agree, differ, or keep the likeness that they had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.system import System
from genrec.planted import Table
from genrec.training.views import Views

TEMPERATURE = 0.2


class Nce(nn.Module):
    """InfoNCE both ways between two views over the batch, in nats; rows of the same item are no negatives."""

    def __init__(self, system: System, table: Table, one: str, other: str):
        super().__init__()
        self.names = (one, other)

    def forward(self, views: Views) -> Tensor:
        a, b = (F.normalize(views[name], dim=-1) for name in self.names)
        logits = a @ b.T / TEMPERATURE
        rows = views.batch.items
        same = (rows[:, None] == rows[None]) & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        logits = logits.masked_fill(same, torch.finfo(logits.dtype).min)
        truth = torch.arange(len(rows), device=rows.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class Regress(nn.Module):
    """Mean squared distance of one view from another, which does not move."""

    def __init__(self, system: System, table: Table, one: str, fixed: str):
        super().__init__()
        self.one, self.fixed = one, fixed

    def forward(self, views: Views) -> Tensor:
        return (views[self.one] - views[self.fixed].detach()).square().sum(-1).mean()


class CosinePull(nn.Module):
    """``1 - cos``: user and taken item (AlignRec's user-item alignment, arXiv:2403.12384)."""

    def __init__(self, system: System, table: Table, one: str = "user", other: str = "item"):
        super().__init__()
        self.names = (one, other)

    def forward(self, views: Views) -> Tensor:
        return (1 - F.cosine_similarity(views[self.names[0]], views[self.names[1]])).mean()


class Bootstrap(nn.Module):
    """One view predicts the other's detached, thinned vector; no negatives (BM3: Zhou et al. 2023)."""

    def __init__(self, system: System, table: Table, one: str, other: str):
        super().__init__()
        self.names = (one, other)
        width = system.sizes.width
        self.predict = nn.Linear(width, width)
        nn.init.eye_(self.predict.weight)

    def forward(self, views: Views) -> Tensor:
        a, b = (views[name] for name in self.names)
        goal = lambda x: F.dropout(x.detach(), 0.3)  # noqa: E731
        there = 1 - F.cosine_similarity(self.predict(a), goal(b))
        back = 1 - F.cosine_similarity(self.predict(b), goal(a))
        return (there + back).mean()


class KeepLikeness(nn.Module):
    """A view's likeness between the batch's items stays that of their raw features (AlignRec); a squared distance."""

    def __init__(self, system: System, table: Table, view: str):
        super().__init__()
        self.view = view

    def forward(self, views: Views) -> Tensor:
        rows, names = views.batch.items, views.system.modalities
        raw = [F.normalize(views.system.raw(m)[rows], dim=-1) for m in names]
        wanted = torch.stack([of @ of.T for of in raw]).mean(0)
        unit = F.normalize(views[self.view], dim=-1)
        return (unit @ unit.T - wanted).square().mean()


class Orthogonal(nn.Module):
    """Squared cosine of two views: they should not say the same."""

    def __init__(self, system: System, table: Table, one: str, other: str):
        super().__init__()
        self.names = (one, other)

    def forward(self, views: Views) -> Tensor:
        return F.cosine_similarity(views[self.names[0]], views[self.names[1]]).square().mean()
