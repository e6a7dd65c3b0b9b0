"""Small JPEGs of the catalogue's own pictures, made when first asked for and kept."""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from genrec.catalog import Catalogue
from genrec.errors import DataError
from genrec.pictures import load_picture

log = logging.getLogger(__name__)
SIDE = 320  # pixels of the longer side; smaller pictures keep their size
MAX_PIXELS = 40_000_000  # larger pictures are not decoded
KEPT = 2_000  # thumbnails in memory, some 15 kB each


def image_path(catalogue: Catalogue, row: int) -> str | None:
    """Where the gateway serves an item's picture; None if the catalogue has none."""
    if catalogue.images[row] is None:
        return None
    return f"/v1/items/{quote(catalogue.item_ids[row], safe='')}/image"


class Thumbnails:
    """A picture is decoded and written anew, so that nothing of the file but its pixels reaches a client."""

    def __init__(self) -> None:
        self.jpeg = lru_cache(KEPT)(self._jpeg)

    def _jpeg(self, path: str) -> bytes | None:
        """The JPEG of an item's picture, or None where it cannot be read.

        Args:
            path: of the catalogue, never a client's.
        """
        try:
            picture = load_picture(Path(path), MAX_PIXELS)
        except DataError as err:
            log.warning("no picture: %s", err)
            return None
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.info.clear()  # Pillow would write a comment again
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()
