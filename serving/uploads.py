"""Pictures that clients sent, as files that encoders and thumbnails read; the user store keeps them for good."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path

from genrec.errors import DataError
from genrec.pictures import check_picture

MAX_BYTES = 256 * 1024
MAX_PIXELS = 16_000_000
SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


class Uploads:
    """A private folder that ends with this object; equal pictures are one file, whose name is their hash."""

    @cached_property
    def _folder(self) -> Path:
        """Made when first needed: a gateway that is sent no picture writes nowhere."""
        folder = Path(tempfile.mkdtemp(prefix="genrec-pictures-"))
        weakref.finalize(self, shutil.rmtree, folder, True)
        return folder

    def keep(self, picture: bytes) -> Path:
        """The file of a picture.

        Raises:
            DataError: no JPEG or PNG, too many bytes or pixels, or damaged.
        """
        kind = next((kind for begin, kind in SIGNATURES.items() if picture.startswith(begin)), None)
        if kind is None or len(picture) > MAX_BYTES:
            found = f"{len(picture)} bytes" if kind else "neither"
            raise DataError(f"expected a JPEG or PNG of at most {MAX_BYTES} bytes, found {found}; shrink or convert it")
        file = self._folder / f"{hashlib.sha256(picture).hexdigest()}.{kind}"
        if not file.exists():
            new = file.with_suffix(".new")
            new.write_bytes(picture)
            if (reason := check_picture(new, MAX_PIXELS)) is not None:
                new.unlink()
                raise DataError(f"{reason}; expected a whole JPEG or PNG of at most {MAX_PIXELS} pixels")
            new.replace(file)
        return file
