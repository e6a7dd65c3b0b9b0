"""The beams and the training step on a GPU, beside the same rivals as on the CPU.

    make bench-gpu                                  # two minutes; says so and stops where there is no GPU

The beams' model is the small one of `benchmarks.serving`, so a GPU mostly waits for Python there.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import serving, training_speed
from benchmarks.results import finish
from benchmarks.serving_model import random_export

REPEATS = 7


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    serving.log.setLevel(logging.INFO)
    if not torch.cuda.is_available():
        serving.log.warning("no GPU that torch can use here: nothing measured")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as runs:
        of_beams, lists = serving.beams(random_export(Path(runs), serving.CATALOGUE), REPEATS, "cuda")
        repeats, _ = training_speed.measure(Path(runs))
    faster, difference, share = of_beams
    of_training = {check.check: check for check in training_speed.checks_of(repeats)}
    step = of_training.pop(training_speed.LINES["share"][0])
    tables = {
        "Lists": f"{lists}\n\nShare of the matrix products alone: {share.value:.3f}.",
        "Training": training_speed.table(repeats)
        + f"\n\nShare of the matrix-product rate, not a line here: {step.value:.4f}.",
    }
    checks = [faster, difference, *of_training.values()]
    return finish("gpu", "make bench-gpu", [0], time.monotonic() - started, checks, tables)


if __name__ == "__main__":
    sys.exit(main())
