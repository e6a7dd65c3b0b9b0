"""Published systems on real catalogues, where those lie beside the checkout.

    make bench-systems-real
    python -m benchmarks.systems_real --parts alignrec missrec --seeds 1

Every part of every seed is kept under runs/bench-systems-real, so a run that stops goes on where it stopped;
docs/systems-real.md is written from all that is kept. Without the data it says so and exits 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.real import DATA, recipe_of
from benchmarks.results import ROOT, Check, finish, over_seeds
from genrec.artefacts import write_json, write_text
from genrec.baselines import Popularity, rank
from genrec.feature_protocols import alignment_uniformity, item_cf, unit, zero_shot
from genrec.metrics import per_user
from genrec.pipeline import Run
from genrec.planted import Table
from genrec.real_table import real_table
from genrec.system_recipe import SystemRecipe, load_system
from genrec.system_run import lengthened
from genrec.training.system_quality import hits, system_scores
from genrec.training.systems import train

log = logging.getLogger("benchmarks.systems_real")
PAGE = ROOT / "docs" / "systems-real.md"
MOVIES, SCIENCE = "movielens-1m-posters", "amazon-scientific"
FEATURES = ("cb2cf", "ease", "itemsage", "clcrec", "mmsrec")  # whose features the generator is given
SMALL: dict[str, Any] = {
    "data": {"max_users": 1500},
    "align": {"steps": 60},
    "finetune": {"epochs": 2, "evals": 2, "valid_users": 300},
    "evaluate": {"beams": 20},
}
Found = dict[str, dict[str, Any]]  # row -> column -> mean, or values per case


def encoded(dataset: str, runs: Path, seed: int, **changes: Any) -> Run:
    """A run with catalogue, split and features."""
    run = Run.create(recipe_of(dataset, seed=seed, **changes), runs)
    run.prepare()
    run.encode()
    return run


def borrow(run: Run, other: Run, stage: str) -> None:
    """Copy what another run made of the same inputs; the stage's own key decides whether it is used."""
    if not (run.folder / stage).exists():
        shutil.copytree(other.folder / stage, run.folder / stage)


def vectors_of(system: Any, hidden: str | None = None) -> np.ndarray:
    """A system's content of all items, float32 [N, W], with one modality kept from it."""
    rows = torch.arange(system.n_items)
    hide = {m: torch.full((len(rows),), m == hidden) for m in system.modalities}
    with torch.no_grad():
        return np.asarray(system.eval().items(rows, hide=hide).content)


def raw_vectors(table: Table, hidden: str | None = None) -> np.ndarray:
    """All modalities' features side by side, centred, each of length 1: float32 [N, sum of D_m]."""
    parts = []
    for m, of in table.features.items():
        mean = of.values.mean(1)
        centred = unit((mean - mean[of.present].mean(0)) * of.present[:, None]) if of.present.any() else mean * 0
        parts.append(centred * (m != hidden))
    return np.concatenate(parts, 1)


def alignrec(runs: Path, seed: int) -> Found:
    """AlignRec's content after its alignment stage beside raw features, before any recommender is trained."""
    run = encoded(MOVIES, runs, seed, name=f"movies-{seed}", data={"max_users": 1500})
    table = real_table(run.space)
    recipe = lengthened(load_system("alignrec"), table)
    system = train(recipe.model_copy(update={"stages": recipe.stages[:1]}), table, seed, folder=run.folder / "alignrec")
    found: Found = {}
    for name, make in (
        ("raw features", lambda hidden=None: raw_vectors(table, hidden)),
        ("AlignRec, aligned", lambda hidden=None: vectors_of(system, hidden)),
    ):
        vectors, test, seen = make(), table.split.test, run.recipe.data.exclude_seen
        cf, agreement = item_cf(vectors, table.split, exclude_seen=seen)
        near, even = alignment_uniformity(vectors, table.split.train, seed)
        found[name] = {
            "zero-shot N@10": zero_shot(vectors, test, exclude_seen=seen),
            "item-CF N@10": cf,
            "neighbours shared with takers'": agreement,
            "text alone N@10": zero_shot(make("image"), test, exclude_seen=seen),
            "picture alone N@10": zero_shot(make("text"), test, exclude_seen=seen),
            "alignment": near,
            "uniformity": even,
        }
    return found


