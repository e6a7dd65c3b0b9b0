"""Built-in text features, no download: hashed TF-IDF of words and word pairs, then truncated SVD (LSA).

Deerwester et al., "Indexing by Latent Semantic Analysis" (1990).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.features import Features
from genrec.encoders.hashed_words import BUCKETS, count_words, weigh_words

log = logging.getLogger(__name__)
_LONGEST = 2  # words of a run that counts like a word


def encode_text_builtin(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Unit vectors float32 [N, 1, settings.dim], fitted on this catalogue; narrower when that is too small.

    Items without a word are absent. Nothing is cached: the fit needs all items and takes seconds.
    """
    counts = count_words(catalogue.texts(), _LONGEST)
    present = np.diff(counts.indptr) > 0
    in_items = np.bincount(counts.indices, minlength=BUCKETS)
    shared = in_items > 1  # what only one item says tells nothing about which items are alike
    buckets = np.flatnonzero(shared if shared.sum() > 1 else in_items > 0)
    tfidf = TfidfTransformer(sublinear_tf=True)
    weights = tfidf.fit_transform(counts[:, buckets])
    fitted = {"buckets": buckets, "idf": tfidf.idf_}
    dim = min(settings.dim, min(weights.shape) - 1)
    if dim < 1:  # one item, or one word: nothing to factorise
        values = weights.toarray()
    else:
        svd = TruncatedSVD(dim, random_state=0)
        values = svd.fit_transform(weights)
        fitted["axes"] = np.ascontiguousarray(svd.components_)  # safetensors writes bytes as they lie
    if values.shape[1] < settings.dim:
        log.warning(
            "built-in text features are %d wide, not %d: %d items share %d words and pairs",
            *(values.shape[1], settings.dim, *weights.shape),
        )
    values = normalize(values).astype(np.float32)
    return Features(values[:, None, :], present, fitted)


def encode_text_fitted(texts: list[str], fitted: dict[str, np.ndarray]) -> Features:
    """The same features of later items, by what the fit on another catalogue left in `Features.fitted`.

    A text whose words that catalogue did not share has a vector of zeros, as there.
    """
    counts = count_words(texts, _LONGEST)
    weights = normalize(weigh_words(counts[:, fitted["buckets"]], fitted["idf"]))
    values = weights @ fitted["axes"].T if "axes" in fitted else weights.toarray()
    return Features(normalize(values).astype(np.float32)[:, None], np.diff(counts.indptr) > 0)
