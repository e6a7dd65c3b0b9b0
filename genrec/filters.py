"""A request's conditions as one bitmap over the catalogue, for `genrec.trie.Trie.filter`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

import numpy as np

from genrec.catalog import Catalogue
from genrec.errors import DataError

SHOWN = 5


def item_bitmap(
    catalogue: Catalogue,
    *,
    seen: list[int],
    categories: list[str] | None = None,
    price_min: float | None = None,
    price_max: float | None = None,
    allow: list[str] | None = None,
    deny: Collection[int] | None = None,
) -> np.ndarray:
    """The items that may be recommended; None leaves a condition out, availability always holds.

    Args:
        catalogue: N items.
        seen: catalogue rows that the user already had.
        categories: an item needs at least one of them.
        price_min: least price, inclusive; an item of unknown price fails any price condition.
        price_max: greatest price, inclusive.
        allow: item ids; every other item is out.
        deny: catalogue rows that are out.

    Returns:
        bool [N].

    Raises:
        DataError: a row, category or item id that the catalogue does not hold.
    """
    n_items = len(catalogue.item_ids)
    keep = catalogue.available.astype(bool, copy=True)
    if outside := [row for row in seen if not 0 <= row < n_items]:
        raise DataError(f"seen: rows {outside[:SHOWN]} are outside this catalogue's 0..{n_items - 1}")
    keep[np.asarray(seen, dtype=np.int64)] = False
    if deny:
        keep[np.fromiter(deny, np.int64, len(deny))] = False
    if categories is not None:
        wanted = set(categories)
        known: set[str] = set().union(*catalogue.categories)
        _check("categories", wanted, known)
        keep &= np.fromiter((not wanted.isdisjoint(own) for own in catalogue.categories), bool, n_items)
    if price_min is not None:
        keep &= catalogue.prices >= price_min  # NaN compares false
    if price_max is not None:
        keep &= catalogue.prices <= price_max
    if allow is not None:
        _check("allow", allow, catalogue.index)
        listed = np.zeros(n_items, bool)
        listed[[catalogue.index[item] for item in allow]] = True
        keep &= listed
    return keep


def _check(name: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    names = known if isinstance(known, (dict, set)) else set(known)
    unknown = sorted(value for value in wanted if value not in names)
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "take them from the catalogue"
        raise DataError(f"{name}: not in the catalogue: {unknown[:SHOWN]} ({len(unknown)} in all); {hint}")
