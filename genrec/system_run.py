"""A system on a real catalogue: prepared and encoded as any run is, trained, measured beside popularity."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec.adapters.reranker import check_reads_histories
from genrec.adapters.system import System
from genrec.artefacts import key_at, key_of, run_stage, write_json
from genrec.config import Recipe, resolve_recipe
from genrec.errors import DataError
from genrec.evaluate import top_items
from genrec.metrics import per_user
from genrec.pipeline import Run
from genrec.planted import Table
from genrec.real_table import MODALITIES, real_table
from genrec.system_recipe import SystemRecipe, load_system
from genrec.training.system_quality import system_scores
from genrec.training.systems import check, check_modalities, train
from genrec.workspace import Workspace

log = logging.getLogger(__name__)
MOST_TIMES = 40  # of a recipe's steps, on a long log


def data_recipe(data: Path, name: str, seed: int, *, pictures: bool) -> Recipe:
    """A recipe for a folder with items and interactions, with pictures encoded or left out.

    Raises:
        DataError: a file is missing.
    """
    for file in ("items.jsonl", "interactions.parquet"):
        if not (data / file).is_file():
            raise DataError(f"{data}: no {file} there; a data folder holds items.jsonl and interactions.parquet")
    where = {
        "items": str((data / "items.jsonl").resolve()),
        "interactions": str((data / "interactions.parquet").resolve()),
    }
    encode = {} if pictures else {"image": None}
    return resolve_recipe({"name": name, "seed": seed, "data": where, "encode": encode})


def widened(recipe: SystemRecipe, table: Table) -> SystemRecipe:
    """The recipe with every modality of the data, where its own ones leave an item with nothing; says so."""
    named = recipe.item.modalities
    if named is None or np.any([table.features[m].present for m in named], axis=0).all():
        return recipe
    log.warning("%s: some items have no %s, so %s are read", recipe.name, " or ".join(named), " and ".join(MODALITIES))
    return recipe.changed({"item.modalities": list(MODALITIES)})


def lengthened(recipe: SystemRecipe, table: Table) -> SystemRecipe:
    """Stages as much longer as the log is than the planted one that they were chosen on, `MOST_TIMES` at most."""
    world, events = recipe.prove.world, sum(map(len, table.split.train))
    times = min(MOST_TIMES, max(1.0, events / (world.n_users * world.events)))
    return recipe.changed({f"stages.{at}.steps": round(times * of.steps) for at, of in enumerate(recipe.stages)})


def check_systems(run: Run) -> None:
    """Prepare and encode a run, and look whether its data has what its recipe's systems need.

    Raises:
        ConfigError: no such system, one that cannot stand behind the beams, or data that lacks something; nothing was
            trained.
    """
    wanted = [load_system(name) for name in run.recipe.evaluate.systems]
    if run.recipe.serve.rerank is not None:
        wanted.append(load_system(run.recipe.serve.rerank))
        check_reads_histories(wanted[-1])
    if not wanted:
        return
    run.prepare()
    run.encode()
    table = real_table(run.space)
    for recipe in wanted:
        check_modalities(recipe, MODALITIES)
        check(widened(recipe, table), table)


def trained_on(
    space: Workspace, recipe: SystemRecipe, states: Path, steps: int | None = None
) -> tuple[SystemRecipe, Table, System]:
    """A system trained on a prepared and encoded run, as many passes over its log as its proof makes.

    Args:
        space: the run's.
        recipe: the system.
        states: folder that keeps its finished stages.
        steps: of every stage, in place of the recipe's.

    Returns:
        the recipe as it was trained, the run as a table, the system in eval mode.

    Raises:
        ConfigError: the data lacks what the recipe needs; nothing was trained.
    """
    check_modalities(recipe, MODALITIES)
    table = real_table(space)
    recipe = lengthened(widened(recipe, table), table)
    check(recipe, table)
    return recipe, table, train(recipe, table, space.recipe.seed, folder=states, steps=steps)


def rank_system(run: Run, name: str) -> Path:
    """systems/NAME/: a published system trained on the run's histories; its top 50 of the test cases in top.npy.

    Args:
        run: prepared and encoded.
        name: of a system that comes with genrec, or a YAML file.
    """
    wanted = load_system(name)
    seen, allowed = run.recipe.data.exclude_seen, run.space.catalogue.available

    def build(out: Path, states: Path) -> None:
        _, table, system = trained_on(run.space, wanted, states)
        cases = table.split.test
        scores = system_scores(system, table, cases.users)
        np.save(out / "top.npy", top_items(scores, cases.seen if seen else None, allowed=allowed))

    return _stage(run, f"systems/{wanted.name}", wanted, {"exclude_seen": seen}, {}, build)


def train_reranker(run: Run) -> Path:
    """reranker/: the system of ``serve.rerank``, and how much it counts behind the beams.

    Raises:
        ConfigError: the data lacks what it needs, or it knows no user by a history.
    """
    from genrec.training.rerank import fit_reranker

    assert run.recipe.serve.rerank is not None
    recipe, wanted = run.recipe, load_system(run.recipe.serve.rerank)
    settings = {"exclude_seen": recipe.data.exclude_seen, "beams": recipe.evaluate.beams}
    settings["valid_users"] = recipe.finetune.valid_users

    def build(out: Path, states: Path) -> dict[str, Any]:
        return fit_reranker(run.space, wanted, out, states)

    return _stage(run, "reranker", wanted, settings, run.tuned_keys(), build)


def _stage(
    run: Run,
    name: str,
    wanted: SystemRecipe,
    settings: dict[str, Any],
    inputs: dict[str, str],
    build: Callable[[Path, Path], dict[str, Any] | None],
) -> Path:
    """A stage that trains a system; its finished parts are kept until the whole is there."""
    settings = {"system": wanted.model_dump(), "seed": run.recipe.seed, **settings}
    inputs = {**inputs, **{m: key_at(run.shared / "features" / m) for m in run.space.features}}
    inputs["interactions"] = key_at(run.shared / "interactions")
    states = run.folder / ".systems" / key_of({"stage": name, "settings": settings, "inputs": inputs})[:16]
    folder = run_stage(run.folder, name, settings, inputs, lambda out: build(out, states), run.force)
    shutil.rmtree(states, ignore_errors=True)
    return folder


def run_system(
    recipe: SystemRecipe, data: Path, runs: Path, *, seed: int = 0, steps: int | None = None
) -> dict[str, Any]:
    """Train, measure on the test cases, and write ``features.npy`` [N, W] and ``metrics.json``.

    Args:
        recipe: the system.
        data: folder with items.jsonl and interactions.parquet.
        runs: gets system-NAME/.
        seed: of weights and batches.
        steps: of every stage, in place of the recipe's.

    Returns:
        {"metrics": list -> recall@10 and ndcg@10, "features": path}.

    Raises:
        ConfigError: the data lacks what the recipe needs; nothing was trained.
    """
    check_modalities(recipe, MODALITIES)  # before anything is read
    name = f"system-{recipe.name}"
    run = Run.create(data_recipe(data, name, seed, pictures=True), runs)
    run.prepare()
    if not any(run.space.catalogue.images):
        run = Run.create(data_recipe(data, name, seed, pictures=False), runs)
    run.encode()
    folder = run.folder / f"system-{seed}-{steps or 'full'}"
    recipe, table, system = trained_on(run.space, recipe, folder, steps)
    metrics = {recipe.name: _accuracy(system_scores(system, table, table.split.test.users), table)}
    counts = np.bincount(np.concatenate(table.split.train), minlength=table.n_items).astype(np.float32)
    metrics["popularity"] = _accuracy(np.tile(counts, (len(table.split.test), 1)), table)
    with torch.no_grad():
        views = system.items(torch.arange(table.n_items, device=next(iter(system.buffers())).device))
    path = run.folder / "features.npy"
    np.save(path, views.content.cpu().numpy().astype(np.float32))
    write_json(run.folder / "metrics.json", metrics)
    return {"metrics": metrics, "features": str(path)}


def _accuracy(scores: np.ndarray, table: Table) -> dict[str, float]:
    """Leave-one-out recall and N@10 of all items but those in the history: scores float32 [n, N]."""
    cases, scores = table.split.test, scores.copy()
    for row, history in enumerate(cases.histories):
        scores[row, history] = -np.inf
    top = np.argsort(-scores, 1, kind="stable")[:, :50].astype(np.int32)
    found = per_user(np.pad(top, ((0, 0), (0, 50 - top.shape[1])), constant_values=-1), cases.targets)
    return {name: float(found[name].mean()) for name in ("recall@10", "ndcg@10")}
