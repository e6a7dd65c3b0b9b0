"""The embedded catalogue, several seeds: the generator against its rivals, its ablations and its negative controls.

    make bench-demo                     # five seeds
    python -m benchmarks.demo --seeds 1 # a first look

Every stage is an artefact under runs/bench-demo, so a run that stops goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.results import ROOT, Check, finish, over_seeds
from genrec.artefacts import key_at, read_manifest, run_stage
from genrec.config import Recipe, load_recipe
from genrec.encoders.features import Features
from genrec.evaluate import format_markdown, load_per_user
from genrec.metrics import ci95, per_user
from genrec.pipeline import Run
from genrec.serving.engine import Engine, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.variants import LONGER
from genrec.whole_path import planted_truth, whole_path

log = logging.getLogger("benchmarks.demo")
RIVALS = ("sasrec", "markov", "itemknn")
N_BOOT = 2000
FILTERED = 300
PARITY_BEAMS = 20
TIE = 1e-2


def recipe_of(name: str, seed: int, **data: Any) -> Recipe:
    """The demo's recipe under another name and seed, with all rivals and ablations."""
    demo = load_recipe(ROOT / "training" / "recipes" / "demo.yaml")
    return demo.model_copy(
        update={
            "name": name,
            "seed": seed,
            "data": demo.data.model_copy(update=data),
            "evaluate": demo.evaluate.model_copy(
                update={"ablations": ["genrec-no-image", "genrec-no-soft"], "sasrec_search": True}
            ),
        }
    )


def longer(recipe: Recipe) -> Recipe:
    """The recipe with as many epochs as `genrec-no-soft` gets."""
    tuned = recipe.finetune.model_copy(update={"epochs": LONGER * recipe.finetune.epochs})
    return recipe.model_copy(update={"finetune": tuned})


def shuffle_features(run: Run) -> None:
    """Give every item another item's features."""
    order = np.random.default_rng(run.recipe.seed + 1).permutation(len(run.space.catalogue.item_ids))
    for modality, features in run.space.features.items():
        shuffled = Features(values=features.values[order], present=features.present[order])

        def build(out: Path, shuffled: Features = shuffled) -> None:
            shuffled.save(out)

        run_stage(
            run.folder, f"features/{modality}", {"shuffled": run.recipe.seed},
            {"catalog": key_at(run.folder / "catalog")}, build,
        )  # fmt: skip
    run.space.__dict__.pop("features")


def trained(recipe: Recipe, runs: Path, like: Run, shuffled: Literal["nothing", "inputs", "ids and inputs"]) -> Run:
    """A run up to fine-tuning; what does not depend on split or features is taken from `like`.

    `shuffled` says what reads other items' features: with "inputs" soft tokens and profile, under the true ids.
    """
    run = Run.create(recipe, runs)
    for stage in ("source", "catalog", "base"):  # same seed, same catalogue, same keys: not made again
        if not (run.folder / stage).exists():
            shutil.copytree(like.folder / stage, run.folder / stage)
    run.prepare()
    run.base()
    if shuffled != "nothing" and (run.folder / "lora" / "manifest.json").is_file():
        return run  # of an earlier call; encoding again would undo the shuffle
    run.encode()
    if shuffled == "ids and inputs":
        shuffle_features(run)
    run.semantic_ids()
    if shuffled == "inputs":
        shuffle_features(run)
    run.align()
    run.finetune()
    return run


def gains(run: Run) -> np.ndarray:
    """N@10 of the generator for every test user."""
    return per_user(np.load(run.rank_test() / "top.npy"), run.space.split.test.targets)["ndcg@10"]


def cold_recall(run: Run) -> np.ndarray:
    """R@10 of the generator for every test user of a cold_items split."""
    return per_user(np.load(run.rank_test() / "top.npy"), run.space.split.test.targets)["recall@10"]


def above_zero(name: str, a: list[np.ndarray], b: list[np.ndarray]) -> Check:
    """A paired difference, one array per seed, whose interval must lie above zero."""
    mean, ends = over_seeds([x - y for x, y in zip(a, b, strict=True)])
    return Check(name, mean, ends, "interval above 0", ends[0] > 0)


