"""What a perfect writer would write about an item for one user: the reference for training and for measuring.

A text dwells on *facts* (attribute name and value of the item), those first that the user cares about. On the embedded
catalogue the planted taste says which those are, colour, shape and pattern included, which only the picture shows. On
any other catalogue it is the item's own fields, those first whose value is shared with most of the user's history. An
explanation also names *evidence*: the items of the history that share most values with the item.

A user's style is part of the request, as a shop keeps it in a profile; on the embedded catalogue it is planted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genrec.catalog import Catalogue
from genrec.errors import ConfigError
from genrec.synthetic import BRANDS, CATEGORIES, KINDS, MATERIALS, TASTES, USES, Truth
from genrec.synthetic_pictures import COLOURS, PATTERNS, SHAPES

TASKS = ("describe", "explain", "headline")
STYLES = ("short plain", "long plain", "short playful", "long playful")
DEFAULT_STYLE = STYLES[0]
PICTURE_ONLY = ("colour", "shape", "pattern")  # of the embedded catalogue
WORDS = ("material", "use", "brand")  # what a planted user reads about after what they care about
LOOKS = ("pattern", "shape", "colour")  # the same for a user of whom nothing is known
VALUES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "brand": BRANDS,
    "material": MATERIALS,
    "use": USES,
    "category": CATEGORIES,
}
MAX_CHARS = 80  # of a title or a value in a text
NEWEST = 50  # events that facts and evidence look at

Fact = tuple[str, str]


@dataclass(frozen=True)
class Brief:
    """What a text has to say.

    Attributes:
        title: the item's.
        facts: (name, value), the most wanted first.
        evidence: titles of items of the history, the best first.
    """

    title: str
    facts: list[Fact]
    evidence: list[str]


def style_of(user_id: str) -> str:
    """The planted style of a user of the embedded catalogue."""
    return STYLES[hashlib.sha256(user_id.encode()).digest()[0] % len(STYLES)]


def fields_of(catalogue: Catalogue, row: int) -> list[Fact]:
    """An item's own fields, as (name, value)."""
    fields = [(name, value) for name, value in catalogue.attributes[row].items() if value]
    return [*fields, *(("category", name) for name in catalogue.categories[row])]


def card(catalogue: Catalogue, row: int) -> str:
    """The item's title and attributes in one line, as the prompts show it."""
    fields = (f"{name} {value[:MAX_CHARS]}" for name, value in catalogue.attributes[row].items() if value)
    return "; ".join([title_of(catalogue, row), *fields])


def evidence_of(catalogue: Catalogue, history: Sequence[int] | np.ndarray, row: int) -> list[int]:
    """At most two rows of the history, those that share most fields with the item; equal ones: the newest first."""
    own = set(fields_of(catalogue, row))
    newest = dict.fromkeys(int(r) for r in reversed(history[-NEWEST:]))
    return sorted(newest, key=lambda r: -len(own.intersection(fields_of(catalogue, r))))[:2]


def compose(task: str, style: str, brief: Brief) -> str:
    """The text of a task; the same grammar for every catalogue.

    Raises:
        ConfigError: no such task or style.
    """
    if task not in TASKS or style not in STYLES:
        raise ConfigError(f"no text {task!r} in style {style!r}; tasks: {TASKS}; styles: {STYLES}")
    length, tone = style.split()
    title, playful = brief.title, tone == "playful"
    if task == "explain":
        chosen = " and ".join(brief.evidence[: 1 if length == "short" else 2])
        facts = told(DEFAULT_STYLE, brief.facts[: 1 if length == "short" else 2])
        if playful:
            return (f"Remember {chosen}? " if chosen else "") + f"Meet {title}" + (f": {facts}!" if facts else "!")
        return (f"You chose {chosen}. " if chosen else "") + title + (f" goes with {facts}." if facts else ".")
    if task == "headline":
        facts = told(DEFAULT_STYLE, brief.facts[: 1 if length == "short" else 2])
        if playful:
            return (f"Hey, {facts}! " if facts else "") + f"{title}!"
        return title + (f", {facts}" if facts else "")
    facts = told(style, brief.facts[: 2 if length == "short" else 3])
    if length == "short":
        if playful:
            return (f"Hey, {facts}! " if facts else "") + f"Meet {title}!"
        return title + (f" with {facts}." if facts else ".")
    if playful:
        return (f"{facts} " if facts else "") + f"Say hello to {title}!"
    return f"This is {title}." + (f" {facts}" if facts else "")


