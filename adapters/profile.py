"""The profile: what a history's features have in common, as a score for every item of the catalogue.

A taste that lasts shows in the *mean* of what a user chose: ten blue things make a blue mean, ten things of any colour
make none. A transformer learns to average its context only slowly; here the mean is taken outright, and what remains to
be learned is how much it counts, and how much faster old events fade than new ones. The scores are a prior over items
that `genrec.trie.Trie.prior` spreads over the semantic ids, so the language model writes codes on top of what content
alone says, and items that no user has touched yet are reached through their content. Close relatives are content-based
neighbours, and LIGER's dense scores beside generated ids (Yang et al. 2024, arXiv:2411.18814).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.histories import Histories, ages, faded_sums, side_by_side
from genrec.encoders.features import Features

HIDDEN = 32  # width of the gate's inner layer
SHARPNESS = 3.0  # a gate's unit in nats; with the first bias of 2 a cosine of 1 weighs about 6 nats
DECAY = 0.95  # first value, of an event's weight per later event
STRETCH = 10.0  # the decay's logit is stored divided by it: steps that suit matrices would hardly move it
FLAT = 1e-6  # a feature that varies less than this is constant


class KeySpace:
    """One unit vector per item and modality, in which cosines mean what standardised features mean.

    The pooled features are standardised, then rotated onto their principal axes and cut to the widest of them. The
    statistics stay as they were fitted, so that a later item gets its keys without touching the others'.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        """
        Args:
            arrays: ``MODALITY.mean``, ``MODALITY.spread`` float64 [D_m] and ``MODALITY.axes`` float64 [D_m, E_m].
        """
        self.arrays = arrays

    @classmethod
    def fit(cls, features: dict[str, Features], fit_on: np.ndarray, width: int) -> KeySpace:
        """Learn the statistics.

        Args:
            features: modality -> features of all items.
            fit_on: bool [N], the items that training may look at.
            width: most values per key, E.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, one in features.items():
            values = one.values.mean(1, dtype=np.float64)  # [N, D_m]
            rows = values[fit_on & one.present]
            mean, spread = (rows if len(rows) else values[:1]).mean(0), (rows if len(rows) else values[:1]).std(0)
            spread = np.where(spread > FLAT, spread, np.inf)
            standard = (rows - mean) / spread
            axes = np.linalg.eigh(standard.T @ standard)[1][:, ::-1][:, :width]  # widest first
            arrays |= {f"{name}.mean": mean, f"{name}.spread": spread, f"{name}.axes": axes}
        return cls(arrays)

    def keys(self, features: dict[str, Features]) -> dict[str, Tensor]:
        """Features of any items -> modality -> float32 [N, E_m]; a row of zeros where an item lacks the modality."""
        keys = {}
        for name, one in features.items():
            mean, spread, axes = (self.arrays[f"{name}.{part}"] for part in ("mean", "spread", "axes"))
            values = (one.values.mean(1, dtype=np.float64) - mean) / spread @ axes
            length = np.linalg.norm(values, axis=1, keepdims=True)
            unit = np.divide(values, length, out=np.zeros_like(values), where=length > FLAT)
            keys[name] = torch.from_numpy((unit * one.present[:, None]).astype(np.float32))
        return keys


def content_keys(features: dict[str, Features], fit_on: np.ndarray, width: int) -> dict[str, Tensor]:
    """The keys of the very items that a `KeySpace` is fitted on; arguments as for its `fit`."""
    return KeySpace.fit(features, fit_on, width).keys(features)


class Profile(nn.Module):
    """Scores of all items from the means of a history's keys.

    ``score(i) = sum over modalities of gate_m * (mean_m A_m) . key_m(i)``: an event of age s weighs ``decay_m ** s`` in
    the mean, ``A_m`` starts as the identity, and the gates read how coherent the history is (the length of each mean)
    and how long.
    """

    def __init__(self, keys: dict[str, Tensor]):
        """
        Args:
            keys: modality -> float32 [N, E_m], rows of length 1, or 0 where an item lacks the modality.
        """
        super().__init__()
        self.names = sorted(keys)
        for name in self.names:
            self.register_buffer(f"keys_{name}", keys[name], persistent=False)
        self.maps = nn.ParameterDict({m: nn.Parameter(torch.eye(keys[m].shape[1])) for m in self.names})
        first = torch.full((len(self.names),), np.log(DECAY / (1 - DECAY)) / STRETCH)
        self.logit_decays = nn.Parameter(first)
        last = nn.Linear(HIDDEN, len(self.names))
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 2.0)
        self.gate = nn.Sequential(nn.Linear(len(self.names) + 1, HIDDEN), nn.GELU(), last)

    def keys(self, name: str) -> Tensor:
        """float32 [N, E_m]."""
        return self.get_buffer(f"keys_{name}")

    def decays(self) -> Tensor:
        """float32 [modalities], in the order of `names`."""
        return (STRETCH * self.logit_decays).sigmoid()

    def forward(self, histories: Histories) -> Tensor:
        """Scores for whole histories.

        Args:
            histories: B histories of catalogue rows, oldest first.

        Returns:
            float32 [B, N], nats up to a constant per row; all zero for an empty history.
        """
        items, owner, sizes = side_by_side(histories, self.logit_decays.device)
        age = ages(owner, sizes)[:, None]
        means = {}
        for name, decay in zip(self.names, self.decays(), strict=True):
            rows = decay**age * self._rows(name, items)
            means[name] = self._mean(rows.new_zeros(len(sizes), rows.shape[1]).index_add(0, owner, rows))
        return self._scores(means, sizes)

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores before each of many events, from the events of the same history before it: one pass for training.

        Example: items 7, 3, 5 with first 0, 0, 2 are the histories (7, 3) and (5); the scores are those of the
        histories (), (7) and ().

        Args:
            items: int64 [M], histories side by side, oldest first.
            first: int64 [M], where each event's history begins in `items`.

        Returns:
            float32 [M, N].
        """
        means = {
            name: self._mean(faded_sums(self._rows(name, items), first, decay))
            for name, decay in zip(self.names, self.decays(), strict=True)
        }
        return self._scores(means, torch.arange(len(items), device=items.device) - first)

    def _rows(self, name: str, items: Tensor) -> Tensor:
        """items int64 [H] -> [H, E + 1]: their keys, and a 1 where an item has the modality."""
        keys = self.keys(name)[items]
        return torch.cat([keys, keys.any(1, keepdim=True).to(keys.dtype)], 1)

    @staticmethod
    def _mean(sums: Tensor) -> Tensor:
        """Weighted sums of such rows [B, E + 1] -> weighted means [B, E]; zeros where no item has the modality."""
        return sums[:, :-1] / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)

    def _scores(self, means: dict[str, Tensor], events: Tensor) -> Tensor:
        """means[m] [B, E_m], events int64 [B] -> [B, N]."""
        lengths = torch.stack([means[m].norm(dim=1) for m in self.names], 1)  # [B, modalities]
        signs = torch.cat([SHARPNESS * lengths, events.clamp(min=1).log().to(lengths)[:, None]], 1)
        gates = SHARPNESS * F.softplus(self.gate(signs))
        scores = gates.new_zeros(1, 1)
        for at, name in enumerate(self.names):
            asked = gates[:, at, None] * (means[name] @ self.maps[name])
            scores = torch.addmm(scores, asked, self.keys(name).T)
        return scores
