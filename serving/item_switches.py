"""Items that are disabled while the gateway runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from genrec.catalog import Catalogue
from genrec.serving.resolve import item_rows
from genrec.serving.user_store import UserStore

log = logging.getLogger(__name__)


class ItemSwitches:
    """The catalogue rows that nobody may be recommended, as one set that is replaced and never changed.

    Whoever reads `denied` once sees all of a change or nothing of it. With a store the set outlives the process and
    reaches other gateways on the same store at their next `refresh`.
    """

    def __init__(self, catalogue: Catalogue, store: UserStore | None = None) -> None:
        """
        Raises:
            StoreError: the store does not say what is disabled.
        """
        self._catalogue, self._store = catalogue, store
        self._order = threading.Lock()  # what is stored last must be shown last
        self._showing = threading.Lock()  # held for no time: the engine's thread takes it
        self._item_ids: frozenset[str] = frozenset()
        self.denied: frozenset[int] = frozenset()
        self.refresh()

    def change(self, disable: Iterable[str], enable: Iterable[str]) -> int:
        """Disable and enable items.

        Returns:
            How many are disabled now.

        Raises:
            DataError: unknown item ids; nothing changed.
            StoreError: the change could not be stored; nothing changed.
        """
        off, on = list(disable), list(enable)
        item_rows(self._catalogue, [*off, *on])
        with self._order:
            if self._store is None:
                self._show((self._item_ids | frozenset(off)) - frozenset(on))
            else:
                self._show(self._store.switch(off, on))
            return len(self.denied)

    def refresh(self) -> None:
        """Take over what other gateways stored.

        Raises:
            StoreError: locked or gone; the set stays.
        """
        if self._store is None:
            return
        with self._order:
            self._show(self._store.disabled())

    def adopt(self, catalogue: Catalogue) -> None:
        """Go by a catalogue that has grown: an item that comes may have been disabled before."""
        self._show(None, catalogue)

    def _show(self, item_ids: frozenset[str] | None, catalogue: Catalogue | None = None) -> None:
        """Change either; None stays."""
        with self._showing:
            self._catalogue = self._catalogue if catalogue is None else catalogue
            self._item_ids = self._item_ids if item_ids is None else item_ids
            index = self._catalogue.index
            rows = frozenset(index[item] for item in self._item_ids if item in index)
            if rows != self.denied:
                log.info("disabled items: %d", len(rows))
                self.denied = rows
