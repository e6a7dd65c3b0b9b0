"""What a user's message names: values of the catalogue, its attributes, numbers, and items.

Driven by the catalogue, it knows the words of any shop, and none of its own but English numbers, places and plurals.
It finds names and does not understand: whether "steel" is wished for or ruled out is for the model to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genrec.catalog import Catalogue
from genrec.query import Fact

Kind = Literal["value", "attribute", "number", "item"]
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['’][^\W_]+)*")
LONGEST = 8  # words of a value or title
SHORT = 3  # words with fewer characters ("S", "XL", "no") have to be spelled as the catalogue spells them
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: float(n) for n, word in enumerate(UNITS, 1) if n > 1}  # "one" is hardly ever a number: "a blue one"
FIRST_TEN = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
ORDINALS = {word: n for n, word in enumerate(FIRST_TEN, 1)} | {"last": -1}
ORDINAL = re.compile(r"(\d{1,2})(?:st|nd|rd|th)")
YEAR = re.compile(r"\s*\([^()]*\)$")  # what a title has behind its name: "Heat (1995)"
ALL = frozenset({"these", "those", "them"})
COUNTED = frozenset({"number", "nr", "item", "option"})  # "number 2" is an item of the list
PLAIN = frozenset(  # values that say nothing
    ("yes", "no", "not", "true", "false", "none", "other", "unknown", "and", "or", "the", "new", "any", "all")
)


@dataclass(frozen=True)
class Mention:
    """One thing that a message names.

    Attributes:
        start, end: where it stands, in characters.
        kind: "value", "attribute" (a name, such as "colour"), "number" or "item".
        fact: the value with its attribute; of an attribute its name and an empty value.
        number: a price or a count; a value may be one as well, such as size 42.
        items: item ids; several for "these".
    """

    start: int
    end: int
    kind: Kind
    fact: Fact | None = None
    number: float | None = None
    items: tuple[str, ...] = ()


class MentionFinder:
    """Finds mentions of one catalogue; built once."""

    def __init__(self, catalogue: Catalogue):
        rows = catalogue.rows_of_fact
        self.spellings: dict[tuple[str, ...], set[str]] = {}
        self.values: dict[tuple[str, ...], Fact] = {}
        for name, value in sorted(rows, key=lambda fact: -len(rows[fact])):  # of several attributes the commonest one's
            key = key_of(value)
            if 0 < len(key) <= LONGEST and not PLAIN.issuperset(key):
                self.values.setdefault(key, Fact(name=name, value=value))
                self.spellings.setdefault(key, set()).add(value)
        self.attributes = {key_of(name): name for name, _ in rows if key_of(name)}
        self.titles: dict[tuple[str, ...], str] = {}
        self.titles_of: dict[str, list[tuple[str, ...]]] = {}
        for item, title in zip(catalogue.item_ids, catalogue.titles, strict=True):
            for name in dict.fromkeys((title, YEAR.sub("", title))):
                key = key_of(name)
                if 0 < len(key) <= LONGEST:
                    self.titles.setdefault(key, item)  # of items with one title the catalogue's first
                    self.titles_of.setdefault(item, []).append(key)
                    self.spellings.setdefault(key, set()).add(name)
        self.plain_titles = {key for key in self.titles if self._is_plain(key)}

    def find(self, text: str, shown: Sequence[str] = ()) -> list[Mention]:
        """Everything that a message names, in order, never two at one place.

        The longest name wins; among equals a title of the list that was shown last, a value, an attribute, any title.

        Args:
            text: the message.
            shown: ids of the list that the user looks at, in its order; "the second" is one of them.
        """
        words = [(match.group(), match.start(), match.end()) for match in TOKEN.finditer(text)]
        keys = [stem(word) for word, _, _ in words]
        listed = {key: item for item in reversed(shown) for key in self.titles_of.get(item, ())}
        found: list[Mention] = []
        at = 0
        while at < len(words):
            length, mention = self._at(text, words, keys, at, shown, listed)
            if mention is not None:
                found.append(mention)
            at += length
        return found

    def _at(
        self,
        text: str,
        words: list[tuple[str, int, int]],
        keys: list[str],
        at: int,
        shown: Sequence[str],
        listed: dict[tuple[str, ...], str],
    ) -> tuple[int, Mention | None]:
        """The mention that begins at a word, and how many words to go on."""
        start = words[at][1]
        for n in range(min(LONGEST, len(words) - at), 0, -1):
            key, end = tuple(keys[at : at + n]), words[at + n - 1][2]
            said = text[start:end]
            if key in listed and self._spelled(key, said):
                return n, Mention(start, end, "item", items=(listed[key],))
            if key in self.values and self._spelled(key, said):
                number = number_of(said) if n == 1 else None
                return n, Mention(start, end, "value", fact=self.values[key], number=number)
            if key in self.attributes:
                return n, Mention(start, end, "attribute", fact=Fact(name=self.attributes[key], value=""))
            # a title of words that are values, such as "oak lamp", is a wish unless it was shown
            if key in self.titles and key not in self.plain_titles and (n > 1 or said in self.spellings[key]):
                return n, Mention(start, end, "item", items=(self.titles[key],))
        word, start, end = words[at]
        place = _ordinal(word)
        if place is None and (text[:start].endswith("#") or (at and words[at - 1][0].casefold() in COUNTED)):
            place = int(number_of(word) or 0)
        if place and abs(place) <= len(shown):
            return 1, Mention(start, end, "item", items=(shown[place - 1 if place > 0 else place],))
        if word.casefold() in ALL and shown and not self._counted(words, at):
            return 1, Mention(start, end, "item", items=tuple(shown))
        number = number_of(word)
        return 1, None if number is None else Mention(start, end, "number", number=number)

    def _counted(self, words: list[tuple[str, int, int]], at: int) -> bool:
        """Whether a word only says what some are counted of: "the second of these", "three of them"."""
        if at < 2 or words[at - 1][0].casefold() != "of":
            return False
        before = words[at - 2][0]
        return _ordinal(before) is not None or number_of(before) is not None or before.casefold() == "one"

    def _spelled(self, key: tuple[str, ...], said: str) -> bool:
        return len(said) >= SHORT or said in self.spellings[key]

    def _is_plain(self, key: tuple[str, ...]) -> bool:
        """Whether a title consists of values alone."""
        at = 0
        while at < len(key):
            at += (step := next((n for n in range(len(key) - at, 0, -1) if key[at : at + n] in self.values), 0))
            if not step:
                return False
        return True


def key_of(text: str) -> tuple[str, ...]:
    """The words of a name, as they are compared."""
    return tuple(stem(match.group()) for match in TOKEN.finditer(text))


def stem(word: str) -> str:
    """A word in lower case without its plural: "Dresses" and "dress" are one."""
    word = word.casefold()
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > SHORT and word.endswith("s") and not word.endswith("ss") else word


def number_of(word: str) -> float | None:
    """A number in digits ("1,200", "19.99", "12,50") or words ("five"); None: no number."""
    if word.casefold() in NUMBERS:
        return NUMBERS[word.casefold()]
    if not word[0].isascii() or not word[0].isdigit() or len(word) > 12:
        return None
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", word):
        word = word.replace(",", "")
    try:
        return float(word.replace(",", "."))
    except ValueError:
        return None


def _ordinal(word: str) -> int | None:
    """A place in a list, from 1; -1 is the last."""
    match = ORDINAL.fullmatch(word.casefold())
    return int(match[1]) or None if match else ORDINALS.get(word.casefold())
