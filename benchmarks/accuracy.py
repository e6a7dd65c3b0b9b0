"""Accuracy on real data, where it lies beside the checkout: every rival and every ablation in the same runs.

    make bench-accuracy                                        # all sets, all seeds: hours on a CPU
    python -m benchmarks.accuracy --sets amazon-scientific --seeds 1 --parts lists new-items

Every stage is an artefact under runs/bench-accuracy, so a run that stops goes on where it stopped. What each model did
for each test user is kept as the place of the target in its list, in benchmarks/results/accuracy-places.npz (of
new items: whether it is in the first ten, in accuracy-new-items.npz): every number of the tables follows from it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks import new_items
from benchmarks.real import DATA, RECIPES, recipe_of
from benchmarks.results import RESULTS, ROOT, Check, finish, over_users_and_seeds
from benchmarks.training_speed import training_checks
from genrec.artefacts import read_manifest
from genrec.config import Recipe
from genrec.pipeline import Run
from genrec.whole_path import evaluate_run

log = logging.getLogger("benchmarks.accuracy")
SEEDS = {"amazon-scientific": 5, "amazon-beauty": 3, "movielens-1m-posters": 3}
ABLATIONS = {
    "amazon-scientific": [
        "genrec-no-soft",
        "genrec-no-scores",
        "genrec-no-neighbours",
        "genrec-no-profile",
        "genrec-no-collaborative",
        "genrec-no-pretraining",
        "tiger",
    ],
    "amazon-beauty": ["genrec-no-soft", "genrec-no-scores", "tiger"],
    "movielens-1m-posters": ["genrec-no-image", "genrec-no-text", "genrec-no-soft", "tiger"],
}
PUBLISHED = {  # best figures that others report under the same protocol: R@10, N@10; and what genrec aims at
    "amazon-scientific": ("MISSRec, pre-trained on five other sets: .1360, .0753", (0.140, 0.080)),
    "amazon-beauty": ("RPG: .0809, .0464", (0.085, 0.050)),
}
BASELINES = ("popularity", "markov", "itemknn", "sasrec", "sasrec-features", "tiger")
METRICS = ("recall@10", "ndcg@10")
NEW_ITEM_SEEDS = 3
PARTS = ("lists", "new-items", "training")


@dataclass(frozen=True)
class SeedResult:
    """What one training of every model did for each test user of a set."""

    places: dict[str, np.ndarray]  # model -> uint8 [U]: place of the target, from 1; 0 where it is not in the list
    thirds: np.ndarray  # uint8 [U]: 0 tail, 1 middle, 2 head, by the target's events in training
    seconds: float  # of all stages


def values(places: np.ndarray, metric: str) -> np.ndarray:
    """A metric of METRICS per user, float64, from the target's place in the list (0: not in it)."""
    hit = (places >= 1) & (places <= 10)
    return hit.astype(float) if metric == "recall@10" else hit / np.log2(np.maximum(places, 1) + 1.0)


def accuracy_recipe(name: str, seed: int) -> Recipe:
    """A set's recipe with all its users, tuned rivals and its ablations."""
    evaluate = {"baselines": BASELINES[:-1], "ablations": ABLATIONS[name], "sasrec_search": True}
    return recipe_of(name, name=f"{name}-{seed}", seed=seed, data={"max_users": None}, evaluate=evaluate)


def run_seed(name: str, seed: int, runs: Path) -> SeedResult:
    """One set, one seed; what an earlier call finished is read, not made again."""
    run = Run.create(accuracy_recipe(name, seed), runs)
    run.through_training()
    for ablation in run.recipe.evaluate.ablations:
        run.variant(ablation).train()
    evaluate_run(run)
    targets = run.space.split.test.targets
    places = {}
    with np.load(run.folder / "eval" / "rankings.npz") as rankings:
        for model in rankings.files:
            hits = rankings[model] == targets[:, None]
            places[model] = np.where(hits.any(1), hits.argmax(1) + 1, 0).astype(np.uint8)
    counts = run.space.popularity[targets]
    thirds = np.searchsorted(np.quantile(counts, (1 / 3, 2 / 3)), counts, "right").astype(np.uint8)
    return SeedResult(
        places, thirds, sum(read_manifest(p.parent)["seconds"] for p in run.folder.rglob("manifest.json"))
    )


def table(name: str, seeds: list[SeedResult]) -> str:
    """Markdown: every model's metrics, and genrec minus it, with intervals over users and seeds."""
    models, best = list(seeds[0].places), best_baseline(seeds)
    lines = ["| model | recall@10 | ndcg@10 | genrec - it, ndcg@10 |", "|---|---|---|---|"]
    for model in models:
        cells = []
        for metric in METRICS:
            mean, ends = over_users_and_seeds([values(of.places[model], metric) for of in seeds])
            cells.append(f"{mean:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]")
        mean, ends = difference(seeds, model)
        cells.append("" if model == "genrec" else f"{mean:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]")
        lines.append(f"| {model}{' (best baseline)' if model == best else ''} | {' | '.join(cells)} |")
    if name in PUBLISHED:
        text, aims = PUBLISHED[name]
        means = [np.mean([values(of.places["genrec"], metric).mean() for of in seeds]) for metric in METRICS]
        verdicts = [
            f"{metric} {aim:.3f} {'reached' if mean >= aim else 'not reached'}"
            for metric, aim, mean in zip(METRICS, aims, means, strict=True)
        ]
        lines += ["", f"Best published (R@10, N@10): {text}. Aims: {', '.join(verdicts)}."]
    lines += ["", "genrec - it, ndcg@10, by how often training shows the target:", ""]
    lines += ["| model | tail | middle | head |", "|---|---|---|---|"]
    for model in models:
        if model != "genrec":
            thirds = (difference(seeds, model, third) for third in range(3))
            cells = [f"{mean:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]" for mean, ends in thirds]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(seeds: list[SeedResult], model: str, third: int | None = None) -> tuple[float, list[float]]:
    """N@10 of genrec minus a model's, with its interval; of one third of the users by their target's popularity."""
    parts = []
    for of in seeds:
        gain = values(of.places["genrec"], "ndcg@10") - values(of.places[model], "ndcg@10")
        parts.append(gain if third is None else gain[of.thirds == third])
    return over_users_and_seeds(parts)


