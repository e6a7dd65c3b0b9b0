"""Who took both: how many users any two items share."""

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
