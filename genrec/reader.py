"""A reader who has only the text: for which of some users was it written?

The reader knows what a perfect writer would have written about the item for each of them, and takes the nearest; a text
that is the same for everyone tells nothing, so its reader is right as often as chance.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from genrec.faithful import words

CANDIDATES = 20


def overlap(a: str, b: str) -> float:
    """F1 of the two texts' word pairs, in 0..1; begin and end count as words."""
    one, two = (Counter(itertools.pairwise(of)) for of in (["", *words(a), ""], ["", *words(b), ""]))
    return 2 * (one & two).total() / (one.total() + two.total())


def chance_of_right(text: str, references: Sequence[str], truth: int) -> float:
    """The chance that the reader names the right user; equally near users share it.

    Args:
        text: what the reader has.
        references: what a perfect writer would have written for each candidate.
        truth: the candidate it was written for.
    """
    near = np.array([overlap(text, reference) for reference in references])
    best = near >= near.max() - 1e-12
    return float(best[truth] / best.sum())
