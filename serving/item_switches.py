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
        self._lock = threading.Lock()  # what is stored last must be shown last
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
        rows_off, rows_on = item_rows(self._catalogue, off), item_rows(self._catalogue, on)
        with self._lock:
            if self._store is None:
                self.denied = (self.denied | frozenset(rows_off)) - frozenset(rows_on)
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
        with self._lock:
            self._show(self._store.disabled())

    def _show(self, item_ids: frozenset[str]) -> None:
        rows = frozenset(self._catalogue.index[item] for item in item_ids if item in self._catalogue.index)
        if rows != self.denied:
            log.info("disabled items: %d", len(rows))
            self.denied = rows
