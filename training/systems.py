"""Training a system: its recipe's stages in order, each from the weights that the last one left.

    genrec systems run clcrec --data FOLDER
    genrec systems prove clcrec

Read `genrec/training/recipes/systems/NAME.yaml`, then here, then `training/objectives.py`: that is all of the way.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from genrec.adapters.system import System
from genrec.adapters.user_models import TransformerUser
from genrec.artefacts import key_of
from genrec.errors import ConfigError
from genrec.planted import Table
from genrec.system_recipe import Stage, SystemRecipe
from genrec.training.objectives import make_objective
from genrec.training.pairs import Batch, Whose, batches
from genrec.training.tuning import set_tuning
from genrec.training.views import Views

log = logging.getLogger(__name__)
WARM_UP = 0.1
LOOKS = 20  # points on a stage's loss curve


def fresh(recipe: SystemRecipe, table: Table, seed: int) -> System:
    """An untrained system; raises ConfigError where the data lacks what the recipe needs."""
    check(recipe, table)
    torch.manual_seed(seed)
    return System(recipe, table)


def check(recipe: SystemRecipe, table: Table) -> None:
    """Does the data have what the recipe asks for?

    Raises:
        ConfigError: with the recipe's line and what to do.
    """
    check_modalities(recipe, tuple(table.features))
    wanted = recipe.item.modalities or list(table.features)
    bare = np.flatnonzero(~np.any([table.features[m].present for m in wanted], axis=0))
    if len(bare) and recipe.item.mix != "ids":
        raise ConfigError(
            f"{recipe.name}: item.modalities: {len(bare)} of {table.n_items} items have no {' or '.join(wanted)}, the "
            f"first is row {bare[0]}; name a modality that they have, or drop these items"
        )
    by_category = recipe.user == "multi_query" or recipe.item.fusion == "experts" or "category" in {
        *recipe.item.reader.values()
    }  # fmt: skip
    if by_category and table.categories.max() == 0:
        raise ConfigError(f"{recipe.name}: it reads categories and the data has one at most; give items categories")
    if recipe.item.fusion == "domain_maps" and table.domains.max() == 0:
        raise ConfigError(f"{recipe.name}: item.fusion domain_maps needs two domains, the items are all of one")
    alone = np.setdiff1d(table.split.test.users, table.split.train_users)
    part = f"item.graph: {recipe.item.graph}" if recipe.item.graph else f"user: {recipe.user}"
    if len(alone) and (recipe.item.graph or recipe.user == "learned"):
        raise ConfigError(
            f"{recipe.name}: {part}: {len(alone)} users have no training event, the first is row {alone[0]}, so "
            "nothing reaches them; drop them, or take a user model that reads histories, such as user: mean"
        )


def check_modalities(recipe: SystemRecipe, there: tuple[str, ...]) -> None:
    """Does the data have what the recipe reads?

    Raises:
        ConfigError: it names a modality that is not there, or a reader of one that it does not read.
    """
    wanted = recipe.item.modalities or there
    for m in wanted:
        if m not in there:
            raise ConfigError(
                f"{recipe.name}: item.modalities names {m}, the data has {', '.join(there)}; encode it, or leave it out"
            )
    for m in recipe.item.reader:
        if m not in wanted:
            raise ConfigError(f"{recipe.name}: item.reader.{m}: no such modality among {', '.join(wanted)}")


def train(
    recipe: SystemRecipe, table: Table, seed: int, *, folder: Path | None = None, steps: int | None = None
) -> System:
    """All stages.

    Args:
        recipe: the system.
        table: the data.
        seed: of weights and batches.
        folder: keeps every finished stage's weights; a second call goes on after the last one.
        steps: of every stage, in place of the recipe's: to try a recipe out.

    Returns:
        the trained system, in eval mode, on the CPU or the GPU where there is one.

    Raises:
        ConfigError: the data lacks what the recipe needs, or `folder` keeps weights of another recipe or catalogue.
    """
    keys = _stage_keys(recipe, table, seed, steps) if folder is not None else []
    kept_states = [] if folder is None else _kept(folder, keys, recipe.name)
    rehearse(recipe, table, seed)
    system = fresh(recipe, table, seed)
    for at, stage in enumerate(recipe.stages):
        where = f"{recipe.name}: stages.{at}"
        torch.manual_seed(seed + at)  # what a stage puts in does not depend on whether the last one was skipped
        learns = set_tuning(system, stage.tune, f"{where}.tune", stage.tune_from)
        if at < len(kept_states):
            system.load_state_dict(kept_states[at])
            log.info("%s: done before, skipped", where)
            continue
        curve = train_stage(system, stage, table, learns, seed=seed + at, steps=steps or stage.steps, where=where)
        log.info("%s: loss %.3f to %.3f", where, curve[0], curve[-1])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            whole = folder / f"stage-{at}.pt"
            torch.save({"key": keys[at], "state": system.state_dict()}, whole.with_suffix(".part"))
            whole.with_suffix(".part").replace(whole)
    return system.eval()


def _stage_keys(recipe: SystemRecipe, table: Table, seed: int, steps: int | None) -> list[str]:
    """What each stage's weights come from, as a hash: the model, the stages so far, the data."""
    made = recipe.model_dump(include={"item", "user", "head"}) | {"seed": seed, "steps": steps, "data": table.sha256()}
    stages = [stage.model_dump() for stage in recipe.stages]
    return [key_of(made | {"stages": stages[: at + 1]}) for at in range(len(stages))]


