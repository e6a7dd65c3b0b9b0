"""One id means one item: items that share an id move to the nearest free one, as few of them as possible.

The number of levels stays what it is (TIGER, Rajput et al. 2023, appends one more code instead). Two steps:

1. Per prefix of ``L - 1`` codes, the contested and the free last codes are dealt out at once by an optimal
   assignment that first keeps as many items as possible where they are, then adds the least quantisation
error. 2. Items whose prefix is full leave it: a residual beam finds the nearest free id under their deepest
   prefix that has one.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from scipy.optimize import linear_sum_assignment

from genrec.errors import ConfigError

CHUNK = 256  # items dealt out at once; an assignment's cost grows with its cube
BEAM = 32


def check_capacity(n_items: int, n_levels: int, n_codes: int) -> None:
    """Refuse more items than there are ids.

    Raises:
        ConfigError: ``C ** L`` is less than `n_items`.
    """
    if n_codes**n_levels < n_items:
        raise ConfigError(
            f"{n_items} items need an id each, but {n_levels} levels of {n_codes} codes make only "
            f"{n_codes**n_levels}; raise semantic_ids.levels or semantic_ids.codes"
        )


def resolve(vectors: np.ndarray, codebooks: np.ndarray, codes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Give every item an id of its own.

    Args:
        vectors: float32 [N, d], what the codebooks code.
        codebooks: float32 [L, C, d].
        codes: int32 [N, L], each item's nearest codes.
        taken: int32 [M, L], distinct ids that other items already hold.

    Returns:
        int32 [N, L], distinct, none of them taken; an item alone on a free id keeps it.

    Raises:
        ConfigError: fewer than ``N + M`` ids exist.
    """
    n_levels, n_codes, _ = codebooks.shape
    check_capacity(len(codes) + len(taken), n_levels, n_codes)
    ids = np.concatenate([taken, codes]).astype(np.int64)
    prefix, place = _ranks(ids, n_codes)  # [M + N] each: rank of the first L - 1 codes, of the whole id
    is_new = np.arange(len(ids)) >= len(taken)
    contested = (np.bincount(place)[place] > 1) & is_new
    if not contested.any():
        return codes.copy()
    out = ids.copy()
    left: list[int] = []
    rows = np.flatnonzero(np.isin(prefix, prefix[contested]))
    rows = rows[np.argsort(prefix[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(prefix[rows])) + 1):
        free = np.ones(n_codes, bool)
        free[ids[group[~contested[group]], -1]] = False
        movers = group[contested[group]]
        rest = vectors[movers - len(taken)] - _decode(codebooks[:-1], ids[movers[0], :-1])
        cost = _squared_distances(rest, codebooks[-1])
        for start in range(0, len(movers), CHUNK):
            part = slice(start, start + CHUNK)
            last = _deal(cost[part], ids[movers[part], -1], free)
            out[movers[part], -1] = last
            left.extend(movers[part][last < 0])
            free[last[last >= 0]] = False
    if left:
        whole = np.ones(len(ids), bool)
        whole[left] = False
        free_ids = _FreeIds(out[whole], codebooks)
        for row in left:
            out[row] = free_ids.take_nearest(vectors[row - len(taken)], ids[row])
    return out[len(taken) :].astype(np.int32)


def _ranks(ids: np.ndarray, n_codes: int) -> tuple[np.ndarray, np.ndarray]:
    rank = np.zeros(len(ids), np.int64)
    for code in ids.T:
        prefix = rank
        rank = np.unique(prefix * n_codes + code, return_inverse=True)[1]
    return prefix, rank


def _decode(codebooks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return codebooks[np.arange(len(codes)), codes].sum(0)


def _squared_distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """float [n, d], [C, d] -> float64 [n, C]."""
    a, b = vectors.astype(np.float64), codebook.astype(np.float64)
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0)


def _deal(cost: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Last codes int64 [n], -1 where none is left. cost: float64 [n, C]; own: int64 [n]; free: bool [C]."""
    columns = np.flatnonzero(free)
    last = np.full(len(cost), -1, np.int64)
    if len(columns):
        weighted = cost[:, columns] / (cost.max() + 1e-30)  # all within 1, so one move outweighs every error
        weighted += (columns != own[:, None]) * (len(cost) + 1.0)
        items, picks = linear_sum_assignment(weighted)
        last[items] = columns[picks]
    return last


class _FreeIds:
    """The ids nobody holds, kept as closed children per prefix. A prefix closes with its last child."""

    def __init__(self, held: np.ndarray, codebooks: np.ndarray) -> None:
        self._codebooks = codebooks.astype(np.float64)
        self._n_levels, self._n_codes, _ = codebooks.shape
        self._closed: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for one in held.tolist():
            self._close(tuple(one))

    def _close(self, one: tuple[int, ...]) -> None:
        for level in reversed(range(self._n_levels)):
            closed = self._closed[one[:level]]
            closed.add(one[level])
            if len(closed) < self._n_codes:
                return

    def take_nearest(self, vector: np.ndarray, own: np.ndarray) -> tuple[int, ...]:
        """Close and return the nearest free id under the deepest prefix of `own` that has one."""
        best = tuple(own[:-1].tolist())
        while len(self._closed[best]) == self._n_codes:
            best = best[:-1]
        beams = [best]
        rests = (vector - _decode(self._codebooks[: len(best)], np.array(best, np.int64)))[None]  # [beams, d]
        for level in range(len(best), self._n_levels):
            errors = _squared_distances(rests, self._codebooks[level])  # [beams, C]
            for error, beam in zip(errors, beams, strict=True):
                error[list(self._closed[beam])] = np.inf
            order = np.argsort(errors, axis=None, kind="stable")[:BEAM]
            order = order[np.isfinite(errors.flat[order])]
            parents, codes = np.divmod(order, self._n_codes)
            rests = rests[parents] - self._codebooks[level][codes]
            beams = [(*beams[parent], code) for parent, code in zip(parents, codes.tolist(), strict=True)]
        self._close(beams[0])
        return beams[0]
