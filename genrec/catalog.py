"""The catalogue: what can be recommended, one row per item; the row number is the item's index everywhere."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from genrec.errors import ArtefactError, DataError
from genrec.pictures import check_picture
from genrec.quarantine import Quarantine
from genrec.tables import read_table, text_column

log = logging.getLogger(__name__)
FIELDS = ("item_id", "title", "description", "categories", "attributes", "price", "images", "available", "copy")
_FILE = "catalog.parquet"
_SCHEMA = pa.schema(
    {
        "item_id": pa.string(),
        "title": pa.string(),
        "description": pa.string(),
        "categories": pa.list_(pa.string()),
        "attributes": pa.map_(pa.string(), pa.string()),
        "price": pa.float32(),
        "image": pa.string(),
        "available": pa.bool_(),
    }
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and halves of surrogate pairs
_YES = {"true", "1", "1.0", "yes", "y", "t"}
_NO = {"false", "0", "0.0", "no", "n", "f"}


@dataclass(frozen=True)
class Catalogue:
    """Every item, column by column, in file order.

    Attributes:
        item_ids: unique ids.
        titles: text, empty where unknown.
        descriptions: text, empty where unknown.
        categories: each item's categories, in the file's order.
        attributes: name -> value.
        prices: float32 [N], NaN where unknown.
        images: absolute path of the item's first readable picture, or None.
        available: bool [N].
        copies: what people wrote to describe the items, empty where there is none; None: the file has no such column.
            Not part of an item's text: it is what a description should say.
    """

    item_ids: list[str]
    titles: list[str]
    descriptions: list[str]
    categories: list[list[str]]
    attributes: list[dict[str, str]]
    prices: np.ndarray
    images: list[str | None]
    available: np.ndarray
    copies: list[str] | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """item_id -> row."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def rows_of_category(self) -> dict[str, np.ndarray]:
        """category -> int64 rows of the items in it."""
        rows: dict[str, list[int]] = {}
        for row, names in enumerate(self.categories):
            for name in names:
                rows.setdefault(name, []).append(row)
        return {name: np.array(of) for name, of in rows.items()}

    @cached_property
    def rows_of_fact(self) -> dict[tuple[str, str], list[int]]:
        """(attribute, value) -> rows of the items that have it; a category is a value of the attribute "category"."""
        rows: dict[tuple[str, str], list[int]] = {}
        for row, (attributes, categories) in enumerate(zip(self.attributes, self.categories, strict=True)):
            facts = [fact for fact in attributes.items() if fact[1]]
            for fact in dict.fromkeys([*facts, *(("category", name) for name in categories)]):
                rows.setdefault(fact, []).append(row)
        return rows

    def merged(self, other: Catalogue) -> Catalogue:
        """These items, those that `other` has too as it has them, and then its new ones: rows keep their numbers."""
        rows = np.array([self.index.get(item_id, -1) for item_id in other.item_ids], np.int64)
        new = np.flatnonzero(rows < 0).tolist()
        both = [(int(row), at) for at, row in enumerate(rows) if row >= 0]

        def column(own: list[Any], its: list[Any]) -> list[Any]:
            values = [*own, *(its[at] for at in new)]
            for row, at in both:
                values[row] = its[at]
            return values

        prices = np.concatenate([self.prices, other.prices[new]])
        available = np.concatenate([self.available, other.available[new]])
        for row, at in both:
            prices[row], available[row] = other.prices[at], other.available[at]
        copies = None
        if self.copies is not None or other.copies is not None:
            copies = column(self.copies or [""] * len(self), other.copies or [""] * len(other))
        return Catalogue(
            item_ids=column(self.item_ids, other.item_ids),
            titles=column(self.titles, other.titles),
            descriptions=column(self.descriptions, other.descriptions),
            categories=column(self.categories, other.categories),
            attributes=column(self.attributes, other.attributes),
            prices=prices,
            images=column(self.images, other.images),
            available=available,
            copies=copies,
        )

    def texts(self) -> list[str]:
        """One text per item: title, categories, attributes, price and description, where known."""
        return ["\n".join(filter(None, self._parts(row))) for row in range(len(self))]

    def _parts(self, row: int) -> list[str]:
        price = float(self.prices[row])
        return [
            self.titles[row],
            f"Categories: {', '.join(self.categories[row])}" if self.categories[row] else "",
            *(f"{name}: {value}" for name, value in self.attributes[row].items()),
            "" if math.isnan(price) else f"Price: {price:.2f}",
            self.descriptions[row],
        ]

    def save(self, folder: Path) -> None:
        """Write ``catalog.parquet`` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = [
            self.item_ids,
            self.titles,
            self.descriptions,
            self.categories,
            [list(pairs.items()) for pairs in self.attributes],
            self.prices,
            self.images,
            self.available,
        ]
        arrays = [pa.array(values, kind) for values, kind in zip(columns, _SCHEMA.types, strict=True)]
        table = pa.table(arrays, schema=_SCHEMA)
        if self.copies is not None:
            table = table.append_column("copy", pa.array(self.copies, pa.string()))
        pa.parquet.write_table(table, folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read what `save` wrote.

        Raises:
            ArtefactError: there is no catalogue in `folder`, or it is damaged.
        """
        try:
            kept = pa.parquet.read_table(folder / _FILE)
            table = kept.select(_SCHEMA.names).cast(_SCHEMA)
        except (OSError, pa.ArrowInvalid, ValueError, KeyError) as err:
            raise ArtefactError(f"{folder / _FILE}: no catalogue there ({err}); run `genrec run`") from err
        return cls(
            item_ids=table["item_id"].to_pylist(),
            titles=table["title"].to_pylist(),
            descriptions=table["description"].to_pylist(),
            categories=table["categories"].to_pylist(),
            attributes=[dict(pairs) for pairs in table["attributes"].to_pylist()],
            prices=table["price"].to_numpy(),
            images=table["image"].to_pylist(),
            available=np.array(table["available"].to_pylist(), bool),
            copies=kept["copy"].to_pylist() if "copy" in kept.column_names else None,
        )


