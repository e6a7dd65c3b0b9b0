"""The whole path on real data, where it lies beside the checkout: one set, one seed, every rival in the same run.

    python -m benchmarks.real amazon-scientific
    python -m benchmarks.real movielens-1m-posters

Without the data it says so and exits 0. Protocols are those of the sets' published tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Check, finish
from genrec.artefacts import read_manifest
from genrec.config import Recipe, resolve_recipe
from genrec.evaluate import format_markdown
from genrec.pipeline import Run
from genrec.whole_path import whole_path

DATA = ROOT.parent / "shared" / "data"
SCRATCH: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 2, "ffn": 192, "steps": 300}
BACKBONE: dict[str, Any] = {
    "scratch": SCRATCH,
    "lora": {"r": 16, "alpha": 32},
    "soft_tokens": 1,
    "soft_prompt": 2,
    "neighbours": 200,
}
COLLABORATIVE: dict[str, Any] = {"collaborative_dim": 64, "collaborative_weight": 1.0}
IDS: dict[str, Any] = {"levels": 3, "codes": 64}
ALIGN: dict[str, Any] = {"steps": 200}
TRAINING: dict[str, Any] = {
    "batch_rows": 8, "learning_rate": 3e-3, "dropout": 0.2, "valid_users": 2000, "mixed_precision": "no",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "amazon-scientific": {
        "data": {"max_history": 50, "exclude_seen": False},
        "encode": {"text": {"dim": 128}, "image": None},
        "semantic_ids": IDS,
        "backbone": {**BACKBONE, "scratch": {**SCRATCH, "steps": 0}},
        "adapter": {"kind": "mlp"},
        "align": {"steps": 0},
        "finetune": {**TRAINING, "epochs": 4, "evals": 4},
        "mix": {"users": 10_000},
        "evaluate": {"sasrec_epochs": 40},
    },
    "amazon-beauty": {
        "data": {"max_history": 50, "exclude_seen": False},
        "encode": {"text": {"dim": 128}, "image": None},
        "semantic_ids": {**IDS, **COLLABORATIVE, "codes": 128},
        "backbone": BACKBONE,
        "adapter": {"kind": "mlp"},
        "align": ALIGN,
        "finetune": {**TRAINING, "epochs": 3, "evals": 3},
        "evaluate": {"sasrec_epochs": 30},
    },
    "movielens-1m-posters": {
        "data": {"max_history": 200, "exclude_seen": True, "max_users": 1500},
        "encode": {
            "text": {"dim": 128},
            "image": {"kind": "transformers", "model": str(DATA / "encoders" / "mobilenet-v2")},
        },
        "semantic_ids": {**IDS, **COLLABORATIVE},
        "backbone": BACKBONE,
        "adapter": {"kind": "mlp"},
        "align": ALIGN,
        "finetune": {**TRAINING, "pack_tokens": 816, "epochs": 4, "evals": 4, "valid_users": 1000},
        "sequence": {"epochs": 20},
        "evaluate": {"sasrec_epochs": 20},
    },
}


def recipe_of(dataset: str, **changes: Any) -> Recipe:
    """The recipe of one set; `changes` update sections ("data", "evaluate", ...) or set "name" and "seed"."""
    raw = json.loads(json.dumps(RECIPES[dataset])) | {"name": dataset}
    raw["data"] |= {"items": str(DATA / dataset / "items.jsonl")}
    raw["data"] |= {"interactions": str(DATA / dataset / "interactions.parquet")}
    for key, value in changes.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    return resolve_recipe(raw)


def main() -> int:
    """Run one set and write its verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(RECIPES))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-real", help="where the run goes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("genrec").setLevel(logging.INFO)
    folder = DATA / arguments.set
    if not (folder / "items.jsonl").is_file():
        logging.getLogger("genrec").warning("%s: no data there, nothing measured", folder)
        return 0
    run = Run.create(recipe_of(arguments.set), arguments.runs)
    metrics = whole_path(run)
    rival = metrics["paired"]["genrec-sasrec"]["ndcg@10"]
    seconds = sum(read_manifest(path.parent)["seconds"] for path in run.folder.rglob("manifest.json"))
    peak = max(read_manifest(path.parent)["peak_rss_mb"] for path in run.folder.rglob("manifest.json"))
    knn = metrics["paired"]["genrec-itemknn"]["ndcg@10"]
    checks = [
        Check("N@10 genrec - item-kNN, same run", knn["mean"], knn["ci95"], "mean >= 0", knn["mean"] >= 0),
        Check("N@10 genrec - sasrec, same run", rival["mean"], rival["ci95"], "mean >= 0", rival["mean"] >= 0),
        Check("minutes, whole path", seconds / 60, None, "<= 60", seconds <= 3600),
        Check("peak memory, GB", peak / 1000, None, "<= 8", peak <= 8000),
        Check(
            "invalid rate", metrics["models"]["genrec"]["invalid_rate"]["mean"], None, "0",
            metrics["models"]["genrec"]["invalid_rate"]["mean"] == 0,
        ),
    ]  # fmt: skip
    users = run.recipe.data.max_users
    title = f"{arguments.set}, leave-one-out, full catalogue" + (f", a sample of {users} users" if users else "")
    command = f"python -m benchmarks.real {arguments.set}"
    return finish(arguments.set, command, [run.recipe.seed], seconds, checks, {title: format_markdown(metrics)})


if __name__ == "__main__":
    sys.exit(main())
