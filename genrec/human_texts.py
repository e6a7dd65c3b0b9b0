"""Texts about items that people wrote: a user's own reviews from the log, and copy from the catalogue.

Optional columns (`copy` of the items, `review` of the log). A description's target is the user's own review of the item
where there is one, else the item's copy, else what the grammar of `genrec.writer` says.
"""

from __future__ import annotations

import numpy as np

from genrec.catalog import Catalogue
from genrec.interactions import Log

MAX_CHARS = 300


class HumanTexts:
    """What people wrote about a catalogue's items, each text in one line and cut where a sentence ends."""

    def __init__(self, catalogue: Catalogue, log: Log):
        """
        Args:
            catalogue: with or without copy.
            log: with or without reviews, about the catalogue's rows.
        """
        self._copy = {row: text for row, of in enumerate(catalogue.copies or []) if (text := cut(of))}
        self._reviews: dict[tuple[str, int], str] = {}
        if log.reviews is not None:
            owners = np.repeat(np.arange(len(log.user_ids)), np.diff(log.offsets))
            for user, row, of in zip(owners, log.items, log.reviews, strict=True):
                if text := cut(of):
                    self._reviews[log.user_ids[user], int(row)] = text

    def __bool__(self) -> bool:
        return bool(self._copy or self._reviews)

    def review(self, user_id: str, row: int) -> str | None:
        """The newest review of an item (a catalogue row) by the user."""
        return self._reviews.get((user_id, row))

    def copy(self, row: int) -> str | None:
        """The copy of an item (a catalogue row)."""
        return self._copy.get(row)

    def of(self, user_id: str, row: int) -> str | None:
        """What a description of the item for the user should say: the user's review, else the copy."""
        return self.review(user_id, row) or self.copy(row)


def cut(text: str) -> str:
    """One line of at most `MAX_CHARS`: whole sentences, or whole words of a first sentence that is longer."""
    line = " ".join(text.split())
    if len(line) <= MAX_CHARS:
        return line
    head = line[: MAX_CHARS + 1]
    end = max(head.rfind(stop) for stop in (". ", "! ", "? "))
    return head[: end + 1] if end > 0 else (head[:MAX_CHARS] if " " not in head else head[: head.rfind(" ")])
