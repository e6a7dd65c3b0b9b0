"""A run's report.html: one file with its tables, figures and a dozen users, readable without a network."""

from __future__ import annotations

import base64
import importlib.resources
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from genrec.artefacts import write_text
from genrec.evaluate import cells

log = logging.getLogger(__name__)
THUMBNAIL_PX = 96
THUMBNAIL_BUDGET = 2_000_000  # characters of data URIs per report; later pictures become placeholders
MAX_EXAMPLES, MAX_SHOWN, MAX_TEXTS = 12, 10, 10
MAX_POINTS = 300
INK, ACCENT = "#010203", "#010204"  # stand-ins in the figures, replaced by the page's own colours
NOT_DRAWN = ("step", "epoch", "learning_rate")  # the axis, and what the recipe says
FOREST_METRICS = ("recall@10", "ndcg@10")


@dataclass(frozen=True)
class Shown:
    """One item as the report shows it."""

    item_id: str
    title: str
    image: str | None = None
    hit: bool = False


@dataclass(frozen=True)
class Example:
    """One user: what they had, what was recommended (best first), what they took."""

    user_id: str
    group: str | None = None
    history: list[Shown] = field(default_factory=list)
    recommended: list[Shown] = field(default_factory=list)
    taken: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """One text as the model wrote it.

    Attributes:
        item: what it is about.
        user_id: for whom.
        history: what they had, oldest first.
        style: that was asked for.
        text: the model's.
        reference: what a perfect writer, or a person, wrote.
    """

    item: Shown
    user_id: str
    history: list[Shown]
    style: str
    text: str
    reference: str


@dataclass(frozen=True)
class Texts:
    """The texts of one task: how good they are, and some of them as they came out.

    Attributes:
        task: its name.
        metrics: name -> {"mean", "ci95"}, see `genrec.text_quality.measure`.
        examples: not chosen by how good they are.
    """

    task: str
    metrics: dict[str, Any]
    examples: list[Written]