def filters_kept(engine: Engine, export: Export, histories: list[np.ndarray]) -> int:
    """Requests, of `FILTERED` with random filters, whose answer breaks one."""
    rng = np.random.default_rng(0)
    catalogue = export.catalogue
    names = sorted({name for of in catalogue.categories for name in of})
    requests = []
    for i in range(FILTERED):
        history = histories[i % len(histories)]
        low, high = np.sort(rng.choice(catalogue.prices, 2))
        requests.append(
            RecommendRequest(
                history=[catalogue.item_ids[row] for row in history],
                categories=rng.choice(names, 5, replace=False).tolist() if rng.random() < 0.5 else None,
                price_min=float(low) if rng.random() < 0.5 else None,
                price_max=float(high) if rng.random() < 0.5 else None,
                allow=rng.choice(catalogue.item_ids, 100, replace=False).tolist() if rng.random() < 0.5 else None,
            )
        )
    broken = 0
    for request, answer in zip(requests, engine.recommend(requests), strict=True):
        for item in answer:
            row = catalogue.index[item.item_id]
            fine = item.item_id not in request.history and bool(catalogue.available[row])
            fine &= request.categories is None or bool(set(request.categories) & set(catalogue.categories[row]))
            fine &= request.price_min is None or bool(catalogue.prices[row] >= request.price_min)
            fine &= request.price_max is None or bool(catalogue.prices[row] <= request.price_max)
            fine &= request.allow is None or item.item_id in request.allow
            if not fine:
                broken += 1
                break
    return broken


def same_lists(run: Run, users: int) -> tuple[np.ndarray, list[bool]]:
    """VllmEngine against TorchEngine: per user whether the top 10 agree up to ties; and texts drafted or not."""
    from genrec.serving.vllm_engine import VllmEngine

    export = Export.load(run.folder / "export")
    ids, cases = export.catalogue.item_ids, run.space.split.test
    requests = [RecommendRequest([ids[row] for row in h], beams=PARITY_BEAMS) for h in cases.histories[:users]]
    torch_engine = TorchEngine(export)
    expected = torch_engine.recommend(requests)
    agree = np.zeros(len(requests))
    texts = [
        TextRequest(ids[int(t)], [ids[row] for row in h])
        for t, h in zip(cases.targets[:20], cases.histories, strict=False)
    ]
    engine = VllmEngine(export, dtype="float32", speculative=True)
    try:
        for start in range(0, len(requests), 100):
            found = engine.recommend(requests[start : start + 100])
            for row, (ours, theirs) in enumerate(zip(found, expected[start : start + 100], strict=True), start):
                scores = {item.item_id: item.score for item in theirs}
                last = theirs[-1].score if theirs else 0.0
                agree[row] = len(ours) == len(theirs) and all(
                    abs(item.score - scores.get(item.item_id, last)) < TIE for item in ours
                )
            log.info(
                "parity: %d of %d users, %.4f agree", start + len(found), len(requests), agree[: start + 100].mean()
            )
        drafted = engine.generate(texts)
    finally:
        engine.close()
    plain_engine = VllmEngine(export, dtype="float32")
    try:
        plain = plain_engine.generate(texts)
    finally:
        plain_engine.close()
    return agree, [a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True)]


@dataclass
class SeedResult:
    """What one seed says, per test user where it can."""

    values: dict[str, np.ndarray]
    nll: dict[str, dict[str, Any]]
    invalid: float
    broken: int  # filtered requests whose answer broke a filter
    chance: float  # R@10 of a random list
    table: str


