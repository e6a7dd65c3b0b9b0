"""When nothing fits: which wish to drop, and how many items then fit. Exact, by counting what each item fails at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from genrec.catalog import Catalogue
from genrec.query import Query


@dataclass(frozen=True)
class Relaxation:
    """Wishes to drop, and what that gives.

    Attributes:
        dropped: one or two wishes, each a `Query` that holds nothing else.
        items: how many items fit all the others.
    """

    dropped: tuple[Query, ...]
    items: int


def wishes(query: Query) -> list[Query]:
    """A query's wishes, each as a query of its own; together they ask for what the query asks for.

    All wanted values of one attribute are one wish, because any of them will do; so are least and greatest price apart.
    Liked and disliked items are none: nobody is talked into what they disliked.
    """
    names = dict.fromkeys(fact.name for fact in query.wanted)
    found = [Query(wanted=[fact for fact in query.wanted if fact.name == name]) for name in names]
    found += [Query(unwanted=[fact]) for fact in dict.fromkeys(query.unwanted)]
    if query.price_min is not None:
        found.append(Query(price_min=query.price_min))
    if query.price_max is not None:
        found.append(Query(price_max=query.price_max))
    return found


def in_words(wish: Query) -> str:
    """One wish as the user would say it."""
    if wish.wanted:
        return f"{wish.wanted[0].name} {' or '.join(fact.value for fact in wish.wanted)}"
    if wish.unwanted:
        return f"not {wish.unwanted[0].name} {wish.unwanted[0].value}"
    if wish.price_min is not None:
        return f"price at least {wish.price_min:g}"
    return f"price at most {wish.price_max:g}"


def relaxations(catalogue: Catalogue, query: Query, possible: np.ndarray) -> list[Relaxation]:
    """Which wishes to drop so that anything fits: single ones, or pairs where no single one helps.

    An item that fails at exactly one wish is won by dropping that wish; so one pass over the catalogue per wish is
    enough for all drops, single and double.

    Args:
        catalogue: N items.
        query: what nothing fits.
        possible: bool [N]: items that could be recommended if there were no wish at all.

    Returns:
        The most items first, fewer dropped wishes before more; empty if not even two help.

    Example:
        Wishes red, cheap; the one red item is dear, two cheap ones are blue: dropping red gives 2, dropping cheap 1.
    """
    asked = wishes(query)
    if not asked:
        return []
    fails = ~np.stack([wish.allowed(catalogue) for wish in asked])  # [W, N]
    known = [catalogue.index[item] for item in (*query.liked, *query.disliked) if item in catalogue.index]
    open_ = possible & catalogue.available.astype(bool)
    open_[known] = False
    n_failed = fails.sum(0)  # [N]
    for n_dropped in (1, 2):
        found = []
        for drop in combinations(range(len(asked)), n_dropped):
            # what fails nowhere else; in a pair no item is won by one of the two alone, or singles would have helped
            won = open_ & (n_failed == fails[list(drop)].sum(0))
            if won.any():
                found.append(Relaxation(tuple(asked[i] for i in drop), int(won.sum())))
        if found:
            return sorted(found, key=lambda one: -one.items)
    return []
