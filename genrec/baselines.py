"""Fair simple rivals, tuned on validation: popularity, Markov counts, item neighbours and content neighbours."""

from __future__ import annotations

import itertools
import logging
from typing import ClassVar, Protocol

import numpy as np
from scipy import sparse

from genrec.cooccurrence import users_in_common
from genrec.errors import ConfigError
from genrec.evaluate import top_items
from genrec.metrics import per_user
from genrec.splits import Cases

log = logging.getLogger(__name__)
LAGS = 3


class Ranker(Protocol):
    """What every baseline offers once it is fitted."""

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Score every item as each history's next one: B int32 histories -> float32 [B, N]."""
        ...


def rank(
    ranker: Ranker,
    cases: Cases,
    *,
    exclude_seen: bool,
    allowed: np.ndarray | None = None,
    k: int = 50,
    batch_size: int = 512,
) -> np.ndarray:
    """Best items per case, scored in batches so that [B, N] stays small.

    Args:
        ranker: a fitted baseline.
        cases: U cases.
        exclude_seen: leave out what the user had.
        allowed: bool [N]; None allows every item.
        k: list length.
        batch_size: histories scored at once, B.

    Returns:
        int32 [U, k], -1 pads.
    """
    parts = []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        parts.append(top_items(ranker.scores(batch.histories), batch.seen if exclude_seen else None, k, allowed))
    return np.concatenate(parts) if parts else np.zeros((0, k), dtype=np.int32)


def ndcg10(ranker: Ranker, cases: Cases, exclude_seen: bool) -> float:
    """Mean ndcg@10 of a ranker over cases, in 0..1: what every baseline is tuned on."""
    top = rank(ranker, cases, exclude_seen=exclude_seen, k=10)
    return float(per_user(top, cases.targets, ks=(10,))["ndcg@10"].mean())


def item_counts(train: list[np.ndarray], n_items: int) -> np.ndarray:
    """Training events per item, int64 [N].

    Raises:
        ConfigError: an item row lies outside the catalogue.
    """
    events = np.concatenate([np.zeros(0, dtype=np.int64), *train])
    if len(events) and (events.min() < 0 or events.max() >= n_items):
        raise ConfigError(
            f"training items span {events.min()}..{events.max()}, the catalogue has rows 0..{n_items - 1}; "
            "fit on the catalogue that the split was made from"
        )
    return np.bincount(events, minlength=n_items)


class Popularity:
    """Every user gets the items with the most training events."""

    def fit(self, train: list[np.ndarray], n_items: int) -> None:
        """Count; train holds int32 histories."""
        self.counts = item_counts(train, n_items).astype(np.float32)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Training counts for every history, float32 [B, N]."""
        return np.repeat(self.counts[None], len(histories), axis=0)


class Markov:
    """Transition counts from each of the last three events, smoothed towards popularity.

    With ``c_s(i, j)`` the times j came s steps after i, and ``p`` the popularity (sums to 1)::

        score(j) = sum_s decay^(s - 1) * (c_s(i_s, j) + backoff * p(j)) / (c_s(i_s) + backoff)

    where ``i_s`` is the event s steps back; a missing or unknown one leaves popularity. This is a first-order
    chain per lag with a Dirichlet prior (MacKay and Peto, 1995), decay 0 being the plain Markov chain.
    """

    grid: ClassVar = {"decay": (0.0, 0.25, 0.5, 1.0), "backoff": (0.5, 3.0, 20.0)}

    def __init__(self, decay: float = 0.25, backoff: float = 3.0, repeats: bool = True) -> None:
        """`repeats`: whether items of the history may come back; without, they score -inf."""
        self.decay, self.backoff, self.repeats = decay, backoff, repeats

    def fit(self, train: list[np.ndarray], n_items: int) -> None:
        """Count the transitions at each lag; train holds int32 histories, oldest event first."""
        counts = item_counts(train, n_items)
        self.popularity = (counts / max(1, counts.sum())).astype(np.float32)
        self.transitions: list[sparse.csr_matrix] = []
        self.totals: list[np.ndarray] = []
        for lag in range(1, LAGS + 1):
            long = [h for h in train if len(h) > lag]
            source = np.concatenate([np.zeros(0, dtype=np.int32), *(h[:-lag] for h in long)])
            target = np.concatenate([np.zeros(0, dtype=np.int32), *(h[lag:] for h in long)])
            ones = np.ones(len(source), dtype=np.float32)
            self.transitions.append(sparse.csr_matrix((ones, (source, target)), shape=(n_items, n_items)))
            self.totals.append(np.bincount(source, minlength=n_items).astype(np.float32))

    def tune(self, valid: Cases, exclude_seen: bool = True) -> dict[str, float]:
        """Choose decay, back-off and repeats on validation's ndcg@10; returns the choice and its ``ndcg@10``."""
        return _tune(self, self.grid, valid, exclude_seen)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """The smoothed chain's score, float32 [B, N]."""
        total = np.zeros((len(histories), len(self.popularity)), dtype=np.float32)
        for lag in range(1, LAGS + 1):
            weight = self.decay ** (lag - 1)
            if weight == 0:
                break
            known = np.array([len(h) >= lag for h in histories], dtype=bool)
            last = np.array([h[-lag] if len(h) >= lag else 0 for h in histories], dtype=np.int64)
            # [B, N]; a history that is too short keeps the prior alone
            counts = self.transitions[lag - 1][last].toarray() * known[:, None]
            seen = self.totals[lag - 1][last] * known
            total += weight * (counts + self.backoff * self.popularity) / (seen + self.backoff)[:, None]
        return total if self.repeats else _without(total, histories)


