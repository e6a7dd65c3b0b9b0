import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from genrec.errors import DataError
from genrec.pictures import check_picture, load_picture


def noise(size=(40, 30), mode="RGB"):
    rng = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], channels), np.uint8), mode)


def write_bomb(path, width, height):
    """A PNG whose header promises far more pixels than its few bytes hold."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_give_the_pixels_back(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise().save(path, lossless=True)
    loaded = load_picture(path, 10_000)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(noise()))
    assert check_picture(path, 10_000) is None


def test_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    noise().save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(load_picture(tmp_path / "turned.png", 10_000)), np.rot90(np.asarray(noise()), -1)
    )
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png", 10).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise((300, 300)).save(path)
    assert check_picture(path, 100_000) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert check_picture(path, 100_000) in ("picture truncated", "picture damaged")
    with pytest.raises(DataError, match=rf"a\.{suffix}: picture (truncated|damaged).*replace the file"):
        load_picture(path, 100_000)


def test_truncated_jpeg_says_so(tmp_path):
    noise((300, 300)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20_000])
    assert check_picture(tmp_path / "a.jpg", 100_000) == "picture truncated"


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize(("side", "max_pixels"), [(200, 39_999), (10_000, 40_000_000), (60_000, 40_000_000)])
def test_bombs_are_refused_by_their_header(tmp_path, side, max_pixels, action):
    warnings.simplefilter(action)  # pytest restores the filters; Pillow warns at one limit and refuses at another
    write_bomb(tmp_path / "a.png", side, side)
    assert check_picture(tmp_path / "a.png", max_pixels) == "picture too large"
    with pytest.raises(DataError, match=rf"a\.png: the picture has {side * side} pixels, .*max_pixels = {max_pixels}"):
        load_picture(tmp_path / "a.png", max_pixels)
    if side == 200:  # the control: one more pixel allowed, and only the missing data is wrong
        assert check_picture(tmp_path / "a.png", max_pixels + 1) == "picture truncated"


def test_not_a_picture(tmp_path):
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert check_picture(tmp_path / "a.jpg", 100) == "not a picture"
    with pytest.raises(DataError, match=r"a\.jpg: not a picture; expected one of JPEG, PNG"):
        load_picture(tmp_path / "a.jpg", 100)
    with pytest.raises(DataError, match=r"none\.jpg"):
        load_picture(tmp_path / "none.jpg", 100)
