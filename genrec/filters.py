"""A request's conditions as one bitmap over the catalogue, for `genrec.trie.Trie.filter`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from genrec.catalog import Catalogue
from genrec.errors import DataError

SHOWN = 5
FEW = 1000  # names among which a similar one is looked for


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
        deny: catalogue rows that are out; those of items that came after this catalogue are passed over.

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
        rows = np.fromiter(deny, np.int64, len(deny))
        keep[rows[rows < n_items]] = False
    if categories is not None:
        check_names("categories", categories, catalogue.rows_of_category)
        listed = np.zeros(n_items, bool)
        for name in categories:
            listed[catalogue.rows_of_category[name]] = True
        keep &= listed
    if price_min is not None:
        keep &= catalogue.prices >= price_min  # NaN compares false
    if price_max is not None:
        keep &= catalogue.prices <= price_max
    if allow is not None:
        check_names("allow", allow, catalogue.index)
        listed = np.zeros(n_items, bool)
        listed[[catalogue.index[item] for item in allow]] = True
        keep &= listed
    return keep


def check_names(field: str, wanted: Iterable[str], known: Mapping[str, object]) -> None:
    """Refuse names that the catalogue does not hold; quick, whatever was sent.

    Raises:
        DataError: says which, and a similar one where the known ones are few.
    """
    unknown = sorted({name for name in wanted if name not in known})
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1) if len(known) <= FEW else []
        hint = f"did you mean {near[0]!r}?" if near else "take them from the catalogue"
        shown = [name[:100] for name in unknown[:SHOWN]]
        raise DataError(f"{field}: not in the catalogue: {shown} ({len(unknown)} in all); {hint}")
