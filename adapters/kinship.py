"""Kinship: a key per item that says from its content who would take it, and how often it would be taken.

Things that look or read alike are not always taken by the same people: of a film's poster, plot, year and director the
log knows which ones matter. For items that it holds it has factors of their co-occurrence and numbers of events; a
ridge regression learns them from content keys and facts, and what it predicts is every item's key and fame, known or
new (attribute-to-feature maps: Gantner et al. 2010, "Learning attribute-to-feature mappings for cold-start
recommendations"). Known items are compared by what is predicted of them too: so a new one finds those that its content
calls its kin, on equal terms.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

KIN = "kin"  # what these keys are called beside a modality's
WIDTH = 64  # factors of the log
RIDGE, FAME_RIDGE = 1.0, 10.0
DOUBT = 20.0  # an item of so many events counts half
BLOCK = 1024  # items whose facts are written out at once


class Kinship:
    """Content -> keys and fame; it stays as it was fitted: a later item gets its own and touches no other's."""

    def __init__(self, weights: Tensor):
        """weights: float32 [sum of E_m + F + 1, WIDTH + 1]; rows of modalities in the order of their names, of facts
        and of the constant; columns of factors and of fame."""
        self.weights = weights

    @classmethod
    def fit(
        cls, keys: dict[str, Tensor], facts: sparse.csr_matrix, factors: np.ndarray, events: np.ndarray, known: Tensor
    ) -> Kinship:
        """Learn it.

        Args:
            keys: modality -> float32 [N, E_m], from `genrec.adapters.profile.KeySpace`.
            facts: float32 [N, F], from `genrec.adapters.facts.FactSpace`.
            factors: float32 [N, WIDTH] of the training log, see `genrec.item_vectors.cooccurrence_factors`.
            events: int64 [N], training events.
            known: bool [N], the items to learn from; at least one.
        """
        sure = torch.from_numpy(events / (events + DOUBT))
        fame = torch.from_numpy(np.log1p(events))[:, None]
        rows = known.nonzero()[:, 0]
        kin = _ridge(keys, facts, torch.from_numpy(factors), sure, rows, RIDGE)
        return cls(torch.cat([kin, _ridge(keys, facts, fame, torch.ones_like(sure), rows, FAME_RIDGE)], 1))

    def of(self, keys: dict[str, Tensor], facts: sparse.csr_matrix) -> tuple[Tensor, Tensor]:
        """Any items' content [N, E_m] and [N, F] -> their keys, float32 [N, WIDTH] of unit rows, and their fame,
        float32 [N]: nats by which each would be taken oftener than the mean of the known items."""
        blocks = torch.arange(facts.shape[0]).split(BLOCK)
        said = torch.cat([_design(keys, facts, block) @ self.weights for block in blocks])
        return F.normalize(said[:, :-1], dim=1), said[:, -1]


def _ridge(
    keys: dict[str, Tensor], facts: sparse.csr_matrix, said: Tensor, sure: Tensor, rows: Tensor, penalty: float
) -> Tensor:
    """Weighted ridge regression of what is said of items, [N, W], by how sure it is, [N]: float32 [D, W].

    Predictions are about their mean over `rows`: what all have in common makes no kin and no fame.
    """
    width = sum(of.shape[1] for of in keys.values()) + facts.shape[1] + 1
    gram = penalty * torch.eye(width, dtype=torch.float64)
    moment, total = (torch.zeros(width, of, dtype=torch.float64) for of in (said.shape[1], 1))
    for block in rows.split(BLOCK):
        x = _design(keys, facts, block).double()
        weighted = x * sure[block, None]
        gram += weighted.T @ x
        moment += weighted.T @ said[block].double()
        total += x.sum(0)[:, None]
    weights = torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
    weights[-1] -= (total / len(rows) * weights).sum(0)
    return weights.float()


def _design(keys: dict[str, Tensor], facts: sparse.csr_matrix, rows: Tensor) -> Tensor:
    """Of some items, float32 [B, sum of E_m + F + 1]."""
    parts = [keys[name][rows] for name in sorted(keys)]
    return torch.cat([*parts, torch.from_numpy(facts[rows.numpy()].toarray()), torch.ones(len(rows), 1)], 1)