def told(style: str, facts: Sequence[Fact]) -> str:
    """Facts in the wording of a style's descriptions; empty without facts."""
    if style == "long plain":
        return " ".join(f"Its {name} is {value}." for name, value in facts)
    if style == "long playful":
        return " ".join(f"Look, {name} {value}!" for name, value in facts)
    return " and ".join(f"{name} {value}" for name, value in facts)


def title_of(catalogue: Catalogue, row: int) -> str:
    """The item's title in one line, cut at `MAX_CHARS`."""
    return " ".join(catalogue.titles[row][:MAX_CHARS].split()) or "this item"


class Writer:
    """The perfect writer of one catalogue; with the planted truth, of the embedded one."""

    def __init__(self, catalogue: Catalogue, truth: Truth | None = None, shown: Sequence[str] = ()):
        """
        Args:
            catalogue: the items.
            truth: what was planted in them; None: a catalogue without a known truth.
            shown: attributes that pictures show, where nothing was planted.
        """
        self.catalogue, self.truth = catalogue, truth
        self.shown = shown if truth is None else PICTURE_ONLY
        if truth is not None:
            self._user = {user: row for row, user in enumerate(truth.user_ids)}
            at = {item: row for row, item in enumerate(truth.item_ids)}
            self._row = [at[item] for item in catalogue.item_ids]

    def all_fields(self, row: int) -> list[Fact]:
        """Every true (name, value) of an item: its own fields, and what its picture shows where that is known."""
        if self.truth is None:
            return fields_of(self.catalogue, row)
        return [(name, VALUES[name][values[self._row[row]]]) for name, values in self.truth.attributes.items()]

    def looks(self, row: int) -> list[Fact]:
        """What an item's picture shows; empty where nothing is known of it."""
        known = dict(self.all_fields(row))
        return [(name, known[name][:MAX_CHARS]) for name in self.shown if name in known]

    def style(self, user_id: str, rng: np.random.Generator) -> str:
        """The user's planted style, or any one where none is known."""
        return STYLES[rng.integers(len(STYLES))] if self.truth is None else style_of(user_id)

    def cares(self, user_id: str, history: Sequence[int] | np.ndarray, row: int) -> list[str]:
        """The names of attributes that this user wants to read about first, for this item.

        Planted: those of the user's kind, or the category where there is no history to tell it. Else: those of the
        item's fields that at least a third of the history shares.
        """
        if self.truth is not None:
            if not len(history):
                return ["category"]
            kind = KINDS[self.truth.kinds[self._user[user_id]]]
            return ["category", "brand"] if kind == "order" else list(TASTES[KINDS.index(kind)])
        shares = self._shares(history, row)
        return list(dict.fromkeys(name for (name, _), share in shares if share >= 1 / 3))

    def _shares(self, history: Sequence[int] | np.ndarray, row: int) -> list[tuple[Fact, float]]:
        """The item's fields with the share of the newest history that has the same value, most shared first."""
        past = [set(fields_of(self.catalogue, int(r))) for r in history[-NEWEST:]]
        fields = [(name, value) for name, value in fields_of(self.catalogue, row) if len(value) <= MAX_CHARS]
        shares = [(fact, sum(fact in of for of in past) / max(1, len(past))) for fact in fields]
        return sorted(shares, key=lambda pair: -pair[1])

    def brief(self, user_id: str, history: Sequence[int] | np.ndarray, row: int) -> Brief:
        """What a text about the item for the user has to say.

        Args:
            user_id: of the log; matters where the truth is planted.
            history: catalogue rows, oldest first.
            row: the item.
        """
        if self.truth is None:
            facts = [fact for fact, _ in self._shares(history, row)]
        else:
            known = dict(self.all_fields(row))
            names = [*self.cares(user_id, history, row), *(WORDS if len(history) else LOOKS)]
            facts = [(name, known[name]) for name in dict.fromkeys(names)]
        evidence = [title_of(self.catalogue, r) for r in evidence_of(self.catalogue, history, row)]
        return Brief(title_of(self.catalogue, row), facts, evidence)

    def write(self, task: str, style: str, user_id: str, history: Sequence[int] | np.ndarray, row: int) -> str:
        """The reference text; arguments as in `brief` and `compose`."""
        return compose(task, style, self.brief(user_id, history, row))
