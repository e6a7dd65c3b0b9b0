"""Something small put into a part of blocks, to learn while the part stays as it is: bottlenecks, LoRA, a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RANK, PROMPT = 4, 4


class Bottlenecked(nn.Module):
    """A block followed by a small residual network that starts as the identity."""

    def __init__(self, block: nn.Module, width: int):
        super().__init__()
        self.block = block
        self.down, self.up = nn.Linear(width, RANK), nn.Linear(RANK, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, W], mask as the block's -> [B, T, W]."""
        x = self.block(x, mask)
        return x + self.up(torch.nn.functional.gelu(self.down(x)))


def put_in(module: Any, kind: str, width: int, first: int = 0) -> None:
    """Change a part in place.

    Args:
        module: with blocks in ``.layers``; for a prompt with ``.add_prompt``.
        kind: one of `genrec.system_recipe.SMALL`.
        width: of the blocks, W.
        first: block that a bottleneck or LoRA begins with.
    """
    if kind == "bottleneck":
        for at in range(first, len(module.layers)):
            module.layers[at] = Bottlenecked(module.layers[at], width)
    elif kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model  # serving loads this file, and rarely needs peft

        linear = [name for name, of in module.named_modules() if isinstance(of, nn.Linear)]
        kept = tuple(f"layers.{at}." for at in range(first))
        targets = [name for name in linear if not name.startswith(kept)]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets), module)
    else:
        module.add_prompt(PROMPT)
