"""What MovieLens's posters bring the generator, as one pooled vector and as 49 patches, on a sample of the users.

A poster of 49 vectors makes a training step several times dearer, so a sample has to do, and without the part that
reads the history's order: it is a network of its own, and would hide what the generator sees in a picture.
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

SET, PART = "movielens-1m-posters", "posters"
POSTERS: dict[str, Any] = RECIPES[SET]["encode"]["image"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # model -> what its row is called, what it changes in the recipe
    "genrec": ("genrec, pooled", {}),
    "genrec-no-image": ("genrec-no-image", {"encode": {"image": None}}),
    "qformer": ("pooled, through a Q-Former", {"adapter": {"kind": "qformer"}}),
    "patches": ("49 patches, through a Q-Former", {
        "encode": {"image": {**POSTERS, "patches": True}}, "adapter": {"kind": "qformer"},
    }),
}  # fmt: skip


def measure(seed: int, runs: Path, kind: str) -> dict[str, np.ndarray]:
    """One kind of one seed: what `generated` keeps. What an earlier call finished is read, not made again."""

    def recipe(name: str, changes: dict[str, Any]) -> Recipe:
        return recipe_of(SET, name=name, seed=seed, sequence={"epochs": 0}, **changes)

    changes, patches = KINDS[kind][1], kind == "patches"  # features of its own
    name = f"posters-{seed}"
    run = Run.create(recipe(f"{name}-patches", changes) if patches else recipe(name, {}), runs)
    run.prepare()
    run.encode()
    run.base()
    apart = patches or kind == "genrec"
    return generated(run, run if apart else Run(run.folder / "ablations" / kind, recipe(name, changes), run.folder))


def verdict(kept: Kept) -> tuple[str, str] | None:
    """A heading and a table, once anything is kept."""
    seeds = kept_lists(kept, PART, KINDS)
    if not seeds:
        return None
    heading = f"{SET}, posters, a sample of {RECIPES[SET]['data']['max_users']} users, {len(seeds)} seed(s)"
    return heading, table(seeds, {kind: name for kind, (name, _) in KINDS.items()})
