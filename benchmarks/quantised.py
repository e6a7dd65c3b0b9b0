"""What int8 costs: a trained base wide enough that its blocks are most of its bytes, on the embedded catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import Check
from genrec.config import resolve_recipe
from genrec.pipeline import Run
from genrec.whole_path import quantise_and_compare

USERS = 1000
SHARE, OVERLAP = 0.65, 0.95
RECIPE: dict[str, Any] = {
    "name": "quantised",
    "data": {"synthetic": {}},
    "backbone": {
        "scratch": {"hidden": 256, "layers": 4, "heads": 4, "ffn": 768, "steps": 100},
        "load_in": "bfloat16",
        "soft_tokens": 1,
    },
    "adapter": {"kind": "mlp"},
    "finetune": {"epochs": 2, "evals": 2},
    "evaluate": {"baselines": []},
}


def quantised(runs: Path) -> tuple[list[Check], dict[str, str]]:
    """The int8 copy of a trained export beside it."""
    run = Run.create(resolve_recipe(RECIPE), runs)
    run.through_training()
    whole, copy = quantise_and_compare(run.export(), ["int8"], USERS)
    low, high = copy["ci95"]
    checks = [
        Check("int8: bytes of the model, share of bf16's", copy["share"], None, f"at most {SHARE}",
              copy["share"] <= SHARE),
        Check("int8: overlap@10 with bf16", copy["overlap@10"], None, f"at least {OVERLAP}",
              copy["overlap@10"] >= OVERLAP),
        Check("int8: change of N@10", copy["change"], [low, high], "interval not below 0", high >= 0),
    ]  # fmt: skip
    table = ["| export | MB | users/s | overlap@10 | N@10 |", "|---|---|---|---|---|"]
    table += [
        f"| {row['export']} | {row['bytes'] / 1e6:.1f} | {row['users/s']:.1f} | {row['overlap@10']:.3f} | "
        f"{row['ndcg@10']:.4f} |"
        for row in (whole, copy)
    ]
    return checks, {"Quantised": f"{USERS} test users of the embedded catalogue.\n\n" + "\n".join(table)}