def end_with_parent() -> None:
    """Make this worker end when the process that started it does: an orphan would go on writing into its runs."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_seed(seed: int, runs: Path) -> SeedResult:
    """Everything that one seed needs; what an earlier call finished is read, not made again."""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s seed {seed}: %(message)s")
    logging.getLogger("genrec").setLevel(logging.INFO)
    run = Run.create(recipe_of(f"s{seed}", seed), runs)
    metrics = whole_path(run)
    of = load_per_user(run.folder / "eval" / "per_user.npz")
    values = {model: of[model]["ndcg@10"] for model in (*RIVALS, "genrec", "genrec-no-image", "genrec-no-soft")}
    groups = planted_truth(run)[1]
    for kind in ("picture", "text"):
        values[f"{kind}/genrec"] = of["genrec"]["ndcg@10"][groups[kind]]
        values[f"{kind}/no-image"] = of["genrec-no-image"]["ndcg@10"][groups[kind]]
    export = Export.load(run.folder / "export")
    broken = filters_kept(TorchEngine(export), export, run.space.split.test.histories)
    values["shuffled"] = gains(trained(longer(recipe_of(f"s{seed}-shuffled", seed)), runs, run, "inputs"))
    values["cold"] = cold_recall(trained(recipe_of(f"s{seed}-cold", seed, split="cold_items"), runs, run, "nothing"))
    values["cold-shuffled"] = cold_recall(
        trained(recipe_of(f"s{seed}-cold-shuffled", seed, split="cold_items"), runs, run, "ids and inputs")
    )
    return SeedResult(
        values=values,
        nll=read_manifest(run.folder / "alignment")["result"]["nll"],
        invalid=metrics["models"]["genrec"]["invalid_rate"]["mean"],
        broken=broken,
        chance=10 / len(export.catalogue.item_ids),
        table=format_markdown(metrics),
    )


def main() -> int:
    """Run every seed, then write the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N-1")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-demo", help="where the runs go")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument(
        "--parity-users", type=int, default=3000, help="test users of seed 0 that both engines rank; 0: none"
    )
    arguments = parser.parse_args()
    log.setLevel(logging.INFO)
    started = time.monotonic()
    seeds = list(range(arguments.seeds))
    if arguments.jobs > 1:  # models this small gain more from a second seed than from a second thread
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), end_with_parent) as pool:
        results = list(pool.map(run_seed, seeds, [arguments.runs] * len(seeds)))
    values = {name: [result.values[name] for result in results] for name in results[0].values}
    nll = {name: [result.nll[name] for result in results] for name in results[0].nll}
    invalid = max(result.invalid for result in results)
    broken = sum(result.broken for result in results)
    chance, table = results[0].chance, results[0].table
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    checks = [above_zero(f"N@10 genrec - {rival}", values["genrec"], values[rival]) for rival in RIVALS]
    checks.append(
        above_zero("picture users: N@10 genrec - no-image", values["picture/genrec"], values["picture/no-image"])
    )
    same = zip(values["text/genrec"], values["text/no-image"], strict=True)
    mean, ends = over_seeds([a - b for a, b in same])
    checks.append(Check("text users: N@10 genrec - no-image", mean, ends, "interval holds 0", ends[0] <= 0 <= ends[1]))
    checks.append(above_zero("N@10 genrec - no-soft", values["genrec"], values["genrec-no-soft"]))
    checks.append(above_zero("N@10 genrec - genrec on shuffled features", values["genrec"], values["shuffled"]))
    gone = zip(values["shuffled"], values["genrec-no-soft"], strict=True)
    mean, ends = over_seeds([a - b for a, b in gone])
    checks.append(Check("shuffled features: N@10 genrec - no-soft", mean, ends, "interval not above 0", ends[0] <= 0))
    for name, must, fine in (
        ("cold", "mean >= 5 x chance", lambda mean, _: mean >= 5 * chance),
        ("cold-shuffled", "interval not above chance", lambda _, ends: ends[0] <= chance),
    ):
        mean, ends = over_seeds(values[name])
        checks.append(Check(f"{name} items: R@10 (chance {chance:.4f})", mean, ends, must, bool(fine(mean, ends))))
    for a, b in (("own", "other"), ("other", "none")):
        apart = [x["ci95"][1] < y["ci95"][0] for x, y in zip(nll[a], nll[b], strict=True)]
        gap = float(np.mean([y["mean"] - x["mean"] for x, y in zip(nll[a], nll[b], strict=True)]))
        checks.append(Check(f"alignment: NLL {b} - {a}, nats", gap, None, "intervals apart in every seed", all(apart)))
    checks.append(Check("invalid rate", invalid, None, "0", invalid == 0))
    checks.append(
        Check(f"filtered requests that broke a filter, of {FILTERED * len(seeds)}", broken, None, "0", broken == 0)
    )
    if arguments.parity_users:
        agree, texts = same_lists(Run.open(arguments.runs / "s0"), arguments.parity_users)
        share, ends = float(agree.mean()), list(ci95(agree, N_BOOT, 0))
        checks.append(Check(f"vLLM and torch: same top 10, {len(agree)} users", share, ends, ">= 0.99", share >= 0.99))
        checks.append(Check("greedy text equal with and without drafts", float(np.mean(texts)), None, "1", all(texts)))
    quantised = json.loads((arguments.runs / "s0" / "quantised" / "comparison.json").read_text("utf-8"))
    rows = ["| export | MB | overlap@10 | N@10 change | 95 % interval |", "|---|---|---|---|---|"]
    rows += [
        f"| {r['export']} | {r['bytes'] / 1e6:.2f} | {r['overlap@10']:.3f} | {r['change']:+.4f} "
        f"| {r['ci95'][0]:+.4f} .. {r['ci95'][1]:+.4f} |"
        for r in quantised
    ]
    seconds = sum(read_manifest(p.parent)["seconds"] for p in arguments.runs.rglob("manifest.json"))
    log.info("this session: %.0f s", time.monotonic() - started)
    return finish(
        "demo", "make bench-demo" if len(seeds) == 5 else f"python -m benchmarks.demo --seeds {len(seeds)}", seeds,
        seconds, checks, {"Seed 0, leave-one-out, full catalogue": table, "Quantised, seed 0": "\n".join(rows)},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
