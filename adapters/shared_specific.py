"""What modalities share apart from what is each one's own (AMRL, also called MARN)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, mean_vectors


class SharedSpecific(nn.Module):
    """Per modality a specific vector, and one map for what all say alike (AMRL: Li et al. 2020, arXiv:2003.07162).

    content = attention over the specific vectors + the modalities' shared vectors' mean: a signal that two modalities
    repeat counts once. Objectives make the split: a classifier that names the modality from its specific vector and,
    through reversed gradients, cannot name it from its shared one.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.specific = nn.ModuleDict({m: nn.Linear(width, width) for m in sizes.modalities})
        self.shared = nn.Linear(width, width)
        self.attend = nn.Linear(width, width)

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]; parts: specific_M and shared_M of every modality M."""
        vectors = mean_vectors(tokens, present)
        own = {m: self.specific[m](of) * present[m][:, None] for m, of in vectors.items()}
        common = {m: self.shared(of) * present[m][:, None] for m, of in vectors.items()}
        said = torch.stack([torch.tanh(self.attend(of)) * of for of in own.values()]).sum(0)
        many = torch.stack(list(present.values())).sum(0).clamp(min=1)[:, None]
        shared = torch.stack(list(common.values())).sum(0) / many
        parts = {f"specific_{m}": of for m, of in own.items()} | {f"shared_{m}": of for m, of in common.items()}
        return Fused(said + shared, parts)
