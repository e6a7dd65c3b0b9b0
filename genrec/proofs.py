"""Proof of a system on planted data: with its idea and without it, where the idea is needed and where it is not."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from genrec.artefacts import git_commit, key_of, write_json
from genrec.planted import Planted, Table, plant
from genrec.system_recipe import SystemRecipe
from genrec.training.system_quality import gauc_of, hits, measure_system
from genrec.training.systems import train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One seed's four trainings, and what the planted truth itself would reach.

    Attributes:
        key: hash of the recipe that was proved.
        commit: of the code that proved it.
        seed: of world, weights and batches.
        method, ablation: the metric's mean where the idea is needed, with it and without it.
        method_control, ablation_control: the same where there is nothing for it to find.
        oracle: the metric of the true utilities.
        seconds: of all.
    """

    key: str
    commit: str
    seed: int
    method: float
    ablation: float
    method_control: float
    ablation_control: float
    oracle: float
    seconds: float

    @property
    def gain(self) -> float:
        return self.method - self.ablation

    @property
    def control(self) -> float:
        return self.method_control - self.ablation_control


def prove(recipe: SystemRecipe, seed: int, folder: Path | None = None) -> Trial:
    """One seed of a system's proof.

    Args:
        recipe: the system.
        seed: of everything.
        folder: keeps the trial; asked again for the same recipe, it is read from there.
    """
    if folder is not None and (kept := kept_trial(recipe, seed, folder)) is not None:
        return kept
    started, proof = time.monotonic(), recipe.prove
    ablated = recipe.changed(proof.without)
    table = plant(proof.world, seed)
    control = plant(Planted.model_validate(proof.world.model_dump() | proof.control), seed)
    found = [
        float(measure_system(train(which, on, seed), on, proof.metric).mean())
        for on in (table, control)
        for which in (recipe, ablated)
    ]
    method, ablation, method_control, ablation_control = found
    oracle, seconds = oracle_of(table, proof.metric), round(time.monotonic() - started, 1)
    key, commit = key_of(recipe.model_dump()), str(git_commit())
    trial = Trial(key, commit, seed, method, ablation, method_control, ablation_control, oracle, seconds)
    log.info("%s, seed %d: %+.3f, control %+.3f", recipe.name, seed, trial.gain, trial.control)
    if folder is not None:
        write_json(_place(recipe, seed, folder), asdict(trial))
    return trial


def _place(recipe: SystemRecipe, seed: int, folder: Path) -> Path:
    return folder / f"{recipe.name}-{seed}.json"


def kept_trial(recipe: SystemRecipe, seed: int, folder: Path) -> Trial | None:
    """What `prove` kept of this very recipe; None where it kept nothing, or of another one."""
    path = _place(recipe, seed, folder)
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Trial(**kept) if kept["key"] == key_of(recipe.model_dump()) else None


def oracle_of(table: Table, metric: str) -> float:
    """What the true utilities reach."""
    assert table.oracle is not None
    if metric == "gauc":
        shown = table.test_impressions
        assert shown is not None
        return float(gauc_of(table.oracle[shown.users, shown.items], table).mean())
    return float(hits(table.oracle[table.split.test.users], table, metric).mean())


def interval(values: list[float]) -> tuple[float, list[float]]:
    """Mean of paired differences and its 95 % interval, Student's t over seeds."""
    from scipy import stats

    of = np.array(values)
    reach = float(stats.t.ppf(0.975, len(of) - 1) * stats.sem(of)) if len(of) > 1 else float("inf")
    return float(of.mean()), [float(of.mean()) - reach, float(of.mean()) + reach]
