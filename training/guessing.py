"""Objectives with a guesser of their own: of a hidden modality, a category, a factor of the log, a modality's name."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.system import System
from genrec.errors import ConfigError
from genrec.item_vectors import cooccurrence_factors
from genrec.planted import Table
from genrec.training.views import Views


class Masked(nn.Module):
    """A modality is hidden and guessed from the content: which of the batch's is it? InfoNCE, in nats."""

    def __init__(self, system: System, table: Table, modality: str):
        super().__init__()
        if modality not in system.modalities:
            raise ConfigError(f"objective masked({modality}): the items have {', '.join(system.modalities)}")
        self.modality = modality
        self.guess = nn.Linear(system.sizes.width, table.features[modality].values.shape[2])

    def forward(self, views: Views) -> Tensor:
        system, rows = views.system, views.batch.items.unique()
        rows = rows[getattr(system, f"present_{self.modality}")[rows]]
        if len(rows) < 2:
            return views.every.content.sum() * 0
        hidden = system.items(rows, hide={m: torch.full_like(rows, m == self.modality, dtype=torch.bool)
                                          for m in system.modalities})  # fmt: skip
        guess = F.normalize(self.guess(hidden.content), dim=-1)
        truth = F.normalize(system.raw(self.modality)[rows], dim=-1)
        return F.cross_entropy(guess @ truth.T / 0.1, torch.arange(len(rows), device=rows.device))


class Classify(nn.Module):
    """A view names its item's category; cross-entropy in nats."""

    def __init__(self, system: System, table: Table, view: str):
        super().__init__()
        self.view, self.guess = view, nn.Linear(system.sizes.width, system.sizes.n_categories)

    def forward(self, views: Views) -> Tensor:
        return F.cross_entropy(self.guess(views[self.view]), views.item.category)


class NextCategory(nn.Module):
    """The history names the next item's category (S3-Rec's masked attribute, arXiv:2008.07873); nats."""

    def __init__(self, system: System, table: Table, view: str = "user"):
        super().__init__()
        self.view, self.guess = view, nn.Linear(system.sizes.width, system.sizes.n_categories)

    def forward(self, views: Views) -> Tensor:
        return F.cross_entropy(self.guess(views[self.view]), views.item.category)


class FactorTarget(nn.Module):
    """A view regresses the item's factor of the log, which is computed once and stays (CB2CF, DCMR).

    Factors are those of `genrec.item_vectors.cooccurrence_factors`, of length 1.
    """

    factors: Tensor

    def __init__(self, system: System, table: Table, view: str = "content"):
        super().__init__()
        self.view = view
        factors = torch.from_numpy(cooccurrence_factors(table.split.train, system.n_items, system.sizes.width, 0))
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, views: Views) -> Tensor:
        return (views[self.view] - self.factors[views.batch.items]).square().sum(-1).mean()


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round (Ganin and Lempitsky 2015, arXiv:1409.7495)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class TellApart(nn.Module):
    """Specific vectors name their modality, shared ones must not (AMRL's discriminators); nats.

    With it the shared vectors of an item's modalities are pulled together, or "says nothing" would be an answer.
    """

    def __init__(self, system: System, table: Table):
        super().__init__()
        self.names = system.modalities
        self.specific = nn.Linear(system.sizes.width, len(self.names))
        self.shared = nn.Linear(system.sizes.width, len(self.names))

    def forward(self, views: Views) -> Tensor:
        loss = views["content"].new_zeros(())
        shared = [views[f"shared_{m}"] for m in self.names]
        for at, m in enumerate(self.names):
            truth = torch.full((len(views.batch.items),), at, device=loss.device)
            loss = loss + F.cross_entropy(self.specific(views[f"specific_{m}"]), truth)
            loss = loss + F.cross_entropy(self.shared(Reversed.apply(shared[at])), truth)
        for one, other in pairwise(shared):
            loss = loss + (1 - F.cosine_similarity(one, other)).mean()
        return loss / len(self.names)
