"""Histories of different lengths as flat tensors, which need no padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Histories = Sequence[np.ndarray] | Sequence[Sequence[int]]
BLOCK = 32  # events that `faded_sums` compares with one another; earlier ones come in as one sum


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


def ages(owner: Tensor, sizes: Tensor) -> Tensor:
    """int64 [H]: events after each event of `side_by_side`'s histories; 0 for the newest."""
    return sizes.cumsum(0)[owner] - 1 - torch.arange(len(owner), device=owner.device)


def faded_sums(rows: Tensor, first: Tensor, decay: Tensor) -> Tensor:
    """Before each event, what its history's earlier events add up to, an event of age s weighing ``decay ** s``.

    Example: the rows a, b, c of one history have the sums 0, a and ``b + decay * a``.

    Args:
        rows: [M, W], one per event, histories side by side, oldest first.
        first: int64 [M], where each event's history begins.
        decay: scalar in 0..1.

    Returns:
        [M, W].
    """
    totals = [rows[:0]]
    lengths = first.unique_consecutive(return_counts=True)[1]
    for history in rows.split(lengths.tolist()):  # [T, W]
        past = None  # what the blocks so far add up to before the next one, [1, W]
        blocks = history.split(BLOCK)
        for number, block in enumerate(blocks, 1):
            at = torch.arange(len(block), device=rows.device)
            age = at[:, None] - 1 - at  # of event j before event t
            weights = torch.where(age >= 0, decay ** age.clamp(min=0), 0.0)
            totals.append(weights @ block if past is None else torch.addmm(decay ** at[:, None] @ past, weights, block))
            if number < len(blocks):
                end = decay ** (len(block) - 1 - at)[None] @ block
                past = end if past is None else end + decay ** len(block) * past
    return torch.cat(totals)


def earlier_events(first: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of an event and an earlier one of its history.

    Example: the histories (7, 3) and (5, 2, 9), with first 0, 0, 2, 2, 2, have the earlier events 0 of 1, 2 of 3, and
    2 and 3 of 4: the result is ``[0, 2, 2, 3], [1, 3, 4, 4]``.

    Args:
        first: int64 [M], where each event's history begins, histories side by side.

    Returns:
        the earlier events and the events, int64 [H] each.
    """
    at = torch.arange(len(first), device=first.device)
    sizes = at - first
    owner = torch.repeat_interleave(at, sizes)
    begin = sizes.cumsum(0) - sizes
    place = torch.arange(len(owner), device=first.device) - begin[owner] + first[owner]
    return place, owner
