"""Word keys: one unit vector per item, in which cosines count the words that two texts share, rare ones most.

A sentence encoder's vectors say what an item is about and blur which brand, model or size it is, and those are what a
user who comes back asks for. TF-IDF keeps them; folded into `WIDTH` values with signs (feature hashing: Weinberger et
al. 2009, "Feature hashing for large scale multitask learning") its cosines stay what they are up to 1 / sqrt(WIDTH),
and a later item needs no vocabulary. An SVD of that width would blur the rare words again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from torch import Tensor

from genrec.encoders.hashed_words import BUCKETS, count_words, weigh_words

WIDTH = 256
WORDS = "words"  # what the mixer calls these keys, beside a modality's


class WordSpace:
    """How much each word says. It stays as it was fitted: a later item gets its key and touches no other's."""

    def __init__(self, idf: np.ndarray):
        """idf: float32 [BUCKETS], 0 of words that no fitted text holds."""
        self.idf = idf

    @classmethod
    def fit(cls, texts: Sequence[str], fit_on: np.ndarray) -> WordSpace:
        """Count in how many texts each word is.

        Args:
            texts: N texts.
            fit_on: bool [N], those that training may look at; at least one.
        """
        counts = count_words([texts[row] for row in np.flatnonzero(fit_on)], longest=1)
        idf = TfidfTransformer(sublinear_tf=True).fit(counts).idf_
        return cls(np.where(np.bincount(counts.indices, minlength=BUCKETS) > 0, idf, 0.0).astype(np.float32))

    def keys(self, texts: Sequence[str]) -> Tensor:
        """Any N texts -> float32 [N, WIDTH] of unit rows; zeros where a text has no word that was fitted."""
        words = weigh_words(count_words(texts, longest=1), self.idf)
        signs, columns = 1 - 2 * (words.indices // WIDTH % 2), words.indices % WIDTH
        folded = sparse.csr_matrix((words.data * signs, columns, words.indptr), (len(texts), WIDTH))
        return torch.from_numpy(normalize(folded.toarray()).astype(np.float32))  # toarray adds what shares a column
