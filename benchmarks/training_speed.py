"""What packing is worth: our fine-tuning step against transformers' Trainer on one padded sample per prefix.

Both train the same model (adapter, soft tokens, LoRA; no item scores, which read whole histories) on the same events of
the embedded catalogue, as many per step. A history of n events is one sequence of n targets here and n sequences of one
target there. The second part asks how near a step of a larger base comes to what the machine's matrix products alone
reach.
"""

from __future__ import annotations

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from benchmarks.results import Check, over_seeds
from genrec.artefacts import peak_rss_mb
from genrec.backbone import Backbone
from genrec.config import resolve_recipe
from genrec.pipeline import Run
from genrec.prompts import Prompt
from genrec.training.packing import PackedCollator, packed_rows

REPEATS = 3
HELD_OUT = 200  # histories after those that are trained on
PACK_TOKENS = 192


@dataclass(frozen=True)
class Sizes:
    """What keeps a machine busy: a GPU that gets small products waits for Python instead."""

    trained: dict[str, int]  # the base of the race between packed and padded
    stepped: dict[str, int]  # the larger base of the step beside the matrix products
    histories: int  # of the training log
    rows: int  # packed rows per step


def sizes() -> Sizes:
    """For this machine."""
    if torch.cuda.is_available():
        wide = {"hidden": 1024, "layers": 8, "heads": 16, "ffn": 3072}
        return Sizes(wide, wide, 600, 16)
    small = {"hidden": 64, "layers": 2, "heads": 2, "ffn": 192}
    return Sizes(small, {"hidden": 512, "layers": 4, "heads": 8, "ffn": 1536}, 600, 8)


LINES = {  # name -> the line, what it must be, and whether more (1) or less (-1) is better
    "speed": ("training: events per second, packed over padded prefixes", 3.0, 1),
    "memory": ("training: peak memory, packed over padded", 1.0, -1),
    "loss": ("training: held-out loss per event, packed over padded, less 1", 0.02, -1),
    "share": ("training: a step's share of the matrix-product rate, larger base", 0.5, 1),
}
Kind = Literal["packed", "padded"]


@dataclass(frozen=True)
class Epoch:
    """One pass over the same events."""

    events: int
    seconds: float
    peak_mb: float  # of the GPU where there is one, else of the process
    loss: float  # nats per event of held-out histories, after


def _run(runs: Path, name: str, scratch: dict[str, int]) -> Run:
    recipe = {
        "name": name,
        "data": {"synthetic": {}},
        "semantic_ids": {"codes": 32},
        "backbone": {"scratch": {"steps": 0, **scratch}, "soft_tokens": 1, "soft_prompt": 2, "profile": 0},
        "adapter": {"kind": "mlp"},
        "align": {"steps": 0},
    }
    run = Run.create(resolve_recipe(recipe), runs)
    run.prepare()
    run.encode()
    run.base()
    run.semantic_ids()
    return run


def _only_last(prompt: Prompt, levels: int) -> Prompt:
    """The same sequence with its last item as the only target."""
    targets = np.zeros_like(prompt.targets)
    targets[np.flatnonzero(prompt.targets)[-levels:]] = True
    return Prompt(prompt.input_ids, prompt.slots, targets)


def train_epoch(runs: Path, kind: Kind, seed: int) -> Epoch:
    """Train one epoch in one manner, in a process of its own."""
    of = sizes()
    run = _run(runs, "training-small", of.trained)
    space, layout = run.space, run.space.layout
    histories = [h for h in space.split.train if len(h) > 1]
    train, held_out = histories[: of.histories], histories[of.histories :][:HELD_OUT]
    events = sum(len(h) for h in train)
    rows = packed_rows([space.prompter.next_item(h) for h in train], PACK_TOKENS)
    batch = of.rows
    if kind == "padded":
        prefixes = [space.prompter.next_item(h[: end + 1]) for h in train for end in range(len(h))]
        batch = round(batch * len(prefixes) / len(rows))
        rows = [packed_rows([_only_last(p, layout.levels)], len(p.input_ids))[0] for p in prefixes]
    torch.manual_seed(seed)
    backbone = space.backbone(tuned=True).to("cuda" if torch.cuda.is_available() else "cpu").train()
    backbone(**_batch(run, rows[:1], backbone.device))["loss"].backward()  # what a first call starts is not timed
    backbone.zero_grad()
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=backbone,
            args=TrainingArguments(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=3e-3,
                lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), seed=seed, report_to=[],
                save_strategy="no", remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
            ),
            train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows]),
            data_collator=PackedCollator(layout),
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = True
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_rss_mb(resource.RUSAGE_SELF)
    return Epoch(events, seconds, peak, _loss(backbone, run, held_out))


