"""Who took both: how many users any two items share, in any order or one soon after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def users_in_common(histories: Sequence[np.ndarray], n_items: int) -> sparse.csr_matrix:
    """Users that took both items, each user counted once.

    Args:
        histories: int32 catalogue rows, one array per user.
        n_items: N.

    Returns:
        float32 [N, N], sorted columns; the diagonal holds the users of each item.
    """
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate([np.empty(0, np.int64), *histories]).astype(np.int64)
    taken = sparse.csr_matrix((np.ones(len(items), np.float32), (users, items)), (len(histories), n_items))
    taken.data[:] = 1  # duplicates were summed on conversion
    both = (taken.T @ taken).tocsr()
    both.sort_indices()
    return both


def users_in_turn(histories: Sequence[np.ndarray], n_items: int, within: int) -> sparse.csr_matrix:
    """Users that took the column's item at most `within` events after the row's, each user counted once per pair.

    Args:
        histories: int32 catalogue rows in time order, one array per user.
        n_items: N.
        within: 1 is the very next event.

    Returns:
        float32 [N, N], sorted columns.
    """
    keys = [np.empty(0, np.int64)]
    for history in histories:
        wide = np.asarray(history, np.int64)
        pairs = [wide[:-lag] * n_items + wide[lag:] for lag in range(1, min(within, len(wide) - 1) + 1)]
        keys.append(np.unique(np.concatenate([np.empty(0, np.int64), *pairs])))
    key, users = np.unique(np.concatenate(keys), return_counts=True)
    counts = sparse.csr_matrix((users.astype(np.float32), (key // n_items, key % n_items)), (n_items, n_items))
    counts.sort_indices()
    return counts
