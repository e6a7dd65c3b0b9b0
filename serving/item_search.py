"""Finds items by words of their title, for people who look for one to try."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from genrec.filters import check_names
from genrec.serving.export import Export


class ItemSearch:
    """Items whose title, categories or id hold every word of a query, the most popular first.

    Example:
        Titles "red lamp" and "blue lamp" with 2 and 5 training events: "lamp" finds rows 1, 0 and "LAMP red" row 0.
    """

    def __init__(self, export: Export) -> None:
        self._catalogue = export.catalogue
        self._order = np.argsort(-export.popularity, kind="stable").tolist()

    @cached_property
    def _texts(self) -> list[str]:
        columns = zip(self._catalogue.titles, self._catalogue.categories, self._catalogue.item_ids, strict=True)
        return [" ".join([title, *categories, item_id]).casefold() for title, categories, item_id in columns]

    def find(self, query: str, category: str | None, limit: int) -> list[int]:
        """Catalogue rows, at most `limit`; all items match an empty query.

        Raises:
            DataError: no such category.
        """
        check_names("category", () if category is None else (category,), self._catalogue.rows_of_category)
        inside = None if category is None else set(self._catalogue.rows_of_category[category].tolist())
        words = query.casefold().split()
        found: list[int] = []
        for row in self._order:
            if (inside is None or row in inside) and all(word in self._texts[row] for word in words):
                found.append(row)
                if len(found) == limit:
                    break
        return found
