"""How near a text is to one that a person wrote: ROUGE and BERTScore, all as F1 in 0..1."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.faithful import words


def rouge_n(text: str, reference: str, n: int) -> float:
    """ROUGE-N (Lin 2004): F1 of the two texts' n-grams of words, each counted as often as both have it.

    Example, n = 1: "a red lamp" and "a lamp" share two words of three and two: 2 * 2 / (3 + 2) = .8.
    """
    one, two = (Counter(zip(*(of[i:] for i in range(n)), strict=False)) for of in (words(text), words(reference)))
    return _f1((one & two).total(), one.total(), two.total())


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words.

    Example: "a red lamp" and "a lamp, red" have "a lamp" (or "a red") in common: 2 * 2 / (3 + 3).
    """
    one, two = words(text), words(reference)
    longest = [0] * (len(two) + 1)  # of the words of `text` so far and each beginning of `reference`
    for word in one:
        before = longest
        longest = [0]
        for (above, right), other in zip(itertools.pairwise(before), two, strict=True):
            longest.append(above + 1 if word == other else max(right, longest[-1]))
    return _f1(longest[-1], len(one), len(two))


def _f1(shared: int, one: int, two: int) -> float:
    return 2 * shared / (one + two) if shared else 0.0


def greedy_f1(text: Tensor, reference: Tensor) -> float:
    """BERTScore's F1 (Zhang et al. 2020, equation 1): every token's best cosine in the other text.

    No inverse document frequencies, no rescaling.

    Args:
        text: float [n, D] contextual embeddings of its tokens.
        reference: float [m, D].
    """
    if not len(text) or not len(reference):
        return 0.0
    cosine = F.normalize(text, dim=-1) @ F.normalize(reference, dim=-1).T  # [n, m]
    precision, recall = cosine.max(1).values.mean(), cosine.max(0).values.mean()
    total = (precision + recall).item()
    return 2 * (precision * recall).item() / total if total > 0 else 0.0


@torch.inference_mode()
def bert_score(lm: Any, token_ids: Sequence[tuple[list[int], list[int]]], start: int) -> np.ndarray:
    """`greedy_f1` of pairs of texts under a causal language model's last hidden states: float64 [n].

    A token of a causal model has seen what stands before it only, so the scores compare texts under one model, not with
    published ones.

    Args:
        lm: transformers causal LM.
        token_ids: for each pair the tokens of the text and of the reference.
        start: the token that both begin with; it is not compared.
    """

    def embedded(ids: list[int]) -> Tensor:
        read = torch.tensor([[start, *ids]], device=lm.device)
        states: Tensor = lm.get_decoder()(input_ids=read).last_hidden_state[0, 1:].float()
        return states

    return np.array([greedy_f1(embedded(text), embedded(reference)) for text, reference in token_ids])
