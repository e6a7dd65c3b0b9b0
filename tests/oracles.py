"""Slow, plain versions of what the code does fast."""

import numpy as np
import torch
from torch import Tensor


def codes_after(codes: np.ndarray, prefix: list[int]) -> list[int]:
    """The codes that follow a prefix in the catalogue's ids [N, L], sorted."""
    level = len(prefix)
    return sorted({int(row[level]) for row in codes if row[:level].tolist() == list(prefix)})


def trie_log_softmax(logits: Tensor, codes: np.ndarray, level: int) -> Tensor:
    """Row i of logits [N, C] normalised over the codes that follow item i's own prefix; -inf elsewhere."""
    out = torch.full_like(logits, -torch.inf)
    for row, own in enumerate(codes):
        known = codes_after(codes, own[:level].tolist())
        out[row, known] = logits[row, known].log_softmax(-1)
    return out
