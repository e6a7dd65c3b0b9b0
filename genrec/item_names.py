"""Items by name in a conversation: one line per item that leads back to it, and titles found in any text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from genrec.catalog import Catalogue
from genrec.writer import title_of

SEPARATOR = " — "  # between a name and what is said of the item; stands in no name
NUMBERED = re.compile(r"^\d{1,3}\. (.+)$")


class ItemNames:
    """Every item's name: its title in one line, numbered where several items share it.

    Example:
        Titles "Lamp", "Lamp", "" are named "Lamp", "Lamp (2)", "this item".
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._names: list[str] = []
        self._rows: dict[str, int] = {}
        self._titles: dict[str, set[int]] = {}  # folded title -> rows
        seen: dict[str, int] = {}
        for row in range(len(catalogue)):
            title = one_line(title_of(catalogue, row)) or "this item"
            seen[title] = seen.get(title, 0) + 1
            name = title if seen[title] == 1 else f"{title} ({seen[title]})"
            while name in self._rows:
                seen[title] += 1
                name = f"{title} ({seen[title]})"
            self._names.append(name)
            self._rows[name] = row
            if catalogue.titles[row].strip():
                self._titles.setdefault(folded(title), set()).add(row)
        self._titles.pop("", None)
        self._lengths = sorted({len(title) for title in self._titles}, reverse=True)

    def of(self, row: int) -> str:
        """An item's name."""
        return self._names[row]

    def listed(self, text: str) -> list[int]:
        """The items of a reply's numbered lines, in order; lines that name no item are passed over.

        Only names count: an id, wherever it stands, leads nowhere.
        """
        lines = (NUMBERED.match(line) for line in text.splitlines())
        names = (line[1].split(SEPARATOR)[0].strip() for line in lines if line)
        return [self._rows[name] for name in names if name in self._rows]

    def strangers(self, text: str, known: Collection[int]) -> list[str]:
        """The titles in a text that belong to none of the known items.

        Case, punctuation and width do not matter; of titles that begin at one place the longest counts, so that
        "Lamp 11" does not name "Lamp 1". A title of one word, such as "It", counts only as the catalogue spells it.

        Args:
            text: any.
            known: catalogue rows whose titles may stand there.
        """
        lower = folded(text)
        found, at = [], 0
        while at < len(lower):
            title = self._title_at(lower, at, text)
            if title and self._titles[title].isdisjoint(known):
                found.append(title)
            at += len(title) or 1
        return found

    def _title_at(self, lower: str, at: int, text: str) -> str:
        """The longest title that begins at a place of the folded text; empty if none does."""
        if at and _joined(lower[at - 1], lower[at]):
            return ""
        for length in self._lengths:
            title, end = lower[at : at + length], at + length
            if end > len(lower) or title not in self._titles or (end < len(lower) and _joined(title[-1], lower[end])):
                continue
            if " " in title or any(self._names[row] in text for row in self._titles[title]):
                return title
        return ""


def one_line(text: str) -> str:
    """Text without line breaks, control and direction characters, and without `SEPARATOR`."""
    kept = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cs") and not _turns(c))
    return " ".join(kept.replace(SEPARATOR.strip(), "-").split())


def folded(text: str) -> str:
    """Text as titles are compared: lower case, letters, digits and symbols only, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kinds = [(c, "Cf" if c == "\ufe0f" else unicodedata.category(c)) for c in text]  # an emoji's "as a picture"
    return " ".join("".join(c if k[0] in "LNSM" else "" if k == "Cf" else " " for c, k in kinds).split())


def _turns(character: str) -> bool:
    """Whether it is one of the marks that turn the direction of what follows."""
    return character in "\u061c\u200e\u200f" or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"


def _joined(left: str, right: str) -> bool:
    """Whether two neighbours are one word; scripts without spaces between words (category Lo) never are."""
    return all(c.isalnum() and unicodedata.category(c) != "Lo" for c in (left, right))
