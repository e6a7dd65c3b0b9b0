"""The sequence part of the item scores: SASRec on the training histories, and how much it counts beside the generator.

Its weight is chosen on the validation cases that fine-tuning chose by, by the lists that are served; 0 is among the
choices, so a part that does not help is silent.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from genrec.adapters.sequence import HEADS, SequenceScores
from genrec.errors import ConfigError
from genrec.metrics import per_user
from genrec.ranking import rank_cases
from genrec.sasrec import SASRec
from genrec.workspace import SEQUENCE, Workspace

log = logging.getLogger(__name__)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)


def fit_sequence(space: Workspace, folder: Path) -> dict[str, Any]:
    """Train it and write sequence.safetensors into a stage's folder.

    Args:
        space: a run whose generator is tuned.
        folder: the stage's.

    Returns:
        the manifest's result: {"chosen": SASRec's setting, "curve", "ndcg@10": weight -> validation N@10, "weight"}.

    Raises:
        ConfigError: the recipe has no item scores that it could join.
    """
    recipe, split = space.recipe, space.split
    backbone = space.tuned_backbone()
    scores = backbone.item_scores
    if scores is None:
        raise ConfigError(
            "sequence.epochs: its scores join the item scores, and this recipe has none; "
            "set backbone.profile or backbone.neighbours, or sequence.epochs 0"
        )
    content = recipe.backbone.profile and space.features
    ranker = SASRec(
        seed=recipe.seed,
        epochs=recipe.sequence.epochs,
        max_history=recipe.data.max_history,
        width=recipe.sequence.width,
        heads=HEADS,
        dropout=recipe.sequence.dropout,
        features=torch.cat([*space.content_keys.values()], 1) if content else None,
        device=str(backbone.device),
    )
    exclude_seen = recipe.data.exclude_seen
    chosen = ranker.fit(split.train, len(split.cold), split.valid, exclude_seen=exclude_seen)
    scores.sequence = part = SequenceScores(ranker.network, 0.0)
    found = {}
    for weight in WEIGHTS:
        part.weight.fill_(weight)
        top = rank_cases(
            backbone, space.prompter, space.chooses, available=space.catalogue.available, exclude_seen=exclude_seen,
            beams=recipe.evaluate.beams,
        )  # fmt: skip
        found[weight] = float(per_user(top, space.chooses.targets)["ndcg@10"].mean())
        log.info("sequence: weight %g, validation ndcg@10 %.4f", weight, found[weight])
    best = max(WEIGHTS, key=found.__getitem__)
    part.weight.fill_(best)
    part.save(folder / SEQUENCE)
    return {"chosen": chosen, "curve": ranker.curve, "ndcg@10": {str(w): n for w, n in found.items()}, "weight": best}
