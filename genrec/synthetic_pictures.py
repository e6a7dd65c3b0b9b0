"""Pictures of the embedded catalogue: one shape, colour and pattern, drawn a little differently each time."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, both ways
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey")
PATTERNS = ("plain", "striped", "dotted", "chequered")
_HSV = (
    (0.0, 0.85, 0.85),
    (0.08, 0.95, 0.98),
    (0.155, 0.9, 0.95),
    (0.33, 0.8, 0.65),
    (0.49, 0.85, 0.7),
    (0.61, 0.85, 0.85),
    (0.76, 0.7, 0.7),
    (0.91, 0.5, 0.98),
    (0.06, 0.7, 0.42),
    (0.0, 0.0, 0.5),
)
_PERIOD = 8  # pixels from stripe to stripe, dot to dot


def _polygon(corners: int, inner: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon of radius 1 around 0; `inner` < 1 pulls every second one in (a star)."""
    return [
        (
            (inner if k % 2 else 1.0) * math.cos(turn + 2 * math.pi * k / corners),
            (inner if k % 2 else 1.0) * math.sin(turn + 2 * math.pi * k / corners),
        )
        for k in range(corners)
    ]


_UP = -math.pi / 2
_CORNERS = {
    "square": _polygon(4, 1.0, math.pi / 4),
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)],
    "star": _polygon(10, 0.42, _UP),
    "cross": [
        *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
        *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
    ],
}


def _outline(shape: str, centre: tuple[float, float], radius: float) -> Image.Image:
    """The shape as a mask of 0 and 255."""
    mask = Image.new("L", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(mask)
    x, y = centre

    def disc(dx: float, r: float, fill: int) -> None:
        draw.ellipse((x + dx - r, y - r, x + dx + r, y + r), fill=fill)

    if shape in _CORNERS:
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[shape]], fill=255)
    else:
        disc(0.0, radius, 255)
        if shape == "ring":
            disc(0.0, radius * 0.55, 0)
        elif shape == "crescent":
            disc(radius * 0.55, radius * 0.75, 0)
    return mask


def _marks(pattern: str, phase: tuple[int, int]) -> Image.Image:
    """The pattern's light marks over the whole picture as a mask of 0 and 255."""
    y, x = np.mgrid[:SIZE, :SIZE]
    u, v = (x + phase[0]) % _PERIOD, (y + phase[1]) % _PERIOD
    half = _PERIOD // 2
    marks = {
        "plain": np.zeros((SIZE, SIZE), dtype=bool),
        "striped": v < half,
        "dotted": (u - 3.5) ** 2 + (v - 3.5) ** 2 < 6.5,
        "chequered": (u < half) ^ (v < half),
    }[pattern]
    return Image.fromarray(marks.astype(np.uint8) * 255)


def draw_picture(shape: int, colour: int, pattern: int, rng: np.random.Generator) -> Image.Image:
    """One item's picture: a 64 x 64 RGB image on a pale ground.

    Args:
        shape: index into `SHAPES`.
        colour: index into `COLOURS`.
        pattern: index into `PATTERNS`.
        rng: jitters position, size, hue, brightness, ground and the pattern's phase.
    """
    hue, saturation, value = _HSV[colour]
    hue = (hue + rng.uniform(-0.012, 0.012)) % 1.0
    value = min(1.0, value * rng.uniform(0.95, 1.05))
    body = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    ground = np.clip(0.94 + rng.uniform(-0.04, 0.04) + rng.uniform(-0.01, 0.01, 3), 0, 1)
    light = 0.4 * body + 0.6
    centre = (float(SIZE / 2 + rng.uniform(-4, 4)), float(SIZE / 2 + rng.uniform(-4, 4)))
    mask = _outline(SHAPES[shape], centre, float(rng.uniform(21, 26)))
    marks = _marks(PATTERNS[pattern], (int(rng.integers(_PERIOD)), int(rng.integers(_PERIOD))))

    def solid(rgb: np.ndarray) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE), tuple(round(255 * float(c)) for c in rgb))

    return Image.composite(Image.composite(solid(light), solid(body), marks), solid(ground), mask)