class ItemKNN:
    """Item-to-item cosine over binary user columns (Sarwar et al., 2001), shrunk and with a recency decay.

    ``similarity(i, j) = both(i, j) / (sqrt(users(i) * users(j)) + shrinkage)``; an event s steps back weighs
    ``decay ** s``. A trace of popularity orders the items that no neighbour reaches.
    """

    grid: ClassVar = {"decay": (1.0, 0.8, 0.5, 0.2), "shrinkage": (0.0, 5.0, 20.0)}
    tie_break = 1e-6

    def __init__(self, decay: float = 0.8, shrinkage: float = 5.0, repeats: bool = True) -> None:
        """`repeats`: whether items of the history may come back; without, they score -inf."""
        self.decay, self.shrinkage, self.repeats = decay, shrinkage, repeats

    def fit(self, train: list[np.ndarray], n_items: int) -> None:
        """Count the users that any two items share; train holds int32 histories."""
        counts = item_counts(train, n_items)
        self.popularity = (counts / max(1, counts.max(initial=0))).astype(np.float32)
        both = users_in_common(train, n_items).tocoo()
        self.takers = both.diagonal()
        apart = both.row != both.col
        self.rows, self.columns, self.both = both.row[apart], both.col[apart], both.data[apart]
        self._refresh()

    def _refresh(self) -> None:
        cosine = self.both / (np.sqrt(self.takers[self.rows] * self.takers[self.columns]) + self.shrinkage)
        shape = (len(self.takers), len(self.takers))
        self.similarity = sparse.csr_matrix((cosine.astype(np.float32), (self.rows, self.columns)), shape)
        self.fitted_shrinkage = self.shrinkage

    def tune(self, valid: Cases, exclude_seen: bool = True) -> dict[str, float]:
        """Choose decay, shrinkage and repeats on validation's ndcg@10; returns the choice and its ``ndcg@10``."""
        return _tune(self, self.grid, valid, exclude_seen)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Summed similarity to the history, float32 [B, N]."""
        if self.fitted_shrinkage != self.shrinkage:
            self._refresh()
        users, items, steps = _events(histories)
        weights = (self.decay**steps).astype(np.float32)
        shape = (len(histories), len(self.takers))
        profile = sparse.csr_matrix((weights, (users, items)), shape)
        total = (profile @ self.similarity).toarray() + self.tie_break * self.popularity
        return total if self.repeats else _without(total, histories)


class ContentKNN:
    """Cosine of every item's features to the mean of the history's, old events fading; it reaches items never taken.

    The features are `genrec.adapters.profile.content_keys`, standardised per modality; modalities count alike.
    """

    grid: ClassVar[Grid] = {"decay": (1.0, 0.9, 0.7, 0.4)}

    def __init__(self, decay: float = 0.9, repeats: bool = True) -> None:
        """`repeats`: whether items of the history may come back; without, they score -inf."""
        self.decay, self.repeats = decay, repeats

    def fit(self, keys: list[np.ndarray]) -> None:
        """Keep the keys, float32 [N, E_m] per modality, rows of length 1 or 0."""
        self.keys = keys

    def tune(self, valid: Cases, exclude_seen: bool = True) -> dict[str, float]:
        """Choose decay and repeats on validation's ndcg@10; returns the choice and its ``ndcg@10``."""
        return _tune(self, self.grid, valid, exclude_seen)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Sum over modalities of cosines, float32 [B, N]."""
        users, items, steps = _events(histories)
        weights = (self.decay**steps).astype(np.float32)
        profile = sparse.csr_matrix((weights, (users, items)), (len(histories), len(self.keys[0])))
        total = np.zeros(profile.shape, np.float32)
        for keys in self.keys:
            means = profile @ keys
            length = np.linalg.norm(means, axis=1, keepdims=True)
            total += np.divide(means, length, out=np.zeros_like(means), where=length > 0) @ keys.T
        return total if self.repeats else _without(total, histories)


def _events(histories: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All events of B histories: the history, the item and the steps back from its history's end, [H] each."""
    users = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    items = np.concatenate([np.zeros(0, dtype=np.int32), *histories])
    steps = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(len(h))[::-1] for h in histories)])
    return users, items, steps


def _without(scores: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
    """Scores [B, N] with -inf at every history's own items, in place."""
    for row, history in zip(scores, histories, strict=True):
        row[history] = -np.inf
    return scores


Grid = dict[str, tuple[float, ...]]


def _tune(ranker: Markov | ItemKNN | ContentKNN, grid: Grid, valid: Cases, seen: bool) -> dict[str, float]:
    results = []
    grid = grid if seen else grid | {"repeats": (True, False)}  # an evaluation that leaves them out asks nothing
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        vars(ranker).update(setting)
        results.append((ndcg10(ranker, valid, seen), setting))
    best, setting = max(results, key=lambda result: result[0])
    vars(ranker).update(setting)
    log.info("%s: %s, validation ndcg@10 %.4f", type(ranker).__name__, setting, best)
    return setting | {"ndcg@10": best}
