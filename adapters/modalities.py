"""What every adapter starts with: each modality's vectors brought to one width, with missing ones masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ModalityTokens(nn.Module):
    """Per modality a normalisation, a linear map and a learned mark; then all modalities' tokens side by side."""

    def __init__(self, dims: dict[str, int], width: int, dropout: float = 0.0):
        """
        Args:
            dims: modality -> D_m.
            width: common width W.
            dropout: on the features.
        """
        super().__init__()
        self.names = sorted(dims)
        self.norm = nn.ModuleDict({m: nn.LayerNorm(dims[m]) for m in self.names})
        self.proj = nn.ModuleDict({m: nn.Linear(dims[m], width) for m in self.names})
        self.mark = nn.ParameterDict({m: nn.Parameter(torch.randn(width) * 0.02) for m in self.names})
        self.drop = nn.Dropout(dropout)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """features[m] float [B, T_m, D_m], present[m] bool [B] -> tokens [B, T, W], there bool [B, T]."""
        tokens, there = [], []
        for m in self.names:
            tokens.append(self.proj[m](self.drop(self.norm[m](features[m]))) + self.mark[m])
            there.append(present[m][:, None].expand(-1, features[m].shape[1]))
        return torch.cat(tokens, 1), torch.cat(there, 1)


class Scaled(nn.Module):
    """Layer norm, then one learned scale: soft tokens start at the length of the LLM's own input vectors."""

    def __init__(self, dim: int, rms: float):
        """
        Args:
            dim: D.
            rms: root mean square of the LLM's input embedding.
        """
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.scale = nn.Parameter(torch.tensor(float(rms)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.norm(x) * self.scale
