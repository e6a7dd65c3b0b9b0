"""How one message changes a query: the later message wins.

The model only says what role each mention plays (`genrec.query_schema`); what a role does to the query is decided here,
so that a follow-up means the same whatever model read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from genrec.catalog import Catalogue
from genrec.query import MAX_COUNT, Fact, Query
from genrec.query_schema import Change

CENT = 0.01
T = TypeVar("T", Fact, str)


def apply_change(query: Query, change: Change, catalogue: Catalogue, shown: Sequence[str]) -> Query:
    """The query after one more message.

    What a message wants takes the place of what was wanted of the same attribute before; what it wants "also" joins it.
    Wanting a value ends its being unwanted, and the other way round; so with likes. A new price bound that leaves no
    price drops the other bound. "Cheaper" is below the cheapest of the list shown last, or of the items named; "dearer"
    above the dearest; where none of them has a price, nothing changes.

    Args:
        query: the wishes so far.
        change: what the message says.
        catalogue: for prices.
        shown: ids of the list that the user was looking at.
    """
    if change.whole == "start over":
        query = Query()
    wanted, unwanted = list(query.wanted), list(query.unwanted)
    liked, disliked = list(query.liked), list(query.disliked)
    low, high, count = query.price_min, query.price_max, query.count
    if change.whole == "any price":
        low = high = None
    replaced: set[str] = set()  # attributes whose earlier wishes this message has ended
    bounds: dict[str, float] = {}  # what this message says of prices
    if change.whole in ("cheaper", "dearer"):
        bounds |= _beyond(catalogue, shown, change.whole)
    for mention, role in change.roles:
        fact, number = mention.fact, mention.number
        if fact is not None and role in ("want", "also"):
            if role == "want" and fact.name not in replaced:
                replaced.add(fact.name)
                wanted = [other for other in wanted if other.name != fact.name]
            wanted, unwanted = _joined(wanted, [fact]), _without(unwanted, [fact])
        elif fact is not None and role == "avoid":
            wanted, unwanted = _without(wanted, [fact]), _joined(unwanted, [fact])
        elif fact is not None and role == "drop":
            ended = [f for f in (*wanted, *unwanted) if f == fact or (not fact.value and f.name == fact.name)]
            wanted, unwanted = _without(wanted, ended), _without(unwanted, ended)
        elif role in ("max", "min") and number is not None:
            bounds[role] = number
        elif role == "count" and number is not None:
            count = int(min(max(number, 1), MAX_COUNT))
        elif role == "like":
            liked, disliked = _joined(liked, mention.items), _without(disliked, mention.items)
        elif role == "dislike":
            liked, disliked = _without(liked, mention.items), _joined(disliked, mention.items)
        elif role in ("cheaper", "dearer"):
            bounds |= _beyond(catalogue, mention.items, role)
    if len(bounds) == 2 and bounds["min"] > bounds["max"]:
        bounds = {"min": bounds["max"], "max": bounds["min"]}
    low, high = bounds.get("min", low), bounds.get("max", high)
    if low is not None and high is not None and low > high:
        low, high = (None, high) if "max" in bounds else (low, None)
    return Query(
        wanted=wanted, unwanted=unwanted, price_min=low, price_max=high, liked=liked, disliked=disliked, count=count
    )


def _beyond(catalogue: Catalogue, items: Sequence[str], side: str) -> dict[str, float]:
    """The price bound one cent below the cheapest, or above the dearest, of some items."""
    prices = [float(catalogue.prices[catalogue.index[item]]) for item in items if item in catalogue.index]
    prices = [price for price in prices if not np.isnan(price)]
    if not prices:
        return {}
    if side == "cheaper":
        return {"max": max(0.0, round(min(prices) - CENT, 2))}
    return {"min": round(max(prices) + CENT, 2)}


def _joined(old: Sequence[T], new: Sequence[T]) -> list[T]:
    return list(old) + [one for one in new if one not in old]


def _without(old: Sequence[T], ended: Sequence[T]) -> list[T]:
    return [one for one in old if one not in ended]
