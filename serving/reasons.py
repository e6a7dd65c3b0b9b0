"""Why an item is in a list, in one line: the model's words where all that can be looked up in them is true."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from genrec.catalog import Catalogue
from genrec.faithful import Checker
from genrec.item_names import ItemNames, one_line
from genrec.query import Query
from genrec.serving.engine import TextResult
from genrec.writer import Writer, fields_of

MAX_REASON_CHARS = 240
PLAIN_FACTS = 2


class Reasons:
    """Chooses between what the model wrote and what the catalogue says; built once per catalogue."""

    def __init__(self, catalogue: Catalogue, names: ItemNames) -> None:
        self._catalogue, self._names = catalogue, names
        self._writer = Writer(catalogue)
        self._checker = Checker(self._writer)

    def choose(
        self, written: TextResult | None, row: int, query: Query, history: Sequence[int], evidence: Collection[int]
    ) -> tuple[str, bool]:
        """The model's text if it may be shown, else a plain one; and whether it is the model's.

        Args:
            written: by the task "explain"; None: there is none.
            row: the item.
            query: what the user wishes; a plain reason says first how the item meets it.
            history: catalogue rows, oldest first.
            evidence: rows of the history whose titles the text may name.
        """
        if written is not None and written.finish_reason == "stop":
            text = one_line(written.text)
            if len(text) <= MAX_REASON_CHARS and self._may_be_shown(text, row, evidence):
                return text, True
        return self._plain(row, query, history), False

    def _may_be_shown(self, text: str, row: int, evidence: Collection[int]) -> bool:
        """Whether a text names no other item and says something of this one, and nothing that is not so."""
        if self._names.strangers(text, {row, *evidence}):
            return False
        found = self._checker.mentions(text, row, list(evidence))
        return bool(found) and all(mention.true for mention in found)

    def _plain(self, row: int, query: Query, history: Sequence[int]) -> str:
        """Fields of the catalogue: those that the user asked for, then those that the history shares most."""
        own = fields_of(self._catalogue, row)
        asked = [(fact.name, fact.value) for fact in query.wanted if (fact.name, fact.value) in own]
        facts = dict.fromkeys([*asked, *self._writer.brief("", history, row).facts])
        said = [one_line(f"{name} {value}") for name, value in facts]
        said = [text for text in said if not self._names.strangers(text, {row})][:PLAIN_FACTS]
        price = float(self._catalogue.prices[row])
        if (query.price_min is not None or query.price_max is not None) and not math.isnan(price):
            said.append(f"price {price:.2f}")
        return ", ".join(said)
