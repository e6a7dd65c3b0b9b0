"""baselines/NAME: what each rival ranks for the test users, fitted and tuned once per data and setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genrec.artefacts import key_at, run_stage
from genrec.baselines import ContentKNN, ItemKNN, Markov, Popularity, rank
from genrec.pipeline import Run

FEATURES = 128  # values per modality that contentknn and sasrec-features read


def rank_baseline(run: Run, name: str, sasrec: dict[str, Any] | None = None) -> Path:
    """The folder with one baseline's top 50 for every test case, int32 [n, 50], in top.npy; its manifest says what
    validation chose.

    Args:
        run: prepared, and encoded where `name` reads features.
        name: one of `genrec.config.Evaluate.baselines`.
        sasrec: the settings named in `genrec.sasrec.GRID`, from a search on another seed of the same data; they are
            taken, and nothing is searched.
    """
    space, recipe = run.space, run.recipe
    settings: dict[str, Any] = {"exclude_seen": recipe.data.exclude_seen}
    inputs = {"interactions": key_at(run.shared / "interactions")}
    if name.startswith("sasrec"):
        settings |= {
            "seed": recipe.seed,
            "epochs": recipe.evaluate.sasrec_epochs,
            "search": sasrec or recipe.evaluate.sasrec_search,
            "max_history": recipe.data.max_history,
        }
    if name in ("contentknn", "sasrec-features"):
        inputs |= {m: key_at(run.shared / "features" / m) for m in space.features}

    def build(out: Path) -> dict[str, Any]:
        ranker, chosen = _fitted(run, name, sasrec)
        seen = recipe.data.exclude_seen
        top = rank(ranker, space.split.test, exclude_seen=seen, allowed=space.catalogue.available)
        np.save(out / "top.npy", top)
        return chosen

    return run_stage(run.folder, f"baselines/{name}", settings, inputs, build, run.force)


def _fitted(run: Run, name: str, sasrec: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The ranker and what validation chose for it."""
    space, recipe = run.space, run.recipe
    split, n_items, seen = space.split, len(space.catalogue.item_ids), recipe.data.exclude_seen
    keys = None
    if name in ("contentknn", "sasrec-features"):
        from genrec.adapters.profile import content_keys

        keys = [*content_keys(space.features, ~split.cold, FEATURES).values()]
    if not name.startswith("sasrec"):
        ranker: Any = {"popularity": Popularity, "markov": Markov, "itemknn": ItemKNN, "contentknn": ContentKNN}[name]()
        if keys is not None:
            ranker.fit([of.numpy() for of in keys])
        else:
            ranker.fit(split.train, n_items)
        return ranker, {} if name == "popularity" else ranker.tune(split.valid, seen)
    import torch

    from genrec.sasrec import SASRec

    ranker = SASRec(
        seed=recipe.seed,
        epochs=recipe.evaluate.sasrec_epochs,
        max_history=recipe.data.max_history,
        features=None if keys is None else torch.cat(keys, 1),
        device="cuda" if torch.cuda.is_available() else "cpu",
        **(sasrec or {}),
    )
    search = recipe.evaluate.sasrec_search and not sasrec
    chosen = ranker.fit(split.train, n_items, split.valid, exclude_seen=seen, search=search)
    return ranker, chosen
