"""What the mentions of a scripted message are, and how users spell them: values, prices, counts, items of the list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from genrec.catalog import Catalogue
from genrec.errors import DataError
from genrec.mentions import FIRST_TEN, SHORT, UNITS, Mention, MentionFinder, stem
from genrec.query import Fact, Query
from genrec.training.phrases import MONEY, NUMBERED, PLACES

SLOT = re.compile(r"\{(\w+)\}")
REPLACES = 0.4  # chance that a wish or its opposite is about something that the query holds already
MOST_COUNT = 9
T = TypeVar("T")
Filled = list[tuple[str, Mention]]  # how it is spelled, what it means


class Surfaces:
    """Fills the slots of acts with things that make sense there."""

    def __init__(self, catalogue: Catalogue, finder: MentionFinder, values: set[Fact], rng: np.random.Generator):
        """
        Args:
            catalogue: the items.
            finder: of the catalogue.
            values: what users may name.
            rng: every choice follows from it.

        Raises:
            DataError: no values to name.
        """
        if not values:
            raise DataError("no attribute or category has values of a few words: there is nothing to talk about")
        self.rng, self.finder = rng, finder
        self.titles = dict(zip(catalogue.item_ids, catalogue.titles, strict=True))
        self.facts = sorted(values, key=lambda fact: (fact.name, fact.value))
        self.of_name: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.of_name.setdefault(fact.name, []).append(fact)
        prices = catalogue.prices[~np.isnan(catalogue.prices)]
        self.prices = prices if len(prices) else np.linspace(5, 100, 20)

    def fill(
        self, act: str, roles: Sequence[str], query: Query, shown: Sequence[str], used: Sequence[Mention]
    ) -> Filled | None:
        """A surface and its meaning for each slot of an act; None where the act makes no sense now.

        Args:
            act: see `genrec.training.phrases`.
            roles: of its slots, in order.
            query: the wishes so far.
            shown: ids of the list that the user is looking at.
            used: what the message named before: another act is about other attributes and other items.
        """
        if not shown and act in ("cheaper", "dearer"):
            return None
        names = {mention.fact.name for mention in used if mention.fact is not None}
        facts = iter(self._facts(act, roles, query, names))
        low, high = sorted(self.price() for _ in range(2))
        items = [] if any(mention.items for mention in used) else list(shown)
        filled: Filled = []
        for role in roles:
            one: tuple[str, Mention] | None
            match role:
                case "max" | "min":
                    one = self.money(high if role == "max" else low)
                case "count" | "number":
                    one = self.count(int(self.rng.integers(2, MOST_COUNT + 1)))
                case "like" | "dislike" | "cheaper" | "dearer":
                    one = self.item(items, role) if items else None
                case _:
                    fact = next(facts, None)
                    one = None if fact is None else self.spelled(fact)
            if one is None:
                return None
            filled.append(one)
        return filled

    def _facts(self, act: str, roles: Sequence[str], query: Query, used: set[str]) -> list[Fact]:
        """The values that an act names, in the order of its slots; too few where it has none to name."""
        free = [fact for fact in self.facts if fact.name not in used]
        held = [fact for fact in (*query.wanted, *query.unwanted) if fact.name not in used]
        about = self._some(held if held and self.rng.random() < REPLACES else free, 1)
        match act:
            case "want two":
                names = self._some(sorted({fact.name for fact in free}), 2)
                return [fact for name in names for fact in self._some(self.of_name[name], 1)]
            case "either":
                return [fact for one in about for fact in self._some(self.of_name[one.name], 2)]
            case "rather":
                others = [fact for one in about for fact in self.of_name[one.name] if fact != one]
                new = self._some(others, 1)
                return [fact for role in roles for fact in (new if role == "want" else about)]
            case "also":
                wanted = self._some([fact for fact in query.wanted if fact.name not in used], 1)
                new = [f for one in wanted for f in self.of_name[one.name] if f not in query.wanted]
                return self._some(new, 1)
            case "drop":
                return self._some(held, 1)
            case "drop name":
                return [Fact(name=fact.name, value="") for fact in self._some(held or free, 1)]
            case "avoid two":
                return self._some(free, 2)
        return about

    def price(self) -> float:
        """A price near that of some item: of whole units, mostly round."""
        price = max(2.0, float(self.rng.choice(self.prices)))
        step = self.rng.choice([1, 5]) if price < 50 else 10.0 ** max(0, int(np.log10(price)) - 1)
        return float(max(step, round(price / step) * step)) - (0.01 if self.rng.random() < 0.1 else 0.0)

    def money(self, price: float) -> tuple[str, Mention]:
        """A price as users write it."""
        number = f"{price:.0f}" if price == int(price) else f"{price:.2f}"
        return str(self.rng.choice(MONEY)).format(number), Mention(0, 0, "number", number=price)

    def count(self, n: int) -> tuple[str, Mention]:
        """A count in digits or as a word."""
        return str(n) if self.rng.random() < 0.5 else UNITS[n - 1], Mention(0, 0, "number", number=float(n))

    def item(self, shown: Sequence[str], role: str) -> tuple[str, Mention]:
        """One of the items that the user is looking at, by its place or its title, or all of them."""
        if role == "dislike" and self.rng.random() < 0.15:
            return str(self.rng.choice(["these", "those"])), Mention(0, 0, "item", items=tuple(shown))
        place = int(self.rng.integers(len(shown)))
        item = shown[place]
        means = Mention(0, 0, "item", items=(item,))
        style = self.rng.random()
        if style < 0.25 and [m.items for m in self.finder.find(self.titles[item], shown)] == [(item,)]:
            return f"the {self.titles[item]}", means
        if style < 0.4:
            return str(self.rng.choice(NUMBERED)).format(place + 1), means
        word = f"{place + 1}{('st', 'nd', 'rd')[place] if place < 3 else 'th'}"
        if place == len(shown) - 1 and style < 0.6:
            word = "last"
        elif place < len(FIRST_TEN) and style < 0.85:
            word = FIRST_TEN[place]
        return str(self.rng.choice(PLACES)).format(word), means

    def spelled(self, fact: Fact) -> tuple[str, Mention]:
        """A value, or an attribute's name, as users write it: in lower case at times, a single word in plural."""
        means = Mention(0, 0, "value" if fact.value else "attribute", fact=fact)
        text = fact.value or fact.name
        if len(text) >= SHORT and self.rng.random() < 0.3:
            text = text.lower()
        if fact.name == "category" and text.isalpha() and stem(f"{text}s") == stem(text) and self.rng.random() < 0.2:
            text += "s"
        return text, means

    def _some(self, of: Sequence[T], n: int) -> list[T]:
        """`n` different ones at random; fewer where there are fewer."""
        return [of[i] for i in self.rng.permutation(len(of))[:n]]
