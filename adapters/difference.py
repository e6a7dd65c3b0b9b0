"""What a modality says beyond what the item's id says already (GMMF: Xiao et al., MM 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, mean_vectors

OPEN = 4.0  # where the gates start: nearly all that the id tells goes


class DifferenceSet(nn.Module):
    """``x - sigmoid(W [x, g, x * g, x - g]) * g`` per modality, where g is the id's guess of x.

    The paper trains its guess by an adversary; here an objective regresses it: ``mse(guess_M, read_M)``. No gradient
    goes from the guess into the ids, so that they stay the log's.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.guess = nn.ModuleDict({m: nn.Linear(width, width) for m in sizes.modalities})
        gates = {m: nn.Linear(4 * width, width) for m in sizes.modalities}
        for gate in gates.values():
            nn.init.constant_(gate.bias, OPEN)
        self.gate = nn.ModuleDict(gates)

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W], given.ids [B, W] -> content, the differences' sum [B, W].

        The differences are the modalities' own vectors from here on; parts: guess_M and read_M of every modality M.
        """
        read = mean_vectors(tokens, present)
        guess = {m: self.guess[m](given.ids.detach()) * present[m][:, None] for m in read}
        left = {}
        for m, x in read.items():
            g = guess[m]
            left[m] = x - torch.sigmoid(self.gate[m](torch.cat([x, g, x * g, x - g], -1))) * g
        parts = {f"guess_{m}": of for m, of in guess.items()} | {f"read_{m}": of for m, of in read.items()}
        return Fused(torch.stack(list(left.values())).sum(0), parts, left)
