"""k-means and residual k-means: faiss does the iterations, this file the seeding and the empty clusters.

A *residual quantiser* is a stack of codebooks, float32 [L, C, d]: level 0 codes the vector, every further
level what the levels before left over (Zeghidour et al. 2021, SoundStream, algorithm 1).
"""

from __future__ import annotations

import logging

import faiss
import numpy as np
from sklearn.cluster import kmeans_plusplus

log = logging.getLogger(__name__)
ITERATIONS = 25
MOST_POINTS = 1024  # faiss trains on a sample of at most this many vectors per code
SEED_POINTS = 64  # k-means++ sees at most this many vectors per code
SEEDED_CODES = 1024  # beyond this many codes, where k-means++ takes minutes, the first codes are random vectors
RESEEDS = 5
SPLIT = 1e-3  # distance between copies of one code, against the vectors' own spread


def assign(vectors: np.ndarray, codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest code per level.

    Args:
        vectors: float32 [N, d].
        codebooks: float32 [L, C, d].

    Returns:
        codes int32 [N, L], and what all levels together leave over, float32 [N, d].
    """
    codes = np.empty((len(vectors), len(codebooks)), np.int32)
    rest = np.array(vectors, np.float32)
    if len(rest):
        for level, codebook in enumerate(codebooks):
            codes[:, level] = faiss.knn(rest, np.ascontiguousarray(codebook), 1)[1][:, 0]
            rest -= codebook[codes[:, level]]
    return codes, rest


def kmeans(vectors: np.ndarray, n_codes: int, seed: int) -> np.ndarray:
    """Lloyd from k-means++ (Arthur & Vassilvitskii 2007); empty clusters move to the farthest vectors.

    Args:
        vectors: float32 [N, d]. With N < n_codes each vector is its own code and the rest are near copies, so
            that items which collide still find codes beside their own.
        n_codes: C.
        seed: the result follows from it.

    Returns:
        float32 [C, d].
    """
    rng = np.random.default_rng(seed)
    vectors = np.ascontiguousarray(vectors, np.float32)
    n_vectors, width = vectors.shape
    if n_vectors < n_codes:
        log.warning("%d items for %d codes: a level keeps %d distinct codes", n_vectors, n_codes, n_vectors)
        copies = vectors[np.arange(n_codes) % n_vectors]
        copies[n_vectors:] += rng.normal(0, SPLIT * _spread(vectors), copies[n_vectors:].shape)
        return copies
    centres = _seed_centres(vectors, n_codes, rng)
    for _ in range(RESEEDS):
        run = faiss.Kmeans(
            width,
            n_codes,
            niter=ITERATIONS,
            seed=seed % (1 << 31),
            min_points_per_centroid=1,
            max_points_per_centroid=MOST_POINTS,
        )
        run.train(vectors, init_centroids=centres)
        centres = np.array(run.centroids)
        error, nearest = run.assign(vectors)
        empty = np.flatnonzero(np.bincount(nearest, minlength=n_codes) == 0)
        far = np.argsort(-error, kind="stable")[: len(empty)]
        if not len(empty) or error[far[0]] <= (SPLIT * _spread(vectors)) ** 2:
            break
        centres[empty] = vectors[far]
    return centres


def residual_kmeans(vectors: np.ndarray, *, levels: int, codes: int, seed: int) -> np.ndarray:
    """One k-means per level on what the levels before left over: float32 [N, d] -> codebooks [L, C, d]."""
    codebooks: list[np.ndarray] = []
    rest = vectors
    for level in range(levels):
        codebooks.append(kmeans(rest, codes, seed + level))
        rest = assign(rest, codebooks[-1][None])[1]
    return np.stack(codebooks)


def _spread(vectors: np.ndarray) -> float:
    return float(vectors.std(0).mean()) or 1.0


def _seed_centres(vectors: np.ndarray, n_codes: int, rng: np.random.Generator) -> np.ndarray:
    if n_codes > SEEDED_CODES:
        return vectors[rng.choice(len(vectors), n_codes, replace=False)]
    sample = vectors[rng.permutation(len(vectors))[: SEED_POINTS * n_codes]]
    return kmeans_plusplus(sample, n_codes, random_state=int(rng.integers(1 << 31)))[0]