def missrec(runs: Path, seed: int) -> Found:
    """MISSRec with ids, from scratch, beside its published figures; all items are ranked, seen ones too."""
    run = encoded(SCIENCE, runs, seed, name=f"science-{seed}")
    table = real_table(run.space)
    with_ids = {"item.ids": True, "item.mix": "sum", "item.width": 64}
    found: Found = {"published: ids, from scratch": {"R@10": 0.1282, "N@10": 0.0711}}
    for name, recipe in (
        ("missrec, ids", load_system("missrec").changed(with_ids)),
        ("its ablation, a mean of the history, ids", load_system("missrec").changed(
            with_ids | load_system("missrec").prove.without)),
    ):  # fmt: skip
        system = train(lengthened(recipe, table), table, seed, folder=run.folder / name.split(",")[0].replace(" ", "-"))
        found[name] = accuracy(system_scores(system, table, table.split.test.users), table)
    popular = Popularity()
    popular.fit(table.split.train, table.n_items)
    top = rank(popular, table.split.test, exclude_seen=False)
    found["popularity"] = columns(per_user(top, table.split.test.targets))
    return found


def accuracy(scores: np.ndarray, table: Table) -> dict[str, Any]:
    """Of scores float32 [n, N] for the test cases, nothing left out."""
    top = np.argsort(-scores, 1, kind="stable")[:, :50].astype(np.int32)
    return columns(per_user(top, table.split.test.targets))


