"""Planted worlds of a few items and users, of the kind that a system's proof plants."""

from typing import Any

from genrec.planted import Planted, Table, plant
from genrec.system_recipe import SystemRecipe

TINY = {"n_items": 60, "n_users": 40, "events": 6}


def tiny(recipe: SystemRecipe, **knobs: Any) -> Table:
    """A small world of the recipe's own kind."""
    world = recipe.prove.world.model_dump() | TINY | knobs
    return plant(Planted.model_validate(world | {"impressions": 8 if world["impressions"] else 0}), 0)