def _batch(run: Run, rows: list[dict[str, np.ndarray]], device: torch.device) -> dict[str, Any]:
    return {name: of.to(device) for name, of in PackedCollator(run.space.layout)(rows).items()}


@torch.no_grad()
def _loss(backbone: Backbone, run: Run, histories: list[np.ndarray]) -> float:
    """Nats per event."""
    prompts = [run.space.prompter.next_item(h) for h in histories]
    batch = _batch(run, packed_rows(prompts, PACK_TOKENS), backbone.device)
    mean = float(backbone.eval()(**batch)["loss"])
    return mean * run.space.layout.levels


def _wait() -> None:
    """Until a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_share(runs: Path) -> np.ndarray:
    """A training step's floating-point rate over that of a plain matrix product of its size, per repeat."""
    of = sizes()
    run = _run(runs, "training-large", of.stepped)
    space = run.space
    rows = packed_rows([space.prompter.next_item(h) for h in space.split.train[: of.histories]], PACK_TOKENS)
    rows = rows[: 2 * of.rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = _batch(run, rows, device)
    backbone = space.backbone(tuned=True).to(device).train()

    def step() -> None:
        backbone.zero_grad()
        backbone(**batch)["loss"].backward()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    tokens = batch["input_ids"].numel()
    width, inner = of.stepped["hidden"], of.stepped["ffn"]
    left, right = torch.randn(tokens, width, device=device), torch.randn(width, inner, device=device)
    left @ right
    shares = []
    for _ in range(REPEATS):  # side by side: the machine's other work hits both
        started = time.perf_counter()
        for _ in range(3):
            step()
        _wait()
        of_step = 3 * counter.get_total_flops() / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(30):
            left @ right
        _wait()
        of_product = 30 * 2 * tokens * width * inner / (time.perf_counter() - started)
        shares.append(of_step / of_product)
    return np.array(shares)


def measure(runs: Path) -> tuple[dict[str, np.ndarray], float]:
    """Every repeat of every line of `LINES`, float64 [R], and the seconds that took: a few minutes."""
    started = time.perf_counter()
    epochs: dict[Kind, list[Epoch]] = {"packed": [], "padded": []}
    for seed in range(REPEATS):
        for kind, found in epochs.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its own process: its own peak memory
                found.append(pool.submit(train_epoch, runs, kind, seed).result())
    pairs = list(zip(epochs["packed"], epochs["padded"], strict=True))
    repeats = {
        "speed": np.array([(ours.events / ours.seconds) / (theirs.events / theirs.seconds) for ours, theirs in pairs]),
        "memory": np.array([ours.peak_mb / theirs.peak_mb for ours, theirs in pairs]),
        "loss": np.array([ours.loss / theirs.loss - 1 for ours, theirs in pairs]),
        "share": matrix_share(runs),
    }
    return repeats, time.perf_counter() - started


def checks_of(repeats: dict[str, np.ndarray]) -> list[Check]:
    """The lines."""
    result = []
    for name, (line, must, sign) in LINES.items():
        mean, ends = over_seeds([np.array([repeat]) for repeat in repeats[name]])
        result.append(Check(line, mean, ends, f"{'>=' if sign > 0 else '<='} {must}", sign * mean >= sign * must))
    return result


def table(repeats: dict[str, np.ndarray]) -> str:
    """Markdown: every repeat of every line."""
    lines = ["| line | repeats |", "|---|---|"]
    lines += [f"| {LINES[name][0]} | {', '.join(f'{of:.3f}' for of in repeats[name])} |" for name in LINES]
    return "\n".join(lines)


def main() -> None:
    """Print the lines alone."""
    with tempfile.TemporaryDirectory() as runs:
        for check in checks_of(measure(Path(runs))[0]):
            print(check)


if __name__ == "__main__":
    main()
