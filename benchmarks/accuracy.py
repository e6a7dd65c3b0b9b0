"""Accuracy on real data, where it lies beside the checkout: every rival and every ablation in the same runs.

    make bench-accuracy                                        # all sets, all seeds: hours on a CPU
    python -m benchmarks.accuracy --sets amazon-scientific --seeds 1 --parts lists new-items
    python -m benchmarks.accuracy --parts lists --jobs 12      # models side by side: many cores, or a GPU

Every stage is an artefact under runs/bench-accuracy, so a run that stops goes on where it stopped. What each model did
for each test user is kept, as the place of the target in its list, in benchmarks/results/accuracy.npz: every number of
the tables follows from it, and what one call does not measure stays as an earlier one left it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks import new_items, posters, training_speed
from benchmarks.kept import Kept
from benchmarks.lists import METRICS, SeedResult, difference, generated, kept_lists, measured, table, values
from benchmarks.real import ALIGN, COLLABORATIVE, DATA, RECIPES, SCRATCH, recipe_of
from benchmarks.results import RESULTS, ROOT, Check, finish, over_users_and_seeds
from genrec.artefacts import read_manifest
from genrec.baseline_rankings import rank_baseline
from genrec.config import Recipe
from genrec.pipeline import Run
from genrec.sasrec import GRID

log = logging.getLogger("benchmarks.accuracy")
SEEDS = {"amazon-scientific": 5, "amazon-beauty": 3, "movielens-1m-posters": 3}
ABLATIONS = {
    "amazon-scientific": [
        "genrec-no-soft",
        "genrec-no-scores",
        "genrec-no-neighbours",
        "genrec-no-profile",
        "genrec-no-mix",
        "genrec-with-collaborative",
        "genrec-with-pretraining",
        "tiger",
    ],
    "amazon-beauty": ["genrec-no-soft", "genrec-no-scores", "tiger"],
    "movielens-1m-posters": ["genrec-no-image", "genrec-no-text", "genrec-no-soft", "genrec-no-sequence", "tiger"],
}
ADDED = {  # parts that Scientific's recipe does without: what turns them on
    "genrec-with-collaborative": {"semantic_ids": COLLABORATIVE},
    "genrec-with-pretraining": {"backbone": {"scratch": SCRATCH}, "align": ALIGN},
}
PUBLISHED = {  # best figures that others report under the same protocol: R@10, N@10; and what genrec aims at
    "amazon-scientific": ("MISSRec, pre-trained on five other sets: .1360, .0753", (0.140, 0.080)),
    "amazon-beauty": ("RPG: .0809, .0464", (0.085, 0.050)),
}
BASELINES = ("popularity", "markov", "itemknn", "sasrec", "sasrec-features", "tiger")
SEARCHED = ("sasrec", "sasrec-features")  # on the first seed's validation; the other seeds take what it chose
PARTS = ("lists", "posters", "new-items", "training")
KEPT = RESULTS / "accuracy.npz"


def accuracy_recipe(name: str, seed: int, **changes: Any) -> Recipe:
    """A set's recipe with all its users and tuned rivals; `changes` as for `recipe_of`."""
    evaluate = {"baselines": BASELINES[:-1], "sasrec_search": True}
    return recipe_of(name, name=f"{name}-{seed}", seed=seed, data={"max_users": None}, evaluate=evaluate, **changes)


def generator(run: Run, name: str, seed: int, model: str) -> Run:
    """A set's run itself for genrec, else the variant without or with a part."""
    if model in ADDED:
        return Run(run.folder / "ablations" / model, accuracy_recipe(name, seed, **ADDED[model]), run.folder)
    return run if model == "genrec" else run.variant(model)


def models_of(name: str) -> list[str]:
    """Every model of a set, those that train longest first."""
    ablations = sorted(ABLATIONS[name], key=lambda model: model not in ("tiger", "genrec-no-soft"))
    return [*ablations, "genrec", *BASELINES[-2::-1]]