def read_catalogue(
    path: Path, columns: dict[str, str], *, max_bad_share: float, max_text_chars: int, max_pixels: int
) -> tuple[Catalogue, Quarantine]:
    """Read a catalogue and set its bad rows aside.

    A picture that is not there is a missing modality, not an error. One that cannot be decoded is noted in
    quarantine, and the item stays.

    Args:
        path: JSONL, CSV or Parquet.
        columns: our field -> their column, where the names differ.
        max_bad_share: stop when more of the rows than this are bad.
        max_text_chars: longest title, description or copy, in characters.
        max_pixels: largest picture, in pixels.

    Raises:
        DataError: the file cannot be read, has no item ids, is empty, or too many of its rows are bad.
    """
    path = Path(path)
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise DataError(f"{path}: item_columns maps unknown fields {unknown}; the fields are {list(FIELDS)}")
    table = read_table(path, columns)
    if table.num_rows == 0:
        raise DataError(f"{path}: the catalogue is empty; expected one row per item")
    if "item_id" not in table.column_names:
        raise DataError(
            f"{path}: no item_id column; the columns there are {table.column_names}. Name yours in "
            "the recipe (data.item_columns: {item_id: YOUR_COLUMN}) or let `genrec init` propose it"
        )
    table = table.set_column(table.column_names.index("item_id"), "item_id", text_column(table["item_id"]))
    bad = Quarantine(path, table.num_rows)
    good: dict[str, dict[str, Any]] = {}
    origin: list[tuple[int, dict[str, Any]]] = []
    for number, raw in enumerate(table.to_pylist(), 1):
        item_id = raw["item_id"]
        try:
            if item_id is None:
                raise _BadRowError("no item_id")
            if item_id in good:
                raise _BadRowError("duplicate item_id")
            good[item_id] = _parse(raw, max_text_chars)
        except RecursionError:
            bad.add(number, item_id, "nested too deeply", raw)
        except _BadRowError as err:
            bad.add(number, item_id, str(err), raw)
        else:
            origin.append((number, raw))
    images = _first_readable(path, [item["images"] for item in good.values()], origin, bad, max_pixels)
    bad.check(max_bad_share)
    if not good:
        raise DataError(f"{path}: none of the {bad.n_rows} rows is usable: {bad.counts}")
    catalogue = _of_rows(good, images, with_copies="copy" in table.column_names)
    log.info("%s: %d items, %d with a picture", path, len(good), len(good) - images.count(None))
    return catalogue, bad


def catalogue_of(rows: Mapping[str, Mapping[str, Any]], images: list[str | None], max_text_chars: int) -> Catalogue:
    """Items that somebody sends, read as a file's are; one bad row is an error.

    Args:
        rows: item id -> the other `FIELDS`; missing ones are unknown.
        images: a checked picture's path per item, or None.
        max_text_chars: as for `read_catalogue`.

    Raises:
        DataError: names the first bad item and what is wrong.
    """
    good = {}
    for item_id, raw in rows.items():
        try:
            good[item_id] = _parse(raw, max_text_chars)
        except _BadRowError as err:
            raise DataError(f"item {item_id[:100]!r}: {err}") from None
    return _of_rows(good, images, with_copies=any("copy" in raw for raw in rows.values()))


