"""New items: how many of them reach the lists that they belong in, and what known items pay for it.

The split holds a share of the items out of all training. Recall of users whose next item is a new one, beside recall of
users whose next item is known, of several lists: the generator's own; with what new items inherit
(`genrec.adapters.newcomers`); and by the mixer (`genrec.adapters.mixer`), with several lifts. Rival: content-kNN, which
asks nothing of the log: on the features, on the words that the mixer reads too, and on both; the best of them counts.
Of genrec's lists the mixer's is judged, at a price that leaves room for chance below `PRICE`; nothing of it is chosen
by the users that are reported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.kept import Kept
from benchmarks.real import recipe_of
from benchmarks.results import Check, over_seeds
from genrec.adapters.mixer import Mixer, whole_lists
from genrec.adapters.newcomers import Newcomers
from genrec.adapters.profile import content_keys
from genrec.adapters.words import WORDS
from genrec.artefacts import read_manifest, run_stage
from genrec.baseline_rankings import FEATURES
from genrec.baselines import ContentKNN, rank
from genrec.decode import Ranked
from genrec.metrics import per_user
from genrec.pipeline import Run
from genrec.ranking import allowed_items, listed, search_cases
from genrec.splits import Cases
from genrec.training.mix import cross_fitted

log = logging.getLogger("benchmarks.accuracy")
USERS = {"amazon-scientific": None, "movielens-1m-posters": 3000}  # of a set; None: all
ALL = 10**9  # users that mixers learn from, or are judged by
RELATIVES = 50
NEVER = -40.0  # a lift with which no new item comes up
JUDGED = 0.0  # lift, on top of what the price allows
LIFTS = (NEVER, -1.0, -0.5, -0.25, JUDGED, 0.25, 0.5, 1.0)
INHERITED = (-1.0, -0.5, 0.0, 0.5)  # lifts without the mixer
PRICE = 0.02  # of known items' recall
ASKED = 0.018  # of the mixer, so that chance does not make it more
RIVALS = ("contentknn, features", "contentknn, words", "contentknn, both")
PLAIN = "plain"  # new items keep their own scores
AT_ONCE = 256


@dataclass(frozen=True)
class NewItemsSeed:
    """What one training did: list -> recall@10 per user, float64 [U], for users of each kind."""

    new: dict[str, np.ndarray]  # users whose next item is new
    warm: dict[str, np.ndarray]  # users whose next item is known: by the mixer that did not learn from them


def name_of(lift: float, mixed: bool = True) -> str:
    """Of a list."""
    return ("mixed, " if mixed else "inherited, ") + ("nothing new" if lift == NEVER else f"lift {lift:g}")


def lists_of(run: Run, cases: Cases, mixers: list[Mixer], mixed_by: np.ndarray) -> dict[str, np.ndarray]:
    """Name of a list -> int32 [U, 50].

    Args:
        run: of a set.
        cases: users.
        mixers: all that there are.
        mixed_by: int64 [U], which of them orders each user's lists.
    """
    space, recipe = run.space, run.recipe
    available, exclude_seen = space.catalogue.available, recipe.data.exclude_seen
    backbone = space.tuned_backbone()

    def search(available: np.ndarray) -> Ranked:
        return search_cases(
            backbone, space.prompter, cases, available=available, exclude_seen=exclude_seen,
            beams=recipe.evaluate.beams,
        )  # fmt: skip

    lists = {PLAIN: listed(search(available))}
    known, newcomers = search(available & ~space.split.cold), space.newcomers
    assert newcomers is not None
    for one, mixer in enumerate(mixers):
        theirs = np.flatnonzero(mixed_by == one)
        for rows in np.split(theirs, range(AT_ONCE, len(theirs), AT_ONCE)):
            histories = cases[rows].histories
            allowed = allowed_items(torch.from_numpy(available), cases[rows], exclude_seen)
            with torch.inference_mode():
                likely = backbone.likely(histories, apart=True)
            found = Ranked(known.items[rows], known.scores[rows])
            wanted = [(lift, mixer) for lift in LIFTS] + [(lift, None) for lift in INHERITED]
            for lift, orders in wanted:
                joining = Newcomers(newcomers.rows, newcomers.relatives, newcomers.weights, torch.tensor(lift))
                list_ = listed(
                    whole_lists(
                        histories, found, None if likely is None else likely.cpu(), allowed, joining, orders,
                        recipe.evaluate.beams,
                    )
                )  # fmt: skip
                name = name_of(lift, orders is not None)
                lists.setdefault(name, np.full((len(cases), list_.shape[1]), -1, list_.dtype))[rows] = list_
    return lists


def measure(name: str, seed: int, runs: Path) -> tuple[dict[str, np.ndarray], float]:
    """One set, one seed: ``part/list`` -> whether the target is in the first ten, bool [U]; and the seconds it took.

    What an earlier call finished is read, not made again.
    """
    data = {"split": "cold_items", "max_users": USERS[name]}
    recipe = recipe_of(
        name, name=f"{name}-new-{seed}", seed=seed, data=data, evaluate={"baselines": []},
        mix={"users": ALL, "price": ASKED}, new_items={"relatives": RELATIVES},
    )  # fmt: skip
    run = Run.create(recipe, runs)
    for stage in (run.prepare, run.encode, run.base, run.semantic_ids, run.align, run.finetune, run.sequence):
        stage()  # no mixer of all users: here they are judged by those of the others
    space, exclude_seen = run.space, recipe.data.exclude_seen

    def build(out: Path) -> None:
        mixed = cross_fitted(space)
        unseen = np.flatnonzero(~np.isin(space.mixes.users, space.chooses.users))  # neither mixer nor choice saw them
        warm, test = space.mixes[unseen], space.split.test
        parts = {"new": (test, np.arange(len(test)) % len(mixed.mixers)), "warm": (warm, mixed.part[unseen])}
        found: dict[str, np.ndarray] = {}
        content = [of.numpy() for of in content_keys(space.features, ~space.split.cold, FEATURES).values()]
        words = [space.mixed_keys[WORDS].numpy()]
        rivals = {list_: ContentKNN() for list_ in RIVALS}
        for rival, keys in zip(rivals.values(), (content, words, content + words), strict=True):
            rival.fit(keys)
            rival.tune(space.chooses, exclude_seen)
        for part, (cases, mixed_by) in parts.items():
            tops = {
                list_: rank(rival, cases, exclude_seen=exclude_seen, allowed=space.catalogue.available)
                for list_, rival in rivals.items()
            }
            for list_, items in (tops | lists_of(run, cases, mixed.mixers, mixed_by)).items():
                found[f"{part}/{list_}"] = recall = per_user(items, cases.targets)["recall@10"]
                log.info("%s seed %d, %s, %s users: recall@10 %.4f", name, seed, list_, part, recall.mean())
        np.savez_compressed(out / "recall.npz", **found)  # type: ignore[arg-type]

    settings = {"lifts": LIFTS, "inherited": INHERITED}
    folder = run_stage(run.folder, "new_items", settings, run.scoring_keys(), build)
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
            for part in ("new", "warm")
        }
        found.append(NewItemsSeed(of["new"], of["warm"]))
    return found


def checks_of(name: str, seeds: list[NewItemsSeed]) -> list[Check]:
    """A set's lines."""
    judged, best = name_of(JUDGED), max(RIVALS, key=lambda rival: np.mean([of.new[rival].mean() for of in seeds]))
    gain, gain_ends = over_seeds([of.new[judged] - of.new[best] for of in seeds])
    ratio = float(np.mean([of.new[judged].mean() / of.new[best].mean() for of in seeds]))
    loss, loss_ends = over_seeds([(of.warm[PLAIN] - of.warm[judged]) / of.warm[PLAIN].mean() for of in seeds])
    return [
        Check(f"{name}, new items: R@10 genrec ({judged}) - {best}", gain, gain_ends, "interval above 0",
              gain_ends[0] > 0),
        Check(f"{name}, new items: R@10 over {best}'s (aim 2)", ratio, None, "> 1", ratio > 1),
        Check(f"{name}, known items: share of the generator's R@10 lost", loss, loss_ends, f"<= {PRICE}",
              loss <= PRICE),
    ]  # fmt: skip


def table(seeds: list[NewItemsSeed]) -> str:
    """Markdown: recall of new and of known items for every mix."""
    lines = ["| list | R@10, next item new | R@10, next item known |", "|---|---|---|"]
    for name in seeds[0].new:
        cells = []
        for part in ("new", "warm"):
            mean, ends = over_seeds([getattr(of, part)[name] for of in seeds])
            cells.append(f"{mean:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "plain: new items keep their own scores. Inherited, lift b: they have their relatives', times e^b."]
    return "\n".join([*lines, f"Mixed: a small network orders the lists; with a lift of 0 for a price of {ASKED:.1%}."])
