"""The newest state of the items, made from the export and from what clients sent: nothing here is shown to anybody.

An item is stored with its id and features, so that a restart and every other gateway on the store make the same state
of it without an encoder. Whoever writes has read all that was written before (`StoredItems.write` refuses others), so
ids never clash. Of an item that the export's own run holds, the stored row counts only if it was sent to this very
kind of export: a run that came later knows better. Other items that were sent to another export get new ids here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import numpy as np

from genrec.catalog import Catalogue, catalogue_of
from genrec.encoders.features import Features
from genrec.errors import ConfigError, DataError
from genrec.serving.export import Export
from genrec.serving.intake import INTAKE, Intake
from genrec.serving.item_state import ItemState
from genrec.serving.item_upsert import load_adapter, new_codes, with_items
from genrec.serving.problems import RefusalError
from genrec.serving.sent_item import SentItem
from genrec.serving.stored_items import ConflictError, StoredItem, StoredItems
from genrec.serving.uploads import Uploads
from genrec.serving.user_store import UserStore

log = logging.getLogger(__name__)
MAX_TEXT_CHARS = 20_000
ATTEMPTS = 5


class Stock:
    """Takes items and keeps up with the store. For one thread at a time."""

    def __init__(self, export: Export, store: UserStore | None, chats: bool) -> None:
        """
        Args:
            export: as it was loaded.
            store: keeps items; None: they end with this process.
            chats: whether there is a chat.

        Raises:
            StoreError: the store does not say what was sent.
            ArtefactError: the export's folder is damaged, or holds another export by now.
        """
        self._chats, self._uploads = chats, Uploads()
        self._stored = None if store is None else StoredItems(store)
        self._version = 0
        self._run = export.catalogue
        result = export.manifest["result"]
        self._key = str(result["items_key"])
        self._intake = Intake.load(export.folder / INTAKE) if result["intake"] else None
        self._adapter = load_adapter(export) if result["intake"] else None
        export.check_unchanged()
        self._export = export
        self._read()
        self.state = ItemState.of(self._export, chats)

    def catch_up(self) -> bool:
        """Take over what other gateways stored; whether that made another `state`.

        Raises:
            StoreError: locked or gone; the state stays.
        """
        self._read()
        if self._export is self.state.export:
            return False
        self.state = ItemState.of(self._export, self._chats)
        return True

    def _read(self) -> None:
        """Put into the export what others stored; store what had to be made here, so that it is the same everywhere."""
        if self._stored is None or self._intake is None:
            return
        while True:
            items, version = self._stored.newer(self._version)
            made_here = self._take(items)
            self._version = version
            try:
                if made_here:
                    self._version = self._stored.write(made_here, version)
                return
            except ConflictError:
                continue

    def upsert(self, sent: Sequence[SentItem]) -> tuple[int, int]:
        """Add items, or replace them; they are in `state` and on disk when this returns.

        Args:
            sent: with different ids.

        Returns:
            How many are new and how many were replaced.

        Raises:
            DataError: names the item and what is wrong with it; nothing changed.
            RefusalError: the export takes no items, an encoder cannot run here, no id is free, or others write all the
                time; nothing changed.
            StoreError: locked, full or gone; nothing changed.
        """
        if self._intake is None:
            text = "this export takes no later items; run the recipe with the items in its catalogue and export again"
            raise RefusalError(409, text, "items")
        for _ in range(ATTEMPTS):
            self.catch_up()
            items = self._catalogue(sent)
            try:
                features = self._intake.features(items)
                codes = new_codes(self._export, self._intake, items, features)
            except ConfigError as err:
                raise RefusalError(409, str(err), "items") from None
            export = with_items(self._export, self._intake, self._adapter, items, features, codes)
            state = ItemState.of(export, self._chats)
            try:
                if self._stored is not None:
                    rows = _rows(items, [item.picture for item in sent], self._key, codes, features)
                    self._version = self._stored.write(rows, self._version)
            except ConflictError:
                continue
            added = len(export.catalogue) - len(self._export.catalogue)
            self._export, self.state = export, state
            return added, len(sent) - added
        raise RefusalError(409, "other gateways changed items all the time; send these again", "items", 1)

    def _catalogue(self, sent: Sequence[SentItem]) -> Catalogue:
        """What was sent as items, with the pictures that they have then."""
        now, images, encoders = self._export.catalogue, [], self._intake.encoders if self._intake else {}
        for item in sent:
            image = None if item.item_id not in now.index else now.images[now.index[item.item_id]]
            if item.picture is not None:
                try:
                    image = str(self._uploads.keep(item.picture))
                except DataError as err:
                    raise DataError(f"item {item.item_id[:100]!r}: picture: {err}") from None
            elif image is not None and "image" in encoders and not os.path.isfile(image):
                raise DataError(f"item {item.item_id[:100]!r}: its picture is not here; send it as `picture`")
            images.append(image)
        return catalogue_of({item.item_id: item.fields for item in sent}, images, MAX_TEXT_CHARS)

    def _take(self, stored: Sequence[StoredItem]) -> list[StoredItem]:
        """Put stored items into the export; returns those whose id or features were made here."""
        assert self._intake is not None
        ours = [item for item in stored if item.items_key == self._key]
        foreign = [item for item in stored if item.items_key != self._key and item.item_id not in self._run.index]
        if ours:
            codes = np.stack([item.codes for item in ours])
            features = {name: self._stacked(name, ours) for name in self._intake.encoders}
            items = self._of_stored(ours)
            self._export = with_items(self._export, self._intake, self._adapter, items, features, codes)
        if not foreign:
            return []
        items = self._of_stored(foreign)
        held = [item_id in self._export.catalogue.index for item_id in items.item_ids]
        try:
            features = self._intake.features(items)
            codes = new_codes(self._export, self._intake, items, features)
        except (ConfigError, DataError) as err:
            log.error("%d items that were sent to another export are left out: %s", len(foreign), err)
            return []
        self._export = with_items(self._export, self._intake, self._adapter, items, features, codes)
        rows = _rows(items, [None] * len(items), self._key, codes, features)
        return [row for row, is_held in zip(rows, held, strict=True) if not is_held]

    def _of_stored(self, stored: Sequence[StoredItem]) -> Catalogue:
        now, images = self._export.catalogue, []
        for item in stored:
            image = None if item.item_id not in now.index else now.images[now.index[item.item_id]]
            images.append(image if item.picture is None else str(self._uploads.keep(item.picture)))
        return catalogue_of({item.item_id: item.fields for item in stored}, images, MAX_TEXT_CHARS)

    def _stacked(self, modality: str, stored: Sequence[StoredItem]) -> Features:
        """One modality's features of stored items."""
        assert self._intake is not None
        present = np.array([modality in item.features for item in stored])
        values = np.zeros((len(stored), *self._intake.encoders[modality].shape), np.float32)
        for row, item in enumerate(stored):
            if present[row]:
                values[row] = item.features[modality]
        return Features(values, present)


def _rows(
    items: Catalogue,
    pictures: Sequence[bytes | None],
    items_key: str,
    codes: np.ndarray,
    features: dict[str, Features],
) -> list[StoredItem]:
    """What is stored of items."""
    rows = []
    for row, item_id in enumerate(items.item_ids):
        price = float(items.prices[row])
        fields = {
            "title": items.titles[row],
            "description": items.descriptions[row],
            "categories": items.categories[row],
            "attributes": items.attributes[row],
            "price": None if math.isnan(price) else price,
            "available": bool(items.available[row]),
        }
        own = {name: of.values[row] for name, of in features.items() if of.present[row]}
        rows.append(StoredItem(item_id, fields, pictures[row], items_key, codes[row], own))
    return rows
