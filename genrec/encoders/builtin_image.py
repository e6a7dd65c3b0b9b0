"""Built-in picture features, no download: colours, edges and a coarse copy, as one vector per picture.

The gradient part is a small histogram of oriented gradients (Dalal and Triggs, "Histograms of Oriented
Gradients for Human Detection", 2005); the colour part separates hue, weighted by saturation, from grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.features import Features
from genrec.pictures import load_picture

SIDE = 64  # pixels; every picture is brought to SIDE x SIDE
_CELLS = 4  # of the gradient grid, both ways
_ORIENTATIONS = 8  # over half a turn
_HUES = 16
_GREYS = 6
_COARSE = 8  # pixels of the coarse copy, both ways
_CHUNK = 64  # pictures described at a time
_MAX_PIXELS = 40_000_000


def _soft_histogram(values: np.ndarray, weights: np.ndarray, bins: int, wrap: bool) -> np.ndarray:
    """Weighted histograms with linear interpolation between neighbouring bins.

    Args:
        values: float [B, S] in 0..1.
        weights: float [B, S].
        bins: how many.
        wrap: the last bin is next to the first (angles).

    Returns:
        float [B, bins].
    """
    place = values * bins if wrap else values * (bins - 1)
    low = np.floor(place).astype(np.int64)
    part = place - low
    high = (low + 1) % bins if wrap else np.minimum(low + 1, bins - 1)
    low %= bins
    offset = np.arange(len(values))[:, None] * bins
    flat = np.bincount((offset + low).ravel(), (weights * (1 - part)).ravel(), len(values) * bins)
    flat += np.bincount((offset + high).ravel(), (weights * part).ravel(), len(values) * bins)
    return flat.reshape(len(values), bins)


def _blocks(pixels: np.ndarray) -> list[np.ndarray]:
    """Blocks of features, each float [B, width].

    Args:
        pixels: uint8 [B, SIDE, SIDE, 3], RGB.
    """
    n = len(pixels)
    rgb = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2), dtype=np.float32) / 255  # [3, B, SIDE, SIDE]
    red, green, blue = rgb
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, np.float32(1))
    hue = np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    hue = np.where(high == red, (green - blue) / safe, hue) / 6 % 1.0

    def flat(image: np.ndarray) -> np.ndarray:
        return image.reshape(n, -1)

    colour = _soft_histogram(flat(hue), flat(chroma), _HUES, wrap=True)
    grey = _soft_histogram(flat(high), flat(1 - chroma), _GREYS, wrap=False)
    # the gradient of the channel that changes most, [B, SIDE, SIDE]
    dy, dx = np.gradient(rgb, axis=(2, 3))
    size = np.hypot(dx, dy)
    strongest = size.argmax(axis=0)[None]
    dy, dx, size = (np.take_along_axis(of, strongest, axis=0)[0] for of in (dy, dx, size))
    angle = np.arctan2(dy, dx) / np.pi % 1.0
    cell = SIDE // _CELLS

    def cells(image: np.ndarray) -> np.ndarray:
        # [B, SIDE, SIDE] -> [B * cells, pixels of a cell]
        split = image.reshape(n, _CELLS, cell, _CELLS, cell).transpose(0, 1, 3, 2, 4)
        return split.reshape(n * _CELLS**2, cell * cell)

    edges = _soft_histogram(cells(angle), cells(size), _ORIENTATIONS, wrap=True).reshape(n, -1)
    texture = _soft_histogram(flat(angle), flat(size), 2 * _ORIENTATIONS, wrap=True)
    light = (red + green + blue) / 3
    coarse = light.reshape(n, _COARSE, SIDE // _COARSE, _COARSE, SIDE // _COARSE).mean(axis=(2, 4)).reshape(n, -1)
    channels = rgb.reshape(3, n, -1)
    centre = channels.mean(axis=2, keepdims=True)
    skew = np.cbrt(((channels - centre) ** 3).mean(axis=2))
    moments = [centre[..., 0].T, channels.std(axis=2).T, skew.T, flat(size).mean(axis=1, keepdims=True)]
    return [
        np.concatenate([colour, grey], axis=1),
        edges,
        texture,
        coarse - coarse.mean(axis=1, keepdims=True),
        np.concatenate(moments, axis=1),
    ]


def _describe(pixels: np.ndarray) -> list[np.ndarray]:
    """Blocks with every picture's block at length 1."""
    return [b / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-6) for b in _blocks(pixels)]


def encode_image_builtin(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Vectors float32 [N, 1, D]: blocks of length 1 per picture, columns standardised over the catalogue.

    Every block is scaled to the same total variance, so that distances do not depend on how wide a block is.
    Items without a picture are absent. Nothing is cached: small pictures take a millisecond or two each.

    Raises:
        DataError: a picture cannot be read.
    """
    blocks = _read(catalogue.images)
    width = sum(block.shape[1] for block in blocks)
    means, scales = [], []
    for block in blocks:
        spread = block.std(axis=0)
        means.append(block.mean(axis=0))
        scales.append(np.sqrt(width / (len(blocks) * block.shape[1])) / np.where(spread > 1e-6, spread, np.inf))
    fitted = {"means": np.concatenate(means), "scales": np.concatenate(scales)}
    return _standardised(catalogue.images, blocks, fitted)


def encode_image_fitted(images: Sequence[str | None], fitted: dict[str, np.ndarray]) -> Features:
    """The same features of later items' pictures, by what the fit on another catalogue left in `Features.fitted`.

    Raises:
        DataError: a picture cannot be read.
    """
    return _standardised(images, _read(images), fitted)


def _read(images: Sequence[str | None]) -> list[np.ndarray]:
    """Blocks of features of the pictures that there are; no block where there is none."""
    paths = [Path(path) for path in images if path is not None]
    parts = []
    for start in tqdm(range(0, len(paths), _CHUNK), desc="picture features", leave=False):
        pictures = [load_picture(path, _MAX_PIXELS) for path in paths[start : start + _CHUNK]]
        resized = [np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)) for p in pictures]
        parts.append(_describe(np.stack(resized)))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _standardised(images: Sequence[str | None], blocks: list[np.ndarray], fitted: dict[str, np.ndarray]) -> Features:
    present = np.array([path is not None for path in images])
    values = np.zeros((len(present), 1, len(fitted["means"])), dtype=np.float32)
    if blocks:
        values[present, 0] = (np.concatenate(blocks, axis=1) - fitted["means"]) * fitted["scales"]
    return Features(values, present, fitted)
