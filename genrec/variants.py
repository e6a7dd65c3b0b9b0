"""The generator without one of its parts, as a change of the recipe: what ablations train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from genrec.config import Recipe
from genrec.errors import ConfigError

LONGER = 2  # times the epochs for a generator whose inputs say nothing about items: it learns later (docs/LOG.md)


def _without_soft_tokens(recipe: Recipe) -> Recipe:
    """Item features reach nothing but the ids; as many histories per step as with soft tokens, `LONGER` training."""
    levels, soft = recipe.semantic_ids.levels, recipe.backbone.soft_tokens
    pack = max(16, round(recipe.finetune.pack_tokens * levels / (levels + soft)))
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"soft_tokens": 0, "profile": 0}),
            "align": recipe.align.model_copy(update={"steps": 0}),
            "finetune": recipe.finetune.model_copy(
                update={"pack_tokens": pack, "epochs": LONGER * recipe.finetune.epochs}
            ),
        }
    )


def _ids_of_content_alone(recipe: Recipe) -> Recipe:
    """A TIGER-style generator (Rajput et al. 2023, arXiv:2305.05065): ids of content, no other sign of an item."""
    return _without(
        _without_soft_tokens(recipe),
        backbone={"neighbours": 0},
        semantic_ids={"collaborative_weight": 0.0},
        sequence={"epochs": 0},
        mix={"users": 0},
    )


def _random_base(recipe: Recipe) -> Recipe:
    """Neither the base nor the adapter learned anything before fine-tuning."""
    if not recipe.backbone.base.startswith("scratch:"):
        raise ConfigError(
            f"ablation genrec-no-pretraining: the base is {recipe.backbone.base!r}, which genrec did not train; it "
            'needs backbone.base "scratch:"'
        )
    scratch = recipe.backbone.scratch.model_copy(update={"steps": 0})
    return _without(recipe, backbone={"scratch": scratch}, align={"steps": 0})


def _without(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some settings of some sections changed."""
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=of) for name, of in sections.items()}
    )


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "genrec-no-image": lambda r: _without(r, encode={"image": None}),
    "genrec-no-text": lambda r: _without(r, encode={"text": None}),
    "genrec-no-soft": _without_soft_tokens,
    "genrec-no-profile": lambda r: _without(r, backbone={"profile": 0}),
    "genrec-no-neighbours": lambda r: _without(r, backbone={"neighbours": 0}),
    "genrec-no-sequence": lambda r: _without(r, sequence={"epochs": 0}),
    "genrec-no-mix": lambda r: _without(r, mix={"users": 0}),
    "genrec-no-scores": lambda r: _without(
        r, backbone={"profile": 0, "neighbours": 0}, sequence={"epochs": 0}, mix={"users": 0}
    ),
    "genrec-no-collaborative": lambda r: _without(r, semantic_ids={"collaborative_weight": 0.0}),
    "genrec-no-pretraining": _random_base,
    "tiger": _ids_of_content_alone,
}