def prepare(name: str, seed: int, runs: Path) -> None:
    """What all models of one seed share; what an earlier call finished is read, not made again."""
    log_to_stderr()
    run = Run.create(accuracy_recipe(name, seed), runs)
    run.prepare()
    run.encode()
    run.base()


def measure(name: str, seed: int, runs: Path, model: str) -> dict[str, np.ndarray]:
    """One model of one seed, trained and ranked: what `measured` keeps."""
    log_to_stderr()
    run = Run.create(accuracy_recipe(name, seed), runs)
    if model not in BASELINES[:-1]:
        return generated(run, generator(run, name, seed, model))
    searched = None
    if seed and model in SEARCHED:
        first = Run.create(accuracy_recipe(name, 0), runs)
        chosen = read_manifest(rank_baseline(first, model))["result"]
        searched = {setting: chosen[setting] for setting in GRID}
    folder = rank_baseline(run, model, searched)
    return measured(run, folder, [folder], 0)


def measure_lists(names: list[str], seeds: int | None, runs: Path, jobs: int, kept: Kept) -> None:
    """Every model of every set and seed, `jobs` at a time, kept as soon as it is there."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking for a GPU starts CUDA, which survives no fork
    context = get_context("forkserver")  # a fresh process for each model, without importing everything again
    context.set_forkserver_preload(["benchmarks.accuracy", "genrec.training.finetune"])
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        ready = {
            pool.submit(prepare, name, seed, runs): (name, seed)
            for seed in range(max(SEEDS.values()))
            for name in names
            if seed < (seeds or SEEDS[name])
        }
        first: list[tuple[str, int, str]] = []
        later: list[tuple[str, int, str]] = []  # what takes the setting that the first seed's search chose
        for done in as_completed(ready):
            done.result()
            name, seed = ready[done]
            for model in models_of(name):
                (later if seed and model in SEARCHED else first).append((name, seed, model))
        for tasks in (first, later):
            running = {pool.submit(measure, name, seed, runs, m): (name, seed, m) for name, seed, m in tasks}
            for finished in as_completed(running):
                name, seed, model = running[finished]
                arrays = finished.result()
                kept.put(f"lists/{name}/{seed}/{model}", arrays, float(arrays["cost"][0]))
                log.info("%s seed %d, %s: N@10 %.4f", name, seed, model, values(arrays["places"], "ndcg@10").mean())


def table_of(name: str, seeds: list[SeedResult]) -> str:
    """Markdown: every model of a set, and what is published."""
    note = ""
    if name in PUBLISHED:
        text, aims = PUBLISHED[name]
        means = [np.mean([values(of.places["genrec"], metric).mean() for of in seeds]) for metric in METRICS]
        verdicts = [
            f"{metric} {aim:.3f} {'reached' if mean >= aim else 'not reached'}"
            for metric, aim, mean in zip(METRICS, aims, means, strict=True)
        ]
        note = f"Best published (R@10, N@10): {text}. Aims: {', '.join(verdicts)}."
    best = best_baseline(seeds)
    return table(seeds, {best: f"{best} (best baseline)"}, note)


def best_baseline(seeds: list[SeedResult]) -> str:
    """The baseline with the highest mean N@10."""
    measured = [name for name in BASELINES if name in seeds[0].places]
    return max(measured, key=lambda name: np.mean([values(of.places[name], "ndcg@10").mean() for of in seeds]))


def checks_of(name: str, seeds: list[SeedResult]) -> list[Check]:
    """A set's lines; none holds while a rival is unmeasured, and one counts the seeds that have them all."""
    best = best_baseline(seeds)
    missing = [model for model in BASELINES if model not in seeds[0].places]
    rivals = {best: f"best baseline; not measured: {', '.join(missing)}" if missing else "best baseline"}
    rivals |= {"sasrec": "SASRec"} if best != "sasrec" else {}
    if name == "movielens-1m-posters":
        rivals |= {"genrec-no-soft": "ids alone"}
    checks = []
    for model, what in rivals.items():
        if model in seeds[0].places:
            mean, ends = difference(seeds, model)
            holds = ends[0] > 0 and not missing
            checks.append(Check(f"{name}: N@10 genrec - {model} ({what})", mean, ends, "interval above 0", holds))
    absent = sorted({*missing, *rivals} - set(seeds[0].places))
    measured, wanted = 0 if absent else len(seeds), SEEDS[name]
    what = f"{name}: seeds with genrec and all its rivals" + (f" (without: {', '.join(absent)})" if absent else "")
    return [*checks, Check(what, measured, None, str(wanted), measured >= wanted)]


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


