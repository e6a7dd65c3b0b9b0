"""Kinship: a key per item that says from its content who would take it.

Things that look or read alike are not always taken by the same people: of a film's poster, plot, year and director the
log knows which ones matter. For items that it holds it has factors of their co-occurrence; a ridge regression learns
them from the content keys, and what it predicts is every item's key, known or new (attribute-to-feature maps: Gantner
et al. 2010, "Learning attribute-to-feature mappings for cold-start recommendations"). Known items are compared by what
is predicted of them too: so a new one finds those that its content calls its kin, on equal terms.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

KIN = "kin"  # what newcomers and mixers call these keys, beside a modality's
WIDTH = 64  # factors of the log
RIDGE = 3.0
DOUBT = 20.0  # an item of so many events counts half


class Kinship:
    """Content keys -> keys; it stays as it was fitted: a later item gets its key and touches no other's."""

    def __init__(self, weights: Tensor):
        """weights: float32 [sum of E_m + 1, WIDTH], modalities in the order of their names, the constant last."""
        self.weights = weights

    @classmethod
    def fit(cls, keys: dict[str, Tensor], factors: np.ndarray, events: np.ndarray, known: Tensor) -> Kinship:
        """Learn it.

        Args:
            keys: modality -> float32 [N, E_m], from `genrec.adapters.profile.KeySpace`.
            factors: float32 [N, WIDTH] of the training log, see `genrec.item_vectors.cooccurrence_factors`.
            events: int64 [N], training events.
            known: bool [N], the items to learn from; at least one.
        """
        x, rows = _with_constant(keys)[known].double().numpy(), known.numpy()
        sure = events[rows] / (events[rows] + DOUBT)
        weights = Ridge(RIDGE, fit_intercept=False).fit(x, factors[rows], sample_weight=sure).coef_.T
        weights[-1] -= (x @ weights).mean(0)  # cosines about the mean: what all have in common makes no kin
        return cls(torch.from_numpy(np.ascontiguousarray(weights, np.float32)))  # columns would be saved as rows

    def keys(self, keys: dict[str, Tensor]) -> Tensor:
        """Content keys of any items [N, E_m] -> float32 [N, WIDTH] of unit rows."""
        return F.normalize(_with_constant(keys) @ self.weights, dim=1)


def _with_constant(keys: dict[str, Tensor]) -> Tensor:
    """float32 [N, sum of E_m + 1]."""
    parts = [keys[name] for name in sorted(keys)]
    return torch.cat([*parts, torch.ones(len(parts[0]), 1)], 1)
