"""Items that were sent while serving, in the user store: on disk before `write` returns, in one order for everybody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from safetensors.numpy import load, save

from genrec.serving.user_store import UserStore

_TABLES = sa.MetaData()
_ITEMS = sa.Table(
    "genrec_items",
    _TABLES,
    sa.Column("item_id", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),  # by first arrival; later ones change it no more
    sa.Column("version", sa.BigInteger, nullable=False),  # of the table, when this row was written last
    sa.Column("fields", sa.Text, nullable=False),  # JSON
    sa.Column("picture", sa.LargeBinary),
    sa.Column("items_key", sa.Text, nullable=False),
    sa.Column("codes", sa.Text, nullable=False),  # JSON
    sa.Column("features", sa.LargeBinary, nullable=False),  # safetensors
    sa.Index("genrec_items_by_version", "version"),
)


class ConflictError(Exception):
    """Another gateway wrote items meanwhile."""


@dataclass(frozen=True)
class StoredItem:
    """An item as it was sent, and what one kind of export made of it.

    Attributes:
        item_id: its id.
        fields: of the catalogue, JSON-able.
        picture: the file's bytes; None: sent without one, now and before.
        items_key: of the export that gave codes and features, see its manifest.
        codes: int32 [L].
        features: modality -> float32 [T_m, D_m]; without those that the item lacks.
    """

    item_id: str
    fields: dict[str, Any]
    picture: bytes | None
    items_key: str
    codes: np.ndarray
    features: dict[str, np.ndarray]


class StoredItems:
    """The table. Safe to call from several threads."""

    def __init__(self, store: UserStore) -> None:
        """Open or make the table beside the store's.

        Raises:
            StoreError: locked or gone.
        """
        self._store = store
        with store.errors():
            _TABLES.create_all(store.database)

    def newer(self, version: int) -> tuple[list[StoredItem], int]:
        """The items that were written after a version of the table (0: all), by first arrival, and its version now.

        Raises:
            StoreError: locked or gone.
        """
        query = sa.select(_ITEMS).where(_ITEMS.c.version > version).order_by(_ITEMS.c.number)
        with self._store.reading() as connection:
            rows = connection.execute(query).all()
        items = [
            StoredItem(
                item_id=row.item_id,
                fields=json.loads(row.fields),
                picture=row.picture,
                items_key=row.items_key,
                codes=np.array(json.loads(row.codes), np.int32),
                features=load(row.features),
            )
            for row in rows
        ]
        return items, max((int(row.version) for row in rows), default=version)

    def write(self, items: Sequence[StoredItem], version: int) -> int:
        """Add items or replace them, all or none; a picture stays where None comes.

        Args:
            items: by arrival.
            version: of the table, as the writer knows it.

        Returns:
            The table's version now.

        Raises:
            ConflictError: the table has another version; nothing changed.
            StoreError: locked, full or gone; nothing changed.
        """
        insert = self._store.insert(_ITEMS)
        new = {name: insert.excluded[name] for name in ("version", "fields", "items_key", "codes", "features")}
        new["picture"] = sa.func.coalesce(insert.excluded.picture, _ITEMS.c.picture)
        insert = insert.on_conflict_do_update(index_elements=["item_id"], set_=new)
        with self._store.writing() as connection:
            if connection.dialect.name == "postgresql":  # readers go on, writers wait for each other
                connection.execute(sa.text("LOCK TABLE genrec_items IN EXCLUSIVE MODE"))
            else:  # takes SQLite's one lock for writing, so that what is read next stays so
                connection.execute(sa.delete(_ITEMS).where(sa.false()))
            newest = sa.select(sa.func.max(_ITEMS.c.version), sa.func.max(_ITEMS.c.number))
            found, number = connection.execute(newest).one()
            if (found or 0) != version:
                raise ConflictError
            for place, item in enumerate(items, 1):
                values = {
                    "item_id": item.item_id,
                    "number": (number or 0) + place,
                    "version": version + 1,
                    "fields": json.dumps(item.fields),
                    "picture": item.picture,
                    "items_key": item.items_key,
                    "codes": json.dumps(item.codes.tolist()),
                    "features": save({name: np.ascontiguousarray(of) for name, of in item.features.items()}),
                }
                connection.execute(insert, values)
        return version + 1
