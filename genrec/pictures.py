"""Pictures from files that nobody has vetted: size checked before decoding, truncation found, always RGB."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from genrec.errors import DataError

# No EPS or PDF: Pillow hands those to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_THUMBNAIL = (64, 64)


def load_picture(path: Path, max_pixels: int) -> Image.Image:
    """Decode a picture.

    Args:
        path: a JPEG, PNG, WebP, GIF (first frame), BMP, TIFF or AVIF file.
        max_pixels: a picture with more pixels in its header is refused before it is decoded.

    Returns:
        An RGB image, upright by its EXIF orientation; transparent parts are white.

    Raises:
        DataError: the picture is missing, too large, truncated, damaged, or no picture at all.
    """
    try:
        with _open(path, max_pixels) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            layer = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    except DataError:
        raise
    except Exception as err:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise _damaged(path, err) from err


def check_picture(path: Path, max_pixels: int) -> str | None:
    """None when the picture can be decoded, else the reason; faster than `load_picture` on large JPEGs.

    Returns:
        One of ``"picture too large"``, ``"picture truncated"``, ``"picture damaged"``, ``"not a picture"``.
    """
    try:
        with _open(path, max_pixels) as image:
            image.draft("RGB", _THUMBNAIL)  # every byte is still read, so truncation shows
            image.load()
    except PictureError as err:
        return err.reason
    except Exception as err:  # as in load_picture
        return _damaged(path, err).reason
    return None


class PictureError(DataError):
    """A picture that cannot be used; `reason` is a short text that can be counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _open(path: Path, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        found = re.search(r"\d+", str(err))
        raise _too_large(path, found.group() if found else "too many", max_pixels) from err
    if image.width * image.height > max_pixels:
        image.close()
        raise _too_large(path, str(image.width * image.height), max_pixels)
    return image


def _too_large(path: Path, found: str, max_pixels: int) -> PictureError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    hint = f" (Pillow itself refuses more than {limit})" if limit else ""
    return PictureError(
        "picture too large",
        f"{path}: the picture has {found} pixels, more than data.max_pixels = {max_pixels}; "
        f"shrink it or raise data.max_pixels{hint}",
    )


def _damaged(path: Path, err: Exception) -> PictureError:
    if isinstance(err, UnidentifiedImageError):
        return PictureError("not a picture", f"{path}: not a picture; expected one of {', '.join(_FORMATS)}")
    reason = "picture truncated" if "truncated" in str(err).lower() else "picture damaged"
    return PictureError(reason, f"{path}: {reason} ({err}); replace the file or remove it from the item")
