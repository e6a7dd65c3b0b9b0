"""Adapters without attention: the mean of each modality, then a linear map or a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.modalities import ModalityTokens, Scaled


class _Pooled(nn.Module):
    """Shared by both: one vector per modality, absent ones zero *after* projection, with a flag saying so."""

    def __init__(self, dims: dict[str, int], width: int, dropout: float):
        super().__init__()
        self.tokens = ModalityTokens(dims, width, dropout)
        self.out_dim = len(dims) * (width + 1)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """features[m] [B, T_m, D_m] -> [B, n_modalities * (W + 1)]."""
        parts = []
        for m in self.tokens.names:
            drop, norm = self.tokens.drop, self.tokens.norm[m]
            vector = self.tokens.proj[m](drop(norm(features[m]))).mean(1) + self.tokens.mark[m]
            there = present[m][:, None].to(vector.dtype)
            parts += [vector * there, there]
        return torch.cat(parts, -1)


class LinearAdapter(nn.Module):
    """One linear map from the pooled modalities to K soft tokens."""

    def __init__(
        self,
        dims: dict[str, int],
        soft_tokens: int,
        dim: int,
        *,
        rms: float,
        width: int = 128,
        dropout: float = 0.1,
    ):
        """Arguments as for `QFormerAdapter`."""
        super().__init__()
        self.pool = _Pooled(dims, width, dropout)
        self.head = nn.Linear(self.pool.out_dim, soft_tokens * dim)
        self.scale = Scaled(dim, rms)
        self.soft_tokens = soft_tokens

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """features[m] [B, T_m, D_m], present[m] bool [B] -> soft tokens [B, K, D]."""
        return self.scale(self.head(self.pool(features, present)).unflatten(-1, (self.soft_tokens, -1)))


class MlpAdapter(nn.Module):
    """Two layers from the pooled modalities to K soft tokens."""

    def __init__(
        self,
        dims: dict[str, int],
        soft_tokens: int,
        dim: int,
        *,
        rms: float,
        width: int = 128,
        dropout: float = 0.1,
    ):
        """Arguments as for `QFormerAdapter`."""
        super().__init__()
        self.pool = _Pooled(dims, width, dropout)
        self.hidden = nn.Sequential(nn.Linear(self.pool.out_dim, 4 * width), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(4 * width, soft_tokens * dim)
        self.scale = Scaled(dim, rms)
        self.soft_tokens = soft_tokens

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """features[m] [B, T_m, D_m], present[m] bool [B] -> soft tokens [B, K, D]."""
        hidden = self.hidden(self.pool(features, present))
        return self.scale(self.head(hidden).unflatten(-1, (self.soft_tokens, -1)))
