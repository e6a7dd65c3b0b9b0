"""Most popular items, for when the engine is late or down: the same filters, no model."""

from __future__ import annotations

import numpy as np

from genrec.filters import check_names, item_bitmap
from genrec.serving.engine import RankedItem, RecommendRequest
from genrec.serving.export import Export
from genrec.serving.resolve import item_rows


class Popularity:
    """Ranks a catalogue by training events.

    Example:
        Counts of 3, 0 and 1 over N = 3 items score ln(4/7), ln(1/7) and ln(2/7): the log-probability of each item
        with one event added everywhere.
    """

    def __init__(self, export: Export) -> None:
        self._catalogue = export.catalogue
        counts = export.popularity.astype(np.float64) + 1
        self._scores = np.log(counts / counts.sum())  # [N]
        self._order = np.argsort(-self._scores, kind="stable")

    def check(self, request: RecommendRequest) -> None:
        """Refuse what every engine would refuse, before it waits for one; quick, whatever was sent.

        Raises:
            DataError: unknown item ids or categories.
        """
        item_rows(self._catalogue, request.history)
        item_rows(self._catalogue, request.allow or [])
        check_names("categories", request.categories or (), self._catalogue.rows_of_category)

    def recommend(self, request: RecommendRequest) -> list[RankedItem]:
        """The most popular items that the request allows, at most `k`.

        Raises:
            DataError: unknown item ids or categories.
        """
        legal = self._order[self._allowed(request)[self._order]][: request.k]
        ids = self._catalogue.item_ids
        return [RankedItem(ids[row], float(self._scores[row]), rank) for rank, row in enumerate(legal, start=1)]

    def _allowed(self, request: RecommendRequest) -> np.ndarray:
        """bool [N]."""
        return item_bitmap(
            self._catalogue,
            seen=item_rows(self._catalogue, request.history) if request.exclude_seen else [],
            categories=request.categories,
            price_min=request.price_min,
            price_max=request.price_max,
            allow=request.allow,
            deny=request.deny,
        )