def _of_rows(good: Mapping[str, Mapping[str, Any]], images: list[str | None], with_copies: bool) -> Catalogue:
    items = list(good.values())
    return Catalogue(
        item_ids=list(good),
        titles=[item["title"] for item in items],
        descriptions=[item["description"] for item in items],
        categories=[item["categories"] for item in items],
        attributes=[item["attributes"] for item in items],
        prices=np.array([item["price"] for item in items], np.float32),
        images=images,
        available=np.array([item["available"] for item in items], bool),
        copies=[item["copy"] for item in items] if with_copies else None,
    )


class _BadRowError(Exception):
    """The row's problem, in words that can be counted."""


def _parse(raw: Mapping[str, Any], max_text_chars: int) -> dict[str, Any]:
    item: dict[str, Any] = {}
    for name in ("title", "description", "copy"):
        item[name] = _text(raw.get(name))
        if len(item[name]) > max_text_chars:
            raise _BadRowError(f"{name} too long")
    item["categories"] = list(dict.fromkeys(_strings(raw.get("categories"), split="|")))
    item["attributes"] = _attributes(raw.get("attributes"))
    item["images"] = _strings(raw.get("images"), split=None)
    item["price"] = _price(raw.get("price"))
    item["available"] = _available(raw.get("available"))
    return item


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    if isinstance(value, bool):
        return str(value).lower()
    return CONTROL.sub("", str(value))


def _strings(value: Any, split: str | None) -> list[str]:
    """A list, JSON text of a list, or plain text (parted at `split`) as a flat list of texts."""
    if isinstance(value, str):
        parsed = _json(value, "[")
        if parsed is None:
            value = value.split(split) if split else [value]
        else:
            value = parsed
    if isinstance(value, list):
        return [
            text
            for part in value
            for text in (_strings(part, None) if isinstance(part, list) else [_text(part).strip()])
            if text
        ]
    text = _text(value).strip()
    return [text] if text else []


def _attributes(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        if not value.strip():
            return {}
        value = _json(value, "{")
        if value is None:
            raise _BadRowError("attributes are not a JSON object")
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):  # Arrow's map type
        value = dict(value)
    if not isinstance(value, dict):
        raise _BadRowError("attributes are not a JSON object")
    texts = {
        _text(name): ", ".join(_strings(part, None)) if isinstance(part, list) else _text(part)
        for name, part in value.items()
    }
    return {name: text for name, text in texts.items() if name and text}


def _json(text: str, opening: str) -> Any:
    if not text.lstrip().startswith(opening):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _price(value: Any) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        price = float(value.strip().lstrip("$€£¥ ") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise _BadRowError("price is not a number") from None
    if math.isinf(price) or price > float(np.finfo(np.float32).max):
        raise _BadRowError("price is not finite")
    if price < 0:
        raise _BadRowError("price is negative")
    return price


def _available(value: Any) -> bool:
    text = "true" if value is None else str(value).strip().lower()
    if text in _YES or not text:
        return True
    if text in _NO:
        return False
    raise _BadRowError("available is neither true nor false")


def _first_readable(
    path: Path,
    listed: list[list[str]],
    origin: list[tuple[int, dict[str, Any]]],
    bad: Quarantine,
    max_pixels: int,
) -> list[str | None]:
    """The first listed picture of each item that can be decoded; the others' problems go into `bad`."""
    folder = path.resolve().parent

    def check(names: list[str]) -> tuple[str | None, list[str]]:
        problems: list[str] = []
        for name in names:
            file = folder / name
            if not os.path.isfile(file):
                continue
            reason = check_picture(file, max_pixels)
            if reason is None:
                return str(file), problems
            problems.append(reason)
        return None, problems

    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        checked = list(pool.map(check, listed, chunksize=64))
    for (number, raw), (_, problems) in zip(origin, checked, strict=True):
        for reason in dict.fromkeys(problems):
            bad.add(number, raw["item_id"], reason, raw)
    images = [image for image, _ in checked]
    n_listed = sum(map(bool, listed))
    if n_listed and not any(images):
        log.warning(
            "%s: %d items list pictures, and none can be read; paths are relative to %s",
            path,
            n_listed,
            folder,
        )
    return images