def _kept(folder: Path, keys: list[str], name: str) -> list[dict[str, torch.Tensor]]:
    """The weights after each finished stage; raises ConfigError where they are of something else."""
    states = []
    for at, key in enumerate(keys):
        path = folder / f"stage-{at}.pt"
        if not path.is_file():
            break
        kept = torch.load(path, weights_only=True)
        if kept.get("key") != key:
            raise ConfigError(
                f"{name}: stages.{at}: {path} is stale: it was trained with another recipe, seed, number of steps or "
                f"catalogue than this; delete {folder}, or train into another folder"
            )
        states.append(kept["state"])
    return states


def rehearse(recipe: SystemRecipe, table: Table, seed: int) -> None:
    """One step of every stage on weights that are thrown away, so that a late stage's mistake shows at once.

    Raises:
        ConfigError: a stage names something that the system or the data lacks.
    """
    system = fresh(recipe, table, seed)
    for at, stage in enumerate(recipe.stages):
        where = f"{recipe.name}: stages.{at}"
        learns = set_tuning(system, stage.tune, f"{where}.tune", stage.tune_from)
        train_stage(system, stage, table, learns, seed=seed, steps=1, where=where)


def train_stage(
    system: System, stage: Stage, table: Table, learns: list[nn.Parameter], *, seed: int, steps: int, where: str
) -> list[float]:
    """One stage; returns the mean loss of its beginning, ..., end."""
    torch.manual_seed(seed)
    terms = nn.ModuleList([make_objective(term, system, table) for term in stage.objectives])
    weights = list(stage.objectives.values())
    learns = [*learns, *(p for p in terms.parameters() if p.requires_grad)]
    if not learns:
        raise ConfigError(f"{where}.tune: every part is frozen, so nothing can learn; free one, or drop the stage")
    accelerator = Accelerator()
    optimiser = torch.optim.AdamW(learns, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    total = max(steps, 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        stage.learning_rate,
        total_steps=total,
        pct_start=max(WARM_UP, 1.5 / total),  # a warm-up of one step exactly would divide by zero
        anneal_strategy="linear",
    )
    system, terms, optimiser = accelerator.prepare(system, terms, optimiser)
    drawn = batches(
        table,
        stage.pairs,
        steps=steps,
        size=stage.batch_size,
        negatives=stage.negatives,
        whose=Whose(stage.users, stage.share),
        seed=seed,
    )
    system.train()
    if stage.cache:
        system.keep_items()
    if stage.tune_from:
        assert isinstance(system.user, TransformerUser)  # nothing else takes what tune_from needs
        system.user.keep_below(stage.tune_from)
    losses: list[float] = []
    for batch in tqdm(drawn, total=steps, desc=where, unit="step", disable=None, leave=False):
        views = Views(system, _on(batch, accelerator.device), swap=stage.swap, drop_modality=stage.drop_modality)
        loss = sum(weight * term(views) for weight, term in zip(weights, terms, strict=True))
        optimiser.zero_grad()
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(learns, 5.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    system.cache = None
    if isinstance(system.user, TransformerUser):
        system.user.kept = None
    each = max(1, len(losses) // LOOKS)
    return [sum(losses[i : i + each]) / len(losses[i : i + each]) for i in range(0, len(losses), each)]


def _on(batch: Batch, device: torch.device) -> Batch:
    moved: dict[str, Any] = {name: of.to(device) for name, of in vars(batch).items()}
    return Batch(**moved)
