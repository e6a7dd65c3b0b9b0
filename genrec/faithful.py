"""Whether a text says only what is true of its item: every attribute value, number, name and title in it is looked up.

Driven by the catalogue: a value is a mention wherever it stands, whatever the sentence. On the embedded catalogue the
check is exact, because every attribute, seen or read, is known and the grammar's words are known too, so that a word
that nobody planted counts as a wrong name. Elsewhere a wrong name is a capitalised word inside a sentence that neither
the item nor the history holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from genrec.writer import STYLES, TASKS, VALUES, Brief, Writer, compose, title_of

WORD = re.compile(r"[^\W_]+(?:[.'’-][^\W_]+)*")
LONGEST = 12  # words of a title or value
LINKS = ("is",)  # words that may stand between an attribute's name and its value


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in WORD.findall(text)]


@dataclass(frozen=True)
class Mention:
    """One thing that a text says.

    Attributes:
        kind: "item" (a title), "value", "number" or "name".
        text: the words.
        attribute: the attribute's name where the text gives it.
        true: whether the item (for titles: or the history) has it.
    """

    kind: str
    text: str
    attribute: str | None
    true: bool


class Checker:
    """Looks up what texts say; built once per catalogue."""

    def __init__(self, writer: Writer):
        self.writer = writer
        catalogue = writer.catalogue
        n = len(catalogue)
        self._titles: dict[tuple[str, ...], set[int]] = {}
        self._values: dict[tuple[str, ...], set[str]] = {}
        self._fields = [{(name, tuple(words(value))) for name, value in writer.all_fields(row)} for row in range(n)]
        self._texts = catalogue.texts()
        for row in range(n):
            self._titles.setdefault(tuple(words(title_of(catalogue, row))), set()).add(row)
            for name, value in self._fields[row]:
                self._values.setdefault(value, set()).add(name)
        self._titles.pop((), None)
        self._values.pop((), None)
        self._names = {name for fields in self._fields for name, _ in fields}
        self._grammar: set[str] | None = None
        if writer.truth is not None:
            empty = Brief("", [("", "")] * 3, ["", ""])
            self._grammar = {word for task in TASKS for style in STYLES for word in words(compose(task, style, empty))}
            self._grammar |= {word for of in VALUES.values() for value in of for word in words(value)} | self._names

    def mentions(self, text: str, row: int, history: Sequence[int] = ()) -> list[Mention]:
        """Everything checkable that a text says, in order.

        Args:
            text: about the item.
            row: the item.
            history: items that the text may name by their titles.
        """
        spans = list(WORD.finditer(text))
        lower = [span.group().lower() for span in spans]
        allowed = {row, *(int(r) for r in history)}
        own_words = set(words(self._texts[row])) | {word for _, value in self._fields[row] for word in value}
        own_words |= {word for r in allowed for word in words(self.writer.catalogue.titles[r])}
        found: list[Mention] = []
        at = 0
        while at < len(spans):
            title = self._longest(lower, at, self._titles)
            value = self._longest(lower, at, self._values)
            said = tuple(lower[at : at + max(title, value, 1)])
            if title > 1 and title >= value:
                found.append(Mention("item", " ".join(said), None, not allowed.isdisjoint(self._titles[said])))
            elif value:
                said = tuple(lower[at : at + value])
                name = self._named(lower, at)
                true = any(v == said and name in (None, n) for n, v in self._fields[row])
                true = true or (name is None and self._grammar is None and set(said) <= own_words)
                found.append(Mention("value", " ".join(said), name, true))
            elif any(letter.isdigit() for letter in lower[at]):
                found.append(Mention("number", lower[at], None, lower[at] in own_words))
            elif self._is_name(text, spans[at], lower[at]):
                found.append(Mention("name", lower[at], None, lower[at] in own_words))
            at += len(said)
        return found

    def _longest(
        self, lower: list[str], at: int, known: dict[tuple[str, ...], set[int]] | dict[tuple[str, ...], set[str]]
    ) -> int:
        """Words of the longest known phrase that begins here."""
        return next((n for n in range(min(LONGEST, len(lower) - at), 0, -1) if tuple(lower[at : at + n]) in known), 0)

    def _named(self, lower: list[str], at: int) -> str | None:
        """The attribute whose name stands before a value."""
        before = at - 2 if at > 1 and lower[at - 1] in LINKS else at - 1
        return lower[before] if before >= 0 and lower[before] in self._names else None

    def _is_name(self, text: str, span: re.Match[str], lower: str) -> bool:
        if self._grammar is not None:
            return lower not in self._grammar
        before = text[: span.start()].rstrip()
        return span.group()[0].isupper() and bool(before) and before[-1] not in ".!?:"
