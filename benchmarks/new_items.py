"""New items: how many of them reach the lists that they belong in, and what known items pay for it.

The split holds a share of the items out of all training. For several lifts (`genrec.config.NewItems`), recall of users
whose next item is a new one, beside recall of users whose next item is known; rival: content-kNN, which asks nothing
of the log. The lift is chosen on the users that early stopping looks at: the largest that costs their recall at most
`PRICE`. Reported are other users.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.kept import Kept
from benchmarks.real import recipe_of
from benchmarks.results import Check, over_seeds
from genrec.adapters.profile import content_keys
from genrec.artefacts import key_at, read_manifest, run_stage
from genrec.baseline_rankings import FEATURES
from genrec.baselines import ContentKNN, rank
from genrec.metrics import per_user
from genrec.pipeline import Run
from genrec.ranking import rank_cases
from genrec.splits import Cases

log = logging.getLogger("benchmarks.accuracy")
USERS = {"amazon-scientific": None, "movielens-1m-posters": 3000}  # of a set; None: all
RELATIVES = 5
LIFTS = (0.0, 0.25, 0.5, 1.0, 2.0)
PRICE = 0.02  # of known items' recall
WARM_USERS = 3000
RIVAL, PLAIN = "contentknn", "plain"  # plain: new items keep their own scores


@dataclass(frozen=True)
class NewItemsSeed:
    """What one training did: list -> recall@10 per user, float64 [U], for users of each kind."""

    new: dict[str, np.ndarray]  # users whose next item is new
    warm: dict[str, np.ndarray]  # users whose next item is known, unseen by any choice
    chosen: str  # the lift


def name_of(lift: float) -> str:
    return f"lift {lift:g}"


def choose(recalls: dict[str, float]) -> str:
    """The largest lift that costs the choosing users at most `PRICE`; the least one where none does."""
    names = [name_of(lift) for lift in LIFTS]
    cheap = [name for name in names if recalls[name] >= (1 - PRICE) * recalls[PLAIN]]
    return cheap[-1] if cheap else names[0]


def measure(name: str, seed: int, runs: Path) -> tuple[dict[str, np.ndarray], float]:
    """One set, one seed: ``part/list`` -> whether the target is in the first ten, bool [U]; and the seconds it took.

    What an earlier call finished is read, not made again.
    """
    data = {"split": "cold_items", "max_users": USERS[name]}
    recipe = recipe_of(name, name=f"{name}-new-{seed}", seed=seed, data=data, evaluate={"baselines": []})
    run = Run.create(recipe, runs)
    run.through_training()
    space, exclude_seen = run.space, recipe.data.exclude_seen
    split = space.split

    def build(out: Path) -> None:
        valid = split.valid
        looked_at = np.zeros(len(valid), bool)
        n_valid = min(len(valid) // 2, recipe.finetune.valid_users)
        looked_at[np.random.default_rng(seed).choice(len(valid), n_valid, replace=False)] = True
        others = np.random.default_rng(seed + 1).permutation(np.flatnonzero(~looked_at))[:WARM_USERS]
        parts = {"new": split.test, "choose": _some(valid, np.flatnonzero(looked_at)), "warm": _some(valid, others)}
        found: dict[str, np.ndarray] = {}
        rival = ContentKNN()
        rival.fit([of.numpy() for of in content_keys(space.features, ~split.cold, FEATURES).values()])
        rival.tune(parts["choose"], exclude_seen)
        for part, cases in parts.items():
            top = rank(rival, cases.histories, exclude_seen=exclude_seen, allowed=space.catalogue.available)
            found[f"{part}/{RIVAL}"] = per_user(top, cases.targets)["recall@10"]
        tuned = space.tuned_backbone()
        for lift in (None, *LIFTS):
            changes = {"relatives": 0} if lift is None else {"relatives": RELATIVES, "lift": lift}
            settings = recipe.new_items.model_copy(update=changes)
            newcomers = Run(run.folder, recipe.model_copy(update={"new_items": settings}), run.folder).space.newcomers
            for part, cases in parts.items():
                top = rank_cases(
                    tuned, space.prompter, cases, available=space.catalogue.available, exclude_seen=exclude_seen,
                    beams=recipe.evaluate.beams,
                    newcomers=None if newcomers is None else newcomers.to(tuned.device),
                )  # fmt: skip
                recall = per_user(top, cases.targets)["recall@10"]
                found[f"{part}/{PLAIN if lift is None else name_of(lift)}"] = recall
                log.info("%s seed %d, lift %s, %s users: recall@10 %.4f", name, seed, lift, part, recall.mean())
        np.savez_compressed(out / "recall.npz", **found)  # type: ignore[arg-type]

    settings = {"lifts": LIFTS, "relatives": RELATIVES, "price": PRICE, "warm_users": WARM_USERS}
    folder = run_stage(run.folder, "new_items", settings, {"lora": key_at(run.folder / "lora")}, build)
    with np.load(folder / "recall.npz") as stored:
        hits = {key: stored[key].astype(bool) for key in stored.files}
    return hits, sum(read_manifest(path.parent)["seconds"] for path in run.folder.rglob("manifest.json"))


def kept_seeds(kept: Kept, name: str) -> list[NewItemsSeed]:
    """What is kept of a set."""
    found = []
    for seed in kept.below(f"new-items/{name}"):
        hits = kept.get(f"new-items/{name}/{seed}")
        of = {
            part: {k.removeprefix(f"{part}/"): v.astype(float) for k, v in hits.items() if k.startswith(f"{part}/")}
            for part in ("new", "warm", "choose")
        }
        chosen = choose({name: recall.mean() for name, recall in of["choose"].items()})
        found.append(NewItemsSeed(of["new"], of["warm"], chosen))
    return found


def _some(cases: Cases, rows: np.ndarray) -> Cases:
    return Cases(cases.users[rows], [cases.histories[i] for i in rows], cases.targets[rows])


def checks_of(name: str, seeds: list[NewItemsSeed]) -> list[Check]:
    """A set's lines."""
    gain, gain_ends = over_seeds([of.new[of.chosen] - of.new[RIVAL] for of in seeds])
    ratio = float(np.mean([of.new[of.chosen].mean() / of.new[RIVAL].mean() for of in seeds]))
    losses = [(of.warm[PLAIN] - of.warm[of.chosen]) / of.warm[PLAIN].mean() for of in seeds]
    loss, loss_ends = over_seeds(losses)
    chosen = ", ".join(of.chosen for of in seeds)
    return [
        Check(f"{name}, new items: R@10 genrec ({chosen}) - content-kNN", gain, gain_ends, "interval above 0",
              gain_ends[0] > 0),
        Check(f"{name}, new items: R@10 over content-kNN's (aim 2)", ratio, None, "> 1", ratio > 1),
        Check(f"{name}, known items: share of R@10 lost", loss, loss_ends, f"<= {PRICE}", loss <= PRICE),
    ]  # fmt: skip


def table(seeds: list[NewItemsSeed]) -> str:
    """Markdown: recall of new and of known items for every mix."""
    lines = ["| list | R@10, next item new | R@10, next item known |", "|---|---|---|"]
    for name in (RIVAL, PLAIN, *map(name_of, LIFTS)):
        cells = []
        for part in ("new", "warm"):
            mean, ends = over_seeds([getattr(of, part)[name] for of in seeds])
            cells.append(f"{mean:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "plain: new items keep their own scores; a lift of b: they inherit, and e^b times."])
