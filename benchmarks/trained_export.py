"""A trained export on the embedded catalogue: what serving's claims about quality and text are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genrec.config import resolve_recipe
from genrec.pipeline import Run

RECIPE: dict[str, Any] = {
    "name": "trained",
    "data": {"synthetic": {}},
    "backbone": {
        "scratch": {"hidden": 256, "layers": 4, "heads": 4, "ffn": 768, "steps": 100},
        "soft_tokens": 1,
    },
    "adapter": {"kind": "mlp"},
    "align": {"steps": 60},
    "finetune": {"epochs": 1, "evals": 1, "mixture": {"describe": 0.5}},
    "evaluate": {"baselines": []},
}


def trained_export(runs: Path) -> tuple[Run, Path]:
    """The run and its export, trained by the first call."""
    run = Run.create(resolve_recipe(RECIPE), runs)
    run.through_training()
    return run, run.export()
