"""The re-ranker: a published system trained on the run's histories, and how much it counts behind the beams.

Its weight is chosen on the validation cases that fine-tuning chose by, among what the beams find for them; 0 is among
the choices, so a system that does not help leaves the order alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from genrec.adapters.reranker import Reranker, check_reads_histories, moved
from genrec.metrics import per_user
from genrec.ranking import listed, search_cases
from genrec.system_recipe import SystemRecipe
from genrec.system_run import trained_on
from genrec.workspace import RERANKER, Workspace

log = logging.getLogger(__name__)
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)


def fit_reranker(space: Workspace, recipe: SystemRecipe, folder: Path, states: Path) -> dict[str, Any]:
    """Train it and write reranker.safetensors into a stage's folder.

    Args:
        space: a run whose generator is tuned.
        recipe: the system.
        folder: the stage's.
        states: keeps the system's finished stages, so that a second start goes on after the last one.

    Returns:
        the manifest's result: {"system", "ndcg@10": weight -> validation N@10, "weight"}.

    Raises:
        ConfigError: the data lacks what the system needs, or it knows no user by a history.
    """
    check_reads_histories(recipe)
    recipe, _, system = trained_on(space, recipe, states)
    reranker = Reranker.of_system(recipe, system, 0.0)
    cases = space.chooses
    backbone = space.tuned_backbone()
    beams = search_cases(
        backbone,
        space.prompter,
        cases,
        available=space.catalogue.available,
        exclude_seen=space.recipe.data.exclude_seen,
        beams=space.recipe.evaluate.beams,
        mixer=None if space.mixer is None else space.mixer.to(backbone.device),
    )
    deviations = reranker(cases.histories, beams.items)
    found = {}
    for weight in WEIGHTS:
        top = listed(moved(beams, weight * deviations))
        found[weight] = float(per_user(top, cases.targets)["ndcg@10"].mean())
        log.info("re-ranker %s: weight %g, validation ndcg@10 %.4f", recipe.name, weight, found[weight])
    reranker.weight = max(WEIGHTS, key=found.__getitem__)
    reranker.save(folder / RERANKER)
    return {"system": recipe.name, "ndcg@10": {str(w): n for w, n in found.items()}, "weight": reranker.weight}