def write_report(
    path: Path,
    *,
    title: str,
    metrics: dict[str, Any],
    curves: dict[str, list[dict[str, Any]]],
    sid_report: dict[str, Any],
    examples: list[Example],
    settings: dict[str, Any],
    texts: Sequence[Texts] = (),
) -> None:
    """Write the report, whole or not at all, well under 3 MB.

    Args:
        path: the .html file.
        title: the run's name.
        metrics: metrics.json, see `genrec.evaluate.evaluate`.
        curves: part of the training -> points with ``step`` and numbers to draw, such as ``loss``.
        sid_report: ``SemanticIds.report``: single values, and ``levels`` with one dictionary per level.
        examples: users to show; the first twelve are, with their newest and best ten items.
        settings: the resolved recipe.
        texts: what the model wrote, task by task; the first ten examples of each are shown.

    Raises:
        ArtefactError: the disk is full or the folder is read-only; the old report is untouched.
    """
    groups = [
        (f"{name} ({block['users']} users)", _table(block, "models"))
        for name, block in metrics.get("groups", {}).items()
        if block["models"]
    ]
    page = _environment().from_string(
        importlib.resources.files("genrec").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    html = page.render(
        title=title,
        metrics=metrics,
        table=_table(metrics, "models"),
        differences=_table(metrics, "paired"),
        forest=_forest(metrics["paired"]),
        groups=groups,
        curves=_curves(curves),
        sid_values={name: value for name, value in sid_report.items() if not isinstance(value, list | dict)},
        sid_levels=sid_report.get("levels", []),
        texts=[(of.task, _values(of.metrics), of.examples[:MAX_TEXTS]) for of in texts],
        examples=[_clip(example) for example in examples[:MAX_EXAMPLES]],
        picture=_Pictures().uri,
        settings=list(_flat(settings)),
    )
    write_text(path, html)
    log.info("%s: %.2f MB", path, len(html.encode()) / 1e6)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    return environment


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clip(example: Example) -> Example:
    return Example(
        example.user_id,
        example.group,
        example.history[-MAX_SHOWN:],
        example.recommended[:MAX_SHOWN],
        example.taken[:MAX_SHOWN],
    )


def _table(block: dict[str, Any], part: str) -> dict[str, Any]:
    """Header, rows of (text, interval) and the name of the best fitted model, for one table of the page."""
    header, rows = cells(block, part, "|{} to {}")
    best = None
    fitted = {name: of for name, of in block["models"].items() if name != "oracle" and "ndcg@10" in of}
    if part == "models" and fitted:
        best = max(fitted, key=lambda name: fitted[name]["ndcg@10"]["mean"])
    return {"header": header, "rows": [[cell.split("|") for cell in row] for row in rows], "best": best}


def _values(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same for named values with their intervals."""
    rows = []
    for name, value in metrics.items():
        ends = "|{:.3f} to {:.3f}".format(*value["ci95"]) if value["ci95"] else ""
        rows.append([[name], f"{value['mean']:.3f}{ends}".split("|")])
    return {"header": ["measure", "mean"], "rows": rows, "best": None}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of dotted name and value."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


class _Pictures:
    """Thumbnails as data URIs, each file read once, until the budget is spent."""

    def __init__(self) -> None:
        self.known: dict[str, str | None] = {}
        self.spent = 0

    def uri(self, path: str | None) -> str | None:
        """A JPEG data URI of a picture, or None where there is none to show."""
        if path is None:
            return None
        if path not in self.known:
            self.known[path] = self._read(path)
        uri = self.known[path]
        if uri is None or self.spent + len(uri) > THUMBNAIL_BUDGET:
            return None
        self.spent += len(uri)
        return uri

    def _read(self, path: str) -> str | None:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        except (OSError, ValueError, Image.DecompressionBombError) as err:
            log.warning("%s: no thumbnail in the report (%s)", path, err)
            return None
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=70, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _svg(figure: Figure, label: str) -> Markup:
    """A figure as inline SVG in the page's colours, with `label` for those who cannot see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor").replace(ACCENT, "var(--accent)")
    return Markup(drawing.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _axes(figure: Figure, rows: int, columns: int) -> list[Any]:
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.tick_params(colors=INK, labelsize=9)
        for side, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return axes


def _forest(pairs: dict[str, Any]) -> Markup | None:
    """Paired differences as points with intervals, one panel per metric; None without pairs."""
    shown = [metric for metric in FOREST_METRICS if any(metric in of for of in pairs.values())]
    if not shown:
        return None
    figure = Figure(figsize=(4.2 * len(shown) + 1, 0.34 * len(pairs) + 1.1), layout="constrained")
    names = list(pairs)[::-1]
    for column, (ax, metric) in enumerate(zip(_axes(figure, 1, len(shown)), shown, strict=True)):
        ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        for row, name in enumerate(names):
            value = pairs[name].get(metric)
            if value is not None:
                ax.plot(value["ci95"], [row, row], color=ACCENT, linewidth=2)
                ax.plot(value["mean"], row, "o", color=ACCENT, markersize=5)
        ax.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), parse_math=False)
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.set_title(f"difference in {metric}", fontsize=10, color=INK)
    return _svg(figure, "Paired differences with 95 % intervals: " + ", ".join(pairs))


def _curves(curves: dict[str, list[dict[str, Any]]]) -> Markup | None:
    """One panel per curve and number in it, over optimiser steps; None without points."""
    panels: list[tuple[str, list[float], list[float]]] = []
    for part, points in curves.items():
        keys = dict.fromkeys(key for point in points for key in point if key not in NOT_DRAWN)
        for key in keys:
            kept = [(p["step"], p[key]) for p in points if _finite(p.get(key)) and _finite(p.get("step"))]
            if kept:
                every = math.ceil(len(kept) / MAX_POINTS)
                steps, numbers = zip(*(kept[::every] + kept[-1:]), strict=True)
                panels.append((f"{part}: {key}", list(steps), list(numbers)))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
    axes = _axes(figure, rows, columns)
    for ax, (name, xs, ys) in zip(axes, panels, strict=False):
        marker = "o" if len(xs) < 15 else None
        ax.plot(xs, ys, color=ACCENT, linewidth=1.5, marker=marker, markersize=3)
        ax.set_title(name, fontsize=10, color=INK, parse_math=False)
        ax.set_xlabel("step", fontsize=9, color=INK)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return _svg(figure, "Learning curves: " + ", ".join(name for name, *_ in panels))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
