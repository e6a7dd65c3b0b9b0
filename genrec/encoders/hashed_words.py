"""Words by their hashes: counts and TF-IDF weights of texts without a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

BUCKETS = 2**18  # 12,000 items with 20 words each collide on a few per cent of their word pairs


def count_words(texts: Sequence[str], longest: int) -> sparse.csr_matrix:
    """Words, and runs of up to `longest` words, per text: [N, BUCKETS]."""
    return HashingVectorizer(
        n_features=BUCKETS, ngram_range=(1, longest), token_pattern=r"(?u)\b\w+\b", alternate_sign=False, norm=None
    ).transform(texts)


def weigh_words(counts: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    """Counts [N, B] and idf [B] -> (1 + log count) * idf, rows not yet of length 1."""
    weights = counts.astype(np.float64)
    weights.data = (np.log(weights.data) + 1) * idf[weights.indices]
    return weights
