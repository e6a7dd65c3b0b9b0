"""Histories of different lengths as flat tensors, which need no padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Histories = Sequence[np.ndarray] | Sequence[Sequence[int]]


def side_by_side(histories: Histories, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """B histories of catalogue rows, one behind the other.

    Example: (7, 3), () and (5) are the items 7, 3, 5 of the owners 0, 0, 2 and have the sizes 2, 0, 1.

    Returns:
        items int64 [H], the history that each belongs to int64 [H], and the histories' sizes int64 [B].
    """
    sizes = torch.tensor([len(history) for history in histories], dtype=torch.int64, device=device)
    flat = np.concatenate([np.empty(0, np.int64), *(np.asarray(history, np.int64) for history in histories)])
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    return torch.from_numpy(flat).to(device), owner, sizes
