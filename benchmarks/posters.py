"""What MovieLens's posters and texts bring the generator, posters pooled and as 49 patches, on a sample of the users.

A poster of 49 vectors makes a training step several times dearer, so a sample has to do, and without the part that
reads the history's order: it is a network of its own, and would hide what the generator sees in an item.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept import Kept
from benchmarks.lists import generated, kept_lists, table
from benchmarks.real import RECIPES, recipe_of
from genrec.config import Recipe
from genrec.pipeline import Run
from genrec.variants import VARIANTS

SET, PART = "movielens-1m-posters", "posters"
POSTERS: dict[str, Any] = RECIPES[SET]["encode"]["image"]
KINDS = {  # model -> what its row is called
    "genrec": "genrec, pooled",
    "genrec-no-image": "texts alone",
    "genrec-no-text": "posters alone",
    "genrec-no-soft": "ids alone",
    "qformer": "pooled, through a Q-Former",
    "patches": "49 patches, through a Q-Former",
}
CHANGES: dict[str, dict[str, Any]] = {  # of those that are no variant
    "qformer": {"adapter": {"kind": "qformer"}},
    "patches": {"encode": {"image": {**POSTERS, "patches": True}}, "adapter": {"kind": "qformer"}},
}


def measure(seed: int, runs: Path, kind: str) -> dict[str, np.ndarray]:
    """One kind of one seed: what `generated` keeps. What an earlier call finished is read, not made again."""

    def recipe(kind: str, name: str) -> Recipe:
        made = recipe_of(SET, name=name, seed=seed, sequence={"epochs": 0}, **CHANGES.get(kind, {}))
        return VARIANTS[kind](made) if kind in VARIANTS else made

    name, patches = f"posters-{seed}", kind == "patches"  # features of its own
    run = Run.create(recipe(kind, f"{name}-patches") if patches else recipe("genrec", name), runs)
    run.prepare()
    run.encode()
    run.base()
    apart = patches or kind == "genrec"
    return generated(run, run if apart else Run(run.folder / "ablations" / kind, recipe(kind, name), run.folder))


def verdict(kept: Kept) -> tuple[str, str] | None:
    """A heading and a table, once anything is kept."""
    seeds = kept_lists(kept, PART, KINDS)
    if not seeds:
        return None
    heading = f"{SET}, posters, a sample of {RECIPES[SET]['data']['max_users']} users, {len(seeds)} seed(s)"
    return heading, table(seeds, KINDS)
