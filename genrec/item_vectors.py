"""One vector per item for the quantiser: every modality at equal weight, optionally co-occurrence too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from sklearn.utils.extmath import randomized_svd

from genrec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from genrec.encoders import Features

WINDOW = 5  # events between two items that count as seen together
FLAT = 1e-6  # a column that varies less than this against its modality's widest column is constant


@dataclass(frozen=True)
class ItemSpace:
    """Frozen statistics: an item's vector is ``(value - means) * scales`` per modality, then its factors.

    Attributes:
        means: modality -> float32 [D_m].
        scales: modality -> float32 [D_m].
        collaborative_dim: width of the co-occurrence factors.
    """

    means: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    collaborative_dim: int

    @classmethod
    def fit(cls, features: dict[str, Features], fit_on: np.ndarray, collaborative_dim: int) -> ItemSpace:
        """Learn means and scales from the rows of `fit_on` (bool [N]) that have the modality."""
        means, scales = {}, {}
        for name, (values, present) in _pooled(features).items():
            rows = values[fit_on & present]
            if len(rows):
                means[name], spread = rows.mean(0), rows.std(0)
            else:
                means[name] = spread = np.zeros(values.shape[1], np.float32)
            varies = spread > FLAT * spread.max(initial=0)
            scale = np.zeros_like(spread)
            scale[varies] = 1 / (spread[varies] * np.sqrt(varies.sum()))  # the modality's variances sum to 1
            scales[name] = scale
        return cls(means, scales, collaborative_dim)

    def vectors(self, features: dict[str, Features], factors: np.ndarray | None = None) -> np.ndarray:
        """Content, standardised, then the factors (zeros when None: an item without events).

        Args:
            features: the modalities that were fitted; a missing modality becomes the mean, so zeros.
            factors: float32 [N, collaborative_dim].

        Returns:
            float32 [N, sum of D_m + collaborative_dim].

        Raises:
            DataError: modalities or widths differ from the fitted ones, or a value is not finite.
        """
        pooled = _pooled(features)
        found = {name: values.shape[1] for name, (values, _) in pooled.items()}
        fitted = {name: len(mean) for name, mean in self.means.items()}
        if found != fitted:
            raise DataError(
                f"features have the widths {found}, the semantic ids were fitted on {fitted}; "
                "encode the items with the encoders of that run"
            )
        parts = []
        for name, mean in self.means.items():
            values, present = pooled[name]
            parts.append((values - mean) * self.scales[name] * present[:, None])
        if factors is None:
            factors = np.zeros((len(parts[0]), self.collaborative_dim), np.float32)
        return np.concatenate([*parts, factors], 1, dtype=np.float32)


def _pooled(features: dict[str, Features]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Modality -> float32 [N, D_m], the mean over its tokens (zeros where missing), and bool [N], present."""
    if not features:
        raise ConfigError("semantic ids need at least one modality's features; set encode.text or encode.image")
    counts = {name: len(one.values) for name, one in features.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"features cover different numbers of items: {counts}; encode one catalogue for all of them")
    pooled = {}
    for name, one in features.items():
        present = np.asarray(one.present, bool)
        values = np.where(present[:, None], one.values.mean(1, dtype=np.float32), np.float32(0))
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise DataError(f"features {name}: {len(bad)} items hold NaN or infinity, rows {bad[:5].tolist()} first")
        pooled[name] = values, present
    return pooled


def cooccurrence_factors(histories: list[np.ndarray], n_items: int, dim: int, seed: int) -> np.ndarray:
    """SVD of the positive PMI of items seen together (Levy & Goldberg 2014), each row of length 1.

    Args:
        histories: int32 item rows in time order, one array per user.
        n_items: N.
        dim: width.
        seed: the result follows from it.

    Returns:
        float32 [N, dim]; zeros for an item that is never seen with another.

    Raises:
        ConfigError: no histories, or more factors than items.
    """
    if not histories or dim > n_items:
        raise ConfigError(
            f"collaborative_dim {dim}: found {len(histories)} histories over {n_items} items; needs at least "
            "one history and at most one factor per item, or set semantic_ids.collaborative_dim to 0"
        )
    items = np.concatenate(histories).astype(np.int64)
    users = np.repeat(np.arange(len(histories)), [len(one) for one in histories])
    pairs = [
        np.stack([items[:-gap], items[gap:]])[:, users[:-gap] == users[gap:]]
        for gap in range(1, min(WINDOW, len(items) - 1) + 1)
    ]
    left, right = np.concatenate([np.empty((2, 0), np.int64), *pairs], 1)
    left, right = left[left != right], right[left != right]
    ones = np.ones(2 * len(left))
    both = np.concatenate([left, right]), np.concatenate([right, left])
    counts = coo_matrix((ones, both), shape=(n_items, n_items)).tocsr().tocoo()
    if not counts.nnz:
        return np.zeros((n_items, dim), np.float32)
    totals = np.asarray(counts.sum(1)).ravel()
    pmi = np.log(counts.data * totals.sum() / (totals[counts.row] * totals[counts.col]))
    counts.data = np.maximum(pmi, 0)
    u, s, _ = randomized_svd(counts.tocsr(), dim, random_state=seed)
    factors = u * np.sqrt(s)
    length = np.linalg.norm(factors, axis=1, keepdims=True)
    return np.divide(factors, length, out=np.zeros_like(factors), where=length > 1e-9).astype(np.float32)
