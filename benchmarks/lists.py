"""What models did for each test user of a set: the target's place in every list, and the tables that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.kept import Kept
from benchmarks.results import over_users_and_seeds
from genrec.artefacts import read_manifest
from genrec.pipeline import Run

METRICS = ("recall@10", "ndcg@10")


@dataclass(frozen=True)
class SeedResult:
    """What one training of every model did for each test user of a set."""

    places: dict[str, np.ndarray]  # model -> uint8 [U]: place of the target, from 1; 0 where it is not in the list
    thirds: np.ndarray  # uint8 [U]: 0 tail, 1 middle, 2 head, by the target's events in training
    costs: dict[str, np.ndarray]  # model -> float64 [3]: seconds, peak memory in MB, trained parameters (0: unknown)


def values(places: np.ndarray, metric: str) -> np.ndarray:
    """A metric of METRICS per user, float64, from the target's place in the list (0: not in it)."""
    hit = (places >= 1) & (places <= 10)
    return hit.astype(float) if metric == "recall@10" else hit / np.log2(np.maximum(places, 1) + 1.0)


def measured(run: Run, ranking: Path, stages: Iterable[Path], parameters: int) -> dict[str, np.ndarray]:
    """What is kept of one model of one seed: "places" and "cost", as in `SeedResult`.

    Args:
        run: of the set.
        ranking: the folder of the model's lists, with top.npy.
        stages: the folders of all that was made for this model alone.
        parameters: that were trained.
    """
    manifests = [read_manifest(stage) for stage in stages]
    cost = [sum(m["seconds"] for m in manifests), max(m["peak_rss_mb"] for m in manifests), parameters]
    targets = run.space.split.test.targets
    hits = np.load(ranking / "top.npy") == targets[:, None]
    return {"places": np.where(hits.any(1), hits.argmax(1) + 1, 0).astype(np.uint8), "cost": np.array(cost, float)}


def generated(run: Run, of: Run) -> dict[str, np.ndarray]:
    """What is kept of a generator, trained and ranked here unless it was: a set's run itself, with its "thirds" as in
    `SeedResult`, or a variant `of` it."""
    of.train()
    ranking = of.rank_test()
    stages = [path.parent for path in of.folder.glob("*/manifest.json")]
    parameters = read_manifest(of.folder / "lora")["result"]["trainable_parameters"]
    found = measured(run, ranking, stages, parameters)
    if of is not run:
        return found
    counts = run.space.popularity[run.space.split.test.targets]
    thirds = np.searchsorted(np.quantile(counts, (1 / 3, 2 / 3)), counts, "right")
    return found | {"thirds": thirds.astype(np.uint8)}


def kept_lists(kept: Kept, part: str, order: Iterable[str]) -> list[SeedResult]:
    """The seeds below a part that have the generator, with the models of `order` that all of these have."""
    found = []
    for seed in kept.below(part):
        models = kept.below(f"{part}/{seed}")
        if "genrec" in models:
            found.append({model: kept.get(f"{part}/{seed}/{model}") for model in models})
    shared = [model for model in order if all(model in of for of in found)]
    return [
        SeedResult(
            {model: of[model]["places"] for model in shared},
            of["genrec"]["thirds"],
            {model: of[model]["cost"] for model in shared},
        )
        for of in found
    ]


def difference(seeds: list[SeedResult], model: str, third: int | None = None) -> tuple[float, list[float]]:
    """N@10 of genrec minus a model's, with its interval; of one third of the users by their target's popularity."""
    parts = []
    for of in seeds:
        gain = values(of.places["genrec"], "ndcg@10") - values(of.places[model], "ndcg@10")
        parts.append(gain if third is None else gain[of.thirds == third])
    return over_users_and_seeds(parts)


def table(seeds: list[SeedResult], names: dict[str, str] | None = None, note: str = "") -> str:
    """Markdown: every model's metrics, and genrec minus it, with intervals over users and seeds.

    Args:
        seeds: of one set.
        names: model -> what its row is called, where that is another name.
        note: a paragraph below the first table.
    """
    models, names = list(seeds[0].places), names or {}
    lines = ["| model | recall@10 | ndcg@10 | genrec - it, ndcg@10 | minutes | GB | generator's trained parameters |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model in models:
        cells = []
        for metric in METRICS:
            mean, ends = over_users_and_seeds([values(of.places[model], metric) for of in seeds])
            cells.append(f"{mean:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]")
        mean, ends = difference(seeds, model)
        cells.append("" if model == "genrec" else f"{mean:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]")
        seconds, peak, parameters = np.mean([of.costs[model] for of in seeds], 0)
        cells += [f"{seconds / 60:.1f}", f"{peak / 1000:.1f}", f"{parameters:,.0f}" if parameters else ""]
        lines.append(f"| {names.get(model, model)} | {' | '.join(cells)} |")
    lines += ["", note] if note else []
    lines += ["", "genrec - it, ndcg@10, by how often training shows the target:", ""]
    lines += ["| model | tail | middle | head |", "|---|---|---|---|"]
    for model in models:
        if model != "genrec":
            thirds = (difference(seeds, model, third) for third in range(3))
            cells = [f"{mean:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]" for mean, ends in thirds]
            lines.append(f"| {names.get(model, model)} | {' | '.join(cells)} |")
    return "\n".join(lines)
