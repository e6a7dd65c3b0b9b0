"""Whether an export's folder still holds the export that was loaded from it, looked up now and then."""

from __future__ import annotations

import logging
import threading

from genrec.serving.export import Export

log = logging.getLogger(__name__)


class ExportWatch:
    """Looks on a daemon thread of its own, so that a disk that hangs holds nobody."""

    def __init__(self, export: Export, every_s: float) -> None:
        self.replaced = False
        self._export, self._every_s = export, every_s
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="genrec-export-watch", daemon=True).start()

    def close(self) -> None:
        """Let the thread end; waits for nobody."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            replaced = self._export.replaced()
            if replaced and not self.replaced:
                log.warning(
                    "%s holds another export now; answers stay those of the loaded one, restart to serve the new one",
                    self._export.folder,
                )
            self.replaced = replaced
