"""Item features judged before any recommender is trained on them (AlignRec's three protocols, arXiv:2403.12384).

Zero-shot: a user is the mean of the history's features, items are ranked by cosine. Item-CF: likeness of features
takes the place of likeness of takers in item-based collaborative filtering. Mask-modality: the first again, with
features made without one modality. Beside them alignment and uniformity (Wang and Isola 2020, arXiv:2005.10242).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from genrec.baselines import ContentKNN, ItemKNN, rank
from genrec.metrics import per_user
from genrec.splits import Cases, Split

NEIGHBOURS = 10
PAIRS = 20_000  # for the two means over pairs


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, or 0 where they were: float [N, D] -> float32 [N, D]."""
    return normalize(vectors).astype(np.float32)


def zero_shot(vectors: np.ndarray, cases: Cases, *, exclude_seen: bool) -> np.ndarray:
    """N@10 of every case, items ranked by cosine to the mean of the history: vectors [N, D] -> float64 [n]."""
    ranker = ContentKNN(decay=1.0)
    ranker.fit([unit(vectors)])
    top = rank(ranker, cases, exclude_seen=exclude_seen)
    return per_user(top, cases.targets)["ndcg@10"]


def nearest(likeness: np.ndarray) -> sparse.csr_matrix:
    """Every item's NEIGHBOURS likest others: likeness [N, N] -> their values, sparse float32 [N, N]."""
    likeness = likeness.copy()
    np.fill_diagonal(likeness, -np.inf)
    columns = np.argpartition(-likeness, NEIGHBOURS - 1, 1)[:, :NEIGHBOURS]
    rows = np.repeat(np.arange(len(likeness)), NEIGHBOURS)
    values = likeness[rows, columns.ravel()].astype(np.float32)
    return sparse.csr_matrix((values, (rows, columns.ravel())), likeness.shape)


class NeighbourSum:
    """Item-based filtering with given neighbours: the sum of their likeness to the history's items."""

    def __init__(self, neighbours: sparse.csr_matrix):
        self.neighbours = neighbours

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """B int32 histories -> float32 [B, N]."""
        users = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
        events = np.concatenate([np.zeros(0, np.int32), *histories])
        shape = (len(histories), self.neighbours.shape[0])
        taken = sparse.csr_matrix((np.ones(len(events), np.float32), (users, events)), shape)
        return (taken @ self.neighbours).toarray()


def item_cf(vectors: np.ndarray, split: Split, *, exclude_seen: bool) -> tuple[np.ndarray, float]:
    """Item-CF by features.

    Args:
        vectors: [N, D].
        split: its training histories say which items have takers in common.
        exclude_seen: leave out what the user had.

    Returns:
        N@10 of every test case, float64 [n]; and the share of neighbours that are also neighbours by takers, over items
        that have at least NEIGHBOURS of the latter.
    """
    directions = unit(vectors)
    by_features = nearest(directions @ directions.T)
    knn = ItemKNN()
    knn.fit(split.train, len(vectors))
    by_takers = knn.similarity.toarray()
    known = (by_takers > 0).sum(1) >= NEIGHBOURS
    both = (by_features[known] != 0).multiply(nearest(by_takers)[known] > 0).sum(1)
    top = rank(NeighbourSum(by_features), split.test, exclude_seen=exclude_seen)
    return per_user(top, split.test.targets)["ndcg@10"], float(both.mean() / NEIGHBOURS)


def alignment_uniformity(vectors: np.ndarray, train: list[np.ndarray], seed: int) -> tuple[float, float]:
    """How near items lie that follow each other, and how evenly all items are spread; lower is better for both.

    Args:
        vectors: [N, D].
        train: int32 histories.
        seed: of the pairs.

    Returns:
        mean squared distance of successive events, 0 to 4; log of the mean of ``exp(-2 d^2)`` over random pairs, 0 to
        -8.
    """
    rng, directions = np.random.default_rng(seed), unit(vectors)
    follow = np.array([pair for history in train for pair in pairwise(history)])
    follow = follow[rng.permutation(len(follow))[:PAIRS]]
    any_two = rng.integers(len(vectors), size=(PAIRS, 2))
    any_two = any_two[any_two[:, 0] != any_two[:, 1]]
    apart = [np.square(directions[pairs[:, 0]] - directions[pairs[:, 1]]).sum(1) for pairs in (follow, any_two)]
    return float(apart[0].mean()), float(np.log(np.exp(-2 * apart[1]).mean()))