def columns(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """The two that the page shows."""
    return {"R@10": values["recall@10"], "N@10": values["ndcg@10"]}


def clcrec(runs: Path, seed: int) -> Found:
    """New items of MovieLens, ranked among new items: CLCRec, the same without its contrast, raw content."""
    cold = {"max_users": 1500, "split": "cold_items", "cold_share": 0.1}
    run = Run.create(recipe_of(MOVIES, seed=seed, name=f"movies-cold-{seed}", data=cold), runs)
    run.prepare()
    borrow(run, encoded(MOVIES, runs, seed, name=f"movies-{seed}", data={"max_users": 1500}), "features")
    run.encode()
    table = real_table(run.space)
    recipe = lengthened(load_system("clcrec").changed({"item.width": 64}), table)
    found: Found = {}
    for name, which in (("CLCRec", recipe), ("without its contrast", recipe.changed(recipe.prove.without))):
        system = train(which, table, seed, folder=run.folder / name.replace(" ", "-"))
        found[name] = {"cold R@10": hits(system_scores(system, table, table.split.test.users), table, "cold")}
    directions = unit(raw_vectors(table))
    users = np.stack([directions[history].mean(0) for history in table.split.test.histories])
    found["raw content, mean of the history"] = {"cold R@10": hits(users @ directions.T, table, "cold")}
    found["chance"] = {"cold R@10": 10 / int(table.split.cold.sum())}
    return found


def generator(runs: Path, seed: int) -> Found:
    """A small generator on 1,500 users, with each system's features in place of the raw ones."""
    raw = encoded(SCIENCE, runs, seed, **{**SMALL, "name": f"generator-{seed}"})
    table, found = real_table(raw.space), {}
    for name in ("raw features", *FEATURES):
        run = raw
        if name != "raw features":
            path = raw.folder / f"{name}.npy"
            if not path.is_file():
                recipe = lengthened(text_alone(load_system(name)), table)
                np.save(path, vectors_of(train(recipe, table, seed, folder=raw.folder / name)))
            encode = {"text": {"kind": "precomputed", "path": str(path.resolve())}}
            run = encoded(SCIENCE, runs, seed, **{**SMALL, "name": f"generator-{seed}-{name}", "encode": encode})
            borrow(run, raw, "base")  # the same words
        run.through_training()
        top = np.load(run.rank_test() / "top.npy")
        found[name] = columns(per_user(top, run.space.split.test.targets))
    return found


def text_alone(recipe: SystemRecipe) -> SystemRecipe:
    """The recipe for a catalogue without pictures: a stage that compares them with texts has nothing to do."""
    pictures = {str(at) for at, stage in enumerate(recipe.stages) if any("image" in term for term in stage.objectives)}
    return recipe.changed({f"stages.{at}": None for at in sorted(pictures)})


PARTS: dict[str, tuple[str, str, Callable[[Path, int], Found]]] = {
    "alignrec": ("AlignRec's protocols on features", MOVIES, alignrec),
    "missrec": ("MISSRec from scratch", SCIENCE, missrec),
    "clcrec": ("Cold start by CLCRec", MOVIES, clcrec),
    "generator": ("The generator with systems' features in place of raw ones", SCIENCE, generator),
}
MUST = (  # part, row, rival, column
    ("alignrec", "AlignRec, aligned", "raw features", "zero-shot N@10"),
    ("alignrec", "AlignRec, aligned", "raw features", "item-CF N@10"),
    ("missrec", "missrec, ids", "its ablation, a mean of the history, ids", "N@10"),
    ("clcrec", "CLCRec", "without its contrast", "cold R@10"),
    *(("generator", name, "raw features", "N@10") for name in FEATURES),
)


def measure(part: str, seed: int, runs: Path) -> Found:
    """One part of one seed, measured or read from what is kept."""
    kept = runs / f"{part}-{seed}.json"
    if not kept.is_file():
        started = time.monotonic()
        rows = PARTS[part][2](runs, seed)
        plain = {row: {k: np.asarray(v).round(6).tolist() for k, v in of.items()} for row, of in rows.items()}
        write_json(kept, {"seconds": round(time.monotonic() - started), "rows": plain})
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def table_of(seeds: list[Found]) -> str:
    """Means over seeds and their cases, as Markdown."""
    names = list(dict.fromkeys(k for of in seeds[0].values() for k in of))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in seeds[0]:
        cells = [f"{np.mean([np.mean(s[row][k]) for s in seeds]):.4f}" if k in seeds[0][row] else "" for k in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what is asked for and write page and results from all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="all unless given")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. N-1")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-systems-real", help="where parts are kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (DATA / SCIENCE / "items.jsonl").is_file():
        log.warning("%s: no data there, nothing measured", DATA)
        return 0
    for part in arguments.parts:
        for seed in range(arguments.seeds):
            measure(part, seed, arguments.runs)
    kept = {part: sorted(arguments.runs.glob(f"{part}-[0-9].json")) for part in PARTS}
    all_kept = {part: [json.loads(path.read_text(encoding="utf-8")) for path in of] for part, of in kept.items() if of}
    tables = {
        f"{PARTS[part][0]}: {PARTS[part][1]}, {len(of)} seed{'s' * (len(of) > 1)}": table_of([s["rows"] for s in of])
        for part, of in all_kept.items()
    }
    checks = []
    for part, row, rival, column in MUST:
        if part in all_kept:
            pairs = [np.subtract(s["rows"][row][column], s["rows"][rival][column]) for s in all_kept[part]]
            mean, ends = over_seeds(pairs)
            checks.append(Check(f"{column}, {row} - {rival}", mean, ends, "interval > 0", ends[0] > 0))
    write_text(PAGE, page_of(tables, checks))
    seconds = sum(s["seconds"] for of in all_kept.values() for s in of)
    return finish("systems-real", "make bench-systems-real", list(range(arguments.seeds)), seconds, checks, tables)


def page_of(tables: dict[str, str], checks: list[Check]) -> str:
    """docs/systems-real.md."""
    lines = [
        "# Systems on real data",
        "",
        "Made by `make bench-systems-real`; do not edit. Leave-one-out unless it says cold; MovieLens with a",
        "sample of 1,500 users. With one seed the intervals are over test cases alone: a start, no verdict. Every",
        "difference stands here, those that do not help too.",
    ]
    for heading, text in tables.items():
        lines += ["", f"## {heading}", "", text]
    lines += ["", "## Differences", "", "| difference | mean | 95 % | above zero |", "|---|---|---|---|"]
    for c in checks:
        low, high = c.ci95 or [0, 0]
        verdict = "yes" if c.holds else "**no**"
        lines.append(f"| {c.check} | {c.value:+.4f} | [{low:+.4f}, {high:+.4f}] | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