def verdicts(kept: Kept) -> Iterator[tuple[list[Check], str, str]]:
    """The lines, a heading and a table of every part of which something is kept."""
    found = {}
    for name in sorted(RECIPES):
        if seeds := kept_lists(kept, f"lists/{name}", [*BASELINES[:-1], "genrec", *ABLATIONS[name]]):
            found[name] = seeds
    if found:
        draw(found, ROOT / "docs" / "accuracy.png")
        yield [], "Picture", "![N@10 of every model](accuracy.png)"
    for name, seeds in found.items():
        yield (
            checks_of(name, seeds),
            f"{name}, leave-one-out, full catalogue, {len(seeds)} seed(s)",
            table_of(name, seeds),
        )
    if shown := posters.verdict(kept):
        yield [], *shown
    for name in new_items.USERS:
        if of := new_items.kept_seeds(kept, name):
            heading = f"{name}, items held out of training, {len(of)} seed(s)"
            yield new_items.checks_of(name, of), heading, new_items.table(of)
    if repeats := kept.get("training"):
        yield training_speed.checks_of(repeats), "Training, every repeat", training_speed.table(repeats)
    yield [], "Which run each number comes from", kept.runs()


def log_to_stderr() -> None:
    """Progress of the stages, for people; also in worker processes."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("genrec").setLevel(logging.INFO)
    log.setLevel(logging.INFO)


def main() -> int:
    """Measure what is asked for, then write the verdicts on all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, help="seeds 0 .. N-1 (default: five on Scientific, three elsewhere)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only render what is kept")
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at once")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-accuracy", help="where the runs go")
    arguments = parser.parse_args()
    log_to_stderr()
    names = [name for name in arguments.sets if (DATA / name / "items.jsonl").is_file()]
    for name in set(arguments.sets) - set(names):
        log.warning("%s: no data there, not measured", DATA / name)
    kept = Kept(KEPT)
    if "lists" in arguments.parts and names:
        measure_lists(names, arguments.seeds, arguments.runs, arguments.jobs, kept)
    if "posters" in arguments.parts and posters.SET in names:
        for seed in range(arguments.seeds or SEEDS[posters.SET]):
            for kind in posters.KINDS:
                arrays = posters.measure(seed, arguments.runs, kind)
                kept.put(f"{posters.PART}/{seed}/{kind}", arrays, float(arrays["cost"][0]))
    for name in new_items.USERS if "new-items" in arguments.parts else ():
        for seed in range(arguments.seeds or SEEDS[name]) if name in names else ():
            arrays, seconds = new_items.measure(name, seed, arguments.runs)
            kept.put(f"new-items/{name}/{seed}", arrays, seconds)
    if "training" in arguments.parts:
        repeats, seconds = training_speed.measure(arguments.runs)
        kept.put("training", repeats, seconds)
    parts = list(verdicts(kept))
    checks = [check for of, _, _ in parts for check in of]
    if not checks:
        return 0
    seeds = sorted({int(s) for name in RECIPES for s in kept.below(f"lists/{name}")} | {0})
    tables = {heading: text for _, heading, text in parts}
    return finish("accuracy", "make bench-accuracy", seeds, kept.seconds, checks, tables)


if __name__ == "__main__":
    sys.exit(main())
