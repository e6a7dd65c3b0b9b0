"""Scripted conversations about a catalogue, with the true query after each of the user's messages.

A script draws *acts* (wish, rule out, cheaper, more like the second, ...), puts them into words by `phrases`, and shows
the user after each message a list of items that satisfy the query so far, as a shop would; where none does, the wish is
impossible and the user goes on looking at the list before. Values are trained or held out, and so are phrasings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrec.catalog import Catalogue
from genrec.mentions import Mention, MentionFinder
from genrec.query import Fact, Query
from genrec.query_change import apply_change
from genrec.query_schema import MOST_MENTIONS, Change, roles_of
from genrec.query_turns import PIECE_CHARS
from genrec.training import phrases
from genrec.training.surfaces import SLOT, Surfaces

HELD_OUT = 0.25  # of each attribute's values, which no training sample names
MOST_TURNS = 5
BEGIN = {"want": 5, "want two": 5, "either": 2, "avoid": 2, "avoid two": 1, "rather": 1, "max": 2, "min": 1, "range": 1,
         "count": 1, "some": 2, "priced": 2, "like": 0.5, "chatter": 1}  # fmt: skip
FOLLOW = {"want": 2, "want two": 1, "either": 1, "also": 2, "avoid": 3, "avoid two": 1, "rather": 2, "drop": 2,
          "drop name": 1, "max": 1, "min": 1, "range": 1, "count": 2, "some": 1, "priced": 1, "cheaper": 3, "dearer": 1,
          "any price": 1, "like": 3, "dislike": 3, "below item": 1, "above item": 1, "start over": 0.5,
          "chatter": 1}  # fmt: skip
WHOLES = ("cheaper", "dearer", "any price", "start over")  # acts that speak of no mention, under the same names
PRICED = frozenset({"max", "min", "range", "priced", "below item", "above item", *WHOLES})  # one of them in a message
NEGATIVE = frozenset({"avoid", "avoid two", "rather", "dislike"})  # what stands behind could be read as ruled out too
APART = {"also": NEGATIVE, "start over": frozenset(FOLLOW) - frozenset(BEGIN), "some": frozenset({"count"})}


@dataclass(frozen=True)
class Slot:
    """One thing that a message means to name, where it stands, and in which role."""

    start: int
    end: int
    role: str
    means: Mention


@dataclass(frozen=True)
class Turn:
    """One message of a user.

    Attributes:
        text: the message.
        shown: ids of the list that the user was looking at.
        whole: what it says beside its mentions.
        slots: its mentions.
        query: the wishes that hold after it.
        acts: what it was made of.
    """

    text: str
    shown: tuple[str, ...]
    whole: str
    slots: list[Slot]
    query: Query
    acts: tuple[str, ...]

    def target(self, finder: MentionFinder) -> Change:
        """What a perfect model says about the mentions that are found in the message; those not meant are "none"."""
        roles: list[Any] = []
        for mention in finder.find(self.text, self.shown)[:MOST_MENTIONS]:
            meant = (slot.role for slot in self.slots if slot.start < mention.end and mention.start < slot.end)
            role = next(meant, "none")
            roles.append((mention, role if role in roles_of(mention) else "none"))
        return Change(roles, self.whole)  # type: ignore[arg-type]


def split_values(finder: MentionFinder, seed: int) -> tuple[set[Fact], set[Fact]]:
    """The values that training conversations name, and those that none of them does.

    Held out is a share of each attribute's values, at least two where there are six, one where there are three.
    """
    names: dict[str, list[Fact]] = {}
    for fact in finder.values.values():
        names.setdefault(fact.name, []).append(fact)
    rng = np.random.default_rng([seed, 7])
    apart: set[Fact] = set()
    for name in sorted(names):
        facts = sorted(names[name], key=lambda fact: fact.value)
        n = max(round(HELD_OUT * len(facts)), min(2, len(facts) // 3))
        apart.update(facts[i] for i in rng.permutation(len(facts))[:n])
    return set(finder.values.values()) - apart, apart


class Scriptwriter:
    """Writes conversations about one catalogue."""

    def __init__(self, catalogue: Catalogue, rng: np.random.Generator, *, seed: int, held_out: str):
        """
        Args:
            catalogue: the items.
            rng: every choice follows from it.
            seed: of the split of values.
            held_out: "nothing": trained values in trained phrasings; "values": the other values; "phrasings": those,
                in the other phrasings.

        Raises:
            DataError: no values to name.
        """
        self.catalogue, self.rng = catalogue, rng
        self.finder = MentionFinder(catalogue)
        trained, apart = split_values(self.finder, seed)
        self.says = phrases.HELD_OUT if held_out == "phrasings" else phrases.TRAINED
        self.surfaces = Surfaces(catalogue, self.finder, trained if held_out == "nothing" else apart, rng)

    def turns(self) -> Iterator[Turn]:
        """The messages of one conversation after the other, without end."""
        while True:
            yield from self.conversation()

    def conversation(self) -> list[Turn]:
        """Some messages of one user, each about the list that the messages before led to."""
        query, shown = Query(), tuple[str, ...]()
        turns: list[Turn] = []
        for number in range(int(self.rng.integers(1, MOST_TURNS + 1))):
            turns.append(self._turn(query, shown, first=number == 0))
            query = turns[-1].query
            chosen = self.rng.permutation(np.flatnonzero(query.allowed(self.catalogue)))[: query.count]
            shown = tuple(self.catalogue.item_ids[row] for row in chosen) or shown
        return turns

    def _turn(self, query: Query, shown: tuple[str, ...], first: bool) -> Turn:
        """One message, made again while it is too long for one piece."""
        while True:
            text, slots, acts = str(self.rng.choice(phrases.OPENINGS)), list[Slot](), list[str]()
            for act in self._acts(first):
                pattern = str(self.rng.choice(self.says[act]))
                held = Query() if "start over" in acts else query
                roles = [match[1] for match in SLOT.finditer(pattern)]
                filled = self.surfaces.fill(act, roles, held, shown, [slot.means for slot in slots])
                if filled is None:
                    continue
                if acts:
                    parts = pattern.startswith("{") or acts[-1] in NEGATIVE
                    text += str(self.rng.choice(phrases.PARTINGS if parts else phrases.JOINTS))
                acts.append(act)
                at = 0
                for match, (surface, means) in zip(SLOT.finditer(pattern), filled, strict=True):
                    text += pattern[at : match.start()]
                    slots.append(Slot(len(text), len(text) + len(surface), match[1], means))
                    text, at = text + surface, match.end()
                text += pattern[at:]
            text += str(self.rng.choice(phrases.ENDINGS))
            if self.rng.random() < 0.5:
                text = text[:1].upper() + text[1:]
            if acts and len(text) < PIECE_CHARS:
                break
        whole = next((act for act in acts if act in WHOLES), "keep")
        meant: list[Any] = [(slot.means, slot.role) for slot in slots if slot.role in roles_of(slot.means)]
        change = Change(meant, whole)  # type: ignore[arg-type]
        return Turn(text, shown, whole, slots, apply_change(query, change, self.catalogue, shown), tuple(acts))

    def _acts(self, first: bool) -> list[str]:
        """What a message says, in order: acts that do not fall over each other."""
        weights = BEGIN if first else FOLLOW
        names, chances = list(weights), np.array(list(weights.values()))
        chosen: list[str] = []
        for name in self.rng.choice(names, int(self.rng.integers(1, 4)), replace=False, p=chances / chances.sum()):
            act = str(name)
            if act in PRICED and PRICED.intersection(chosen):
                continue
            if any(other in APART.get(act, ()) or act in APART.get(other, ()) for other in chosen):
                continue
            chosen.append(act)
        return sorted(chosen, key=lambda act: act != "start over")