def best_baseline(seeds: list[SeedResult]) -> str:
    """The baseline with the highest mean N@10."""
    return max(BASELINES, key=lambda name: np.mean([values(of.places[name], "ndcg@10").mean() for of in seeds]))


def checks_of(name: str, seeds: list[SeedResult]) -> list[Check]:
    """A set's lines."""
    best = best_baseline(seeds)
    rivals = {best: "best baseline"} | ({"sasrec": "SASRec"} if best != "sasrec" else {})
    if name == "movielens-1m-posters":
        rivals |= {"genrec-no-soft": "ids alone"}
    checks = []
    for model, what in rivals.items():
        mean, ends = difference(seeds, model)
        checks.append(Check(f"{name}: N@10 genrec - {model} ({what})", mean, ends, "interval above 0", ends[0] > 0))
    return checks


def draw(found: dict[str, list[SeedResult]], path: Path) -> None:
    """N@10 of every model on every set, with intervals, as one picture."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False, layout="constrained")
    for axis, (name, seeds) in zip(axes[0], found.items(), strict=True):
        models = list(seeds[0].places)[::-1]
        results = [over_users_and_seeds([values(of.places[model], "ndcg@10") for of in seeds]) for model in models]
        means = np.array([mean for mean, _ in results])
        reach = np.abs(np.array([ends for _, ends in results]).T - means)
        colours = ["#c0392b" if model == "genrec" else "#95a5a6" for model in models]
        axis.barh(models, means, xerr=reach, color=colours, error_kw={"lw": 1})
        axis.set(title=f"{name}, {len(seeds)} seed(s)", xlabel="N@10, full catalogue")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def lists(names: list[str], seeds: int | None, runs: Path) -> tuple[list[Check], dict[str, str], float]:
    """Every model on every set: lines, tables and seconds; writes the places and the picture."""
    found = {name: [run_seed(name, seed, runs) for seed in range(seeds or SEEDS[name])] for name in names}
    kept: dict[str, Any] = {}
    for name, results in found.items():
        for seed, result in enumerate(results):
            kept |= {f"{name}/{seed}/{model}": of for model, of in result.places.items()}
            kept[f"{name}/{seed}/thirds"] = result.thirds
    np.savez_compressed(RESULTS / "accuracy-places.npz", **kept)
    draw(found, ROOT / "docs" / "accuracy.png")
    tables = {"Picture": "![N@10 of every model](accuracy.png)"} | {
        f"{name}, leave-one-out, full catalogue, {len(results)} seed(s)": table(name, results)
        for name, results in found.items()
    }
    checks = [check for name, results in found.items() for check in checks_of(name, results)]
    return checks, tables, sum(result.seconds for results in found.values() for result in results)


def main() -> int:
    """Run what is asked for, then write the verdicts of every set that has a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, help="seeds 0 .. N-1 (default: five on Scientific, three elsewhere)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-accuracy", help="where the runs go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("genrec").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    names = [name for name in arguments.sets if (DATA / name / "items.jsonl").is_file()]
    for name in set(arguments.sets) - set(names):
        log.warning("%s: no data there, not measured", DATA / name)
    checks: list[Check] = []
    tables: dict[str, str] = {}
    started, seconds = time.monotonic(), 0.0
    if "lists" in arguments.parts and names:
        checks, tables, seconds = lists(names, arguments.seeds, arguments.runs)
    hits: dict[str, Any] = {}
    for name in new_items.USERS if "new-items" in arguments.parts else ():
        if name in names:
            n_seeds = min(arguments.seeds or SEEDS[name], NEW_ITEM_SEEDS)
            found = [new_items.run_seed(name, seed, arguments.runs) for seed in range(n_seeds)]
            checks += new_items.checks_of(name, found)
            tables[f"{name}, items held out of training, {n_seeds} seed(s)"] = new_items.table(found)
            for seed, of in enumerate(found):
                for part, lists_of in (("new", of.new), ("warm", of.warm)):
                    hits |= {f"{name}/{seed}/{part}/{key}": value.astype(bool) for key, value in lists_of.items()}
    if hits:
        np.savez_compressed(RESULTS / "accuracy-new-items.npz", **hits)
    if "training" in arguments.parts:
        checks += training_checks(arguments.runs)
    if not checks:
        return 0
    seeds = list(range(max(arguments.seeds or SEEDS[name] for name in names) if names else 1))
    seconds = max(seconds, time.monotonic() - started)
    whole = arguments.seeds is None and set(arguments.sets) == set(RECIPES) and set(arguments.parts) == set(PARTS)
    asked = f"--sets {' '.join(arguments.sets)} --seeds {len(seeds)} --parts {' '.join(arguments.parts)}"
    command = "make bench-accuracy" if whole else f"python -m benchmarks.accuracy {asked}"
    return finish("accuracy", command, seeds, seconds, checks, tables)


if __name__ == "__main__":
    sys.exit(main())
