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
        values: dict[str, np.ndarray] = {}
        for fact in self.wanted:
            any_of = values.setdefault(fact.name, np.zeros(len(catalogue), bool))
            any_of[catalogue.rows_of_fact.get((fact.name, fact.value), [])] = True
        for any_of in values.values():
            keep &= any_of
        for fact in self.unwanted:
            keep[catalogue.rows_of_fact.get((fact.name, fact.value), [])] = False
        if self.price_min is not None:
            keep &= catalogue.prices >= self.price_min  # NaN compares false
        if self.price_max is not None:
            keep &= catalogue.prices <= self.price_max
        known = [catalogue.index[item] for item in (*self.liked, *self.disliked) if item in catalogue.index]
        keep[known] = False
        return keep
