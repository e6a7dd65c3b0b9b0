"""What a conversation asks for, as data: between understanding it and recommending from it."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from genrec.catalog import Catalogue
from genrec.config import Settings

MAX_COUNT = 20


class Fact(Settings, frozen=True):
    """An attribute's value; a category is the value of the attribute "category"."""

    name: str = Field(description="the attribute's name, as the catalogue writes it")
    value: str = Field(description="its value, as the catalogue writes it")


class Query(Settings, frozen=True):
    """The wishes that hold after a conversation's last message."""

    wanted: list[Fact] = Field([], description="one value of each attribute named here, or the item is out")
    unwanted: list[Fact] = Field([], description="an item with any of these is out")
    price_min: float | None = Field(None, ge=0, description="least price, inclusive")
    price_max: float | None = Field(None, ge=0, description="greatest price, inclusive")
    liked: list[str] = Field([], description="item ids; further history")
    disliked: list[str] = Field([], description="item ids that are out")
    count: int = Field(3, ge=1, le=MAX_COUNT, description="how many items")

    def allowed(self, catalogue: Catalogue) -> np.ndarray:
        """The items that satisfy every wish, bool [N].

        A disliked item is out, and so is a liked one: the user knows it. An item of unknown price fails any price wish.
        Ids that the catalogue does not hold are ignored.
        """
        keep = catalogue.available.astype(bool, copy=True)
        values: dict[str, set[str]] = {}
        for fact in self.wanted:
            values.setdefault(fact.name, set()).add(fact.value)
        for row in np.flatnonzero(keep):
            keep[row] = all(facts_of(catalogue, row).get(name, set()) & any_of for name, any_of in values.items())
        for row in np.flatnonzero(keep):
            own = facts_of(catalogue, row)
            keep[row] = not any(fact.value in own.get(fact.name, ()) for fact in self.unwanted)
        if self.price_min is not None:
            keep &= catalogue.prices >= self.price_min  # NaN compares false
        if self.price_max is not None:
            keep &= catalogue.prices <= self.price_max
        known = [catalogue.index[item] for item in (*self.liked, *self.disliked) if item in catalogue.index]
        keep[known] = False
        return keep


def facts_of(catalogue: Catalogue, row: int) -> dict[str, set[str]]:
    """An item's attributes and categories: name -> values."""
    found = {name: {value} for name, value in catalogue.attributes[row].items() if value}
    if catalogue.categories[row]:
        found["category"] = found.get("category", set()) | set(catalogue.categories[row])
    return found
