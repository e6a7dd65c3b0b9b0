"""Alignment (EASE): with the LLM frozen, the adapter learns to make it reconstruct each item's text, and its looks.

    python -m genrec.training.align --run runs/demo

The frozen LLM reads an item's soft tokens and must write the item's text; a contrastive term pulls the pooled soft
tokens towards the frozen LLM's own embedding of that text. Two exits: into fine-tuning, and `genrec features`, which
writes the aligned vectors for other rankers. A scratch base may be tuned along (`align.tune_base`): it has never seen a
vector that is no word, and frozen it cannot learn to read one.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from genrec.backbone import Backbone
from genrec.metrics import ci95
from genrec.prompts import Answer, Item, Prompt, render
from genrec.training.packing import PackedCollator, packed_rows
from genrec.training.texts import held_out_items, looks_of
from genrec.workspace import Workspace
from genrec.writer import DEFAULT_STYLE, told

log = logging.getLogger(__name__)
TEMPERATURE = 0.07


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over a model's parameters and buffers, to prove that a frozen model stayed bit-identical."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def info_nce(queries: Tensor, keys: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """InfoNCE (van den Oord et al. 2018), both ways, in nats; row i of each belongs together.

    Args:
        queries, keys: [B, D].
        temperature: of the cosine similarities.
    """
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def nll_per_prompt(backbone: Backbone, prompts: list[Prompt], row_tokens: int) -> np.ndarray:
    """Mean NLL in nats per target token of every prompt: float64 [n]."""
    collator = PackedCollator(backbone.layout)
    total = np.zeros(len(prompts))
    with torch.inference_mode():
        for i in range(0, len(prompts), 64):
            chunk = prompts[i : i + 64]
            rows = [row for p in chunk for row in packed_rows([p], row_tokens)]
            batch = {k: v.to(backbone.device) for k, v in collator(rows).items()}
            labels = batch.pop("labels")
            losses, where = backbone.token_losses(backbone.hidden(**batch), labels, batch["segments"])
            owner = torch.div(where, labels.shape[1] - 1, rounding_mode="floor").cpu().numpy()
            sums = np.bincount(owner, losses.double().cpu().numpy(), minlength=len(chunk))
            total[i : i + len(chunk)] = sums / np.bincount(owner, minlength=len(chunk))
    return total


@torch.inference_mode()
def text_embeddings(backbone: Backbone, prompts: list[Prompt]) -> Tensor:
    """The frozen LLM's embedding of texts: mean last hidden state, centred over all texts; float32 [n, D]."""
    collator = PackedCollator(backbone.layout)
    parts = []
    for i in range(0, len(prompts), 64):
        rows = [row for p in prompts[i : i + 64] for row in packed_rows([p], len(p.input_ids))]
        batch = {k: v.to(backbone.device) for k, v in collator(rows).items()}
        batch.pop("labels")
        real = (batch["segments"] >= 0)[..., None]
        parts.append((backbone.hidden(**batch).float() * real).sum(1) / real.sum(1))
    vectors = torch.cat(parts)
    return vectors - vectors.mean(0)


def align(space: Workspace, out: Path) -> dict[str, Any]:
    """Train adapter and soft prompt against the LLM, frozen unless `align.tune_base`, and measure what they carry.

    A tenth of the items never takes part in training; the three likelihoods are measured on them: NLL(text | own
    soft tokens), NLL(text | another item's), NLL(text | no soft tokens). With `align.looks` the first two of looks too.

    Args:
        space: a run whose catalogue, features, semantic ids and base are there.
        out: empty folder; gets aligned.safetensors.

    Returns:
        {"nll": {"own" | "other" | "none": {"mean", "ci95"}}, "looks_nll": the same (empty without looks),
        "held_out_items", "llm_sha256", "curve"}.
    """
    settings, seed = space.recipe.align, space.recipe.seed
    backbone = space.backbone(tuned=False, aligned=False).to("cuda" if torch.cuda.is_available() else "cpu")
    before = weights_hash(backbone.lm)
    prompter, texts = space.prompter, space.catalogue.texts()
    prompter = type(prompter)(space.tokenizer, space.layout, space.semantic_ids.codes, settings.max_text_tokens)
    n = len(texts)
    samples = [prompter.item_text(i, texts[i]) for i in range(n)]
    looks = looks_of(space) if settings.looks else []
    pictures = {i: prompter.looks(i, DEFAULT_STYLE, told(DEFAULT_STYLE, of)) for i, of in enumerate(looks) if of}
    row_tokens = max(len(s.input_ids) for s in [*samples, *pictures.values()])
    targets = text_embeddings(backbone, [prompter.encode([Answer(t)]) for t in texts])
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    apart = held_out_items(n, seed)[order]
    held, known = order[apart], order[~apart]
    assert backbone.adapter is not None
    head = nn.Linear(targets.shape[1], targets.shape[1]).to(backbone.device)
    backbone.sid_in.requires_grad_(False)
    trained = [*backbone.adapter.parameters(), backbone.soft_prompt, *head.parameters()]
    if settings.tune_base:
        trained += list(backbone.lm.requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=max(settings.steps, 2), pct_start=0.1
    )
    collator = PackedCollator(backbone.layout)
    curve = []
    log.info("align: %d items, %d held out, %d steps of %d", n, len(held), settings.steps, settings.batch_size)
    backbone.adapter.train()
    for step in tqdm(range(settings.steps), desc="align", unit="step", disable=None):
        items = rng.choice(known, min(settings.batch_size, len(known)), replace=False)
        asked = [samples[i] for i in items] + [pictures[i] for i in items if i in pictures]
        batch = collator(packed_rows(asked, row_tokens))
        batch = {k: v.to(backbone.device) for k, v in batch.items()}
        reconstruct = backbone(**batch)["loss"]
        rows = torch.from_numpy(items).to(backbone.device)
        pooled = backbone.soft_tokens(rows).mean(1).float()
        contrast = info_nce(head(pooled), targets[rows])
        (reconstruct + settings.contrastive_weight * contrast).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 10 == 0 or step == settings.steps - 1:
            curve.append({"step": step, "loss": round(reconstruct.item(), 4), "contrast": round(contrast.item(), 4)})
    backbone.eval()
    after = weights_hash(backbone.lm)
    assert settings.tune_base or before == after, "the frozen LLM changed during alignment"
    measured = held if len(held) >= 10 else order
    nll = {
        "own": nll_per_prompt(backbone, [samples[i] for i in measured], row_tokens),
        "other": nll_per_prompt(
            backbone,
            [
                prompter.encode(render("item_text", item=Item(b), answer=Answer(texts[a])))
                for a, b in _turned(measured.tolist())
            ],
            row_tokens,
        ),
        "none": nll_per_prompt(backbone, [prompter.encode([Answer(texts[i])]) for i in measured], row_tokens),
    }
    seen = [int(i) for i in measured if i in pictures]
    looks_nll = {}
    if len(seen) > 1:
        others = [prompter.looks(b, DEFAULT_STYLE, told(DEFAULT_STYLE, looks[a])) for a, b in _turned(seen)]
        looks_nll = {
            "own": nll_per_prompt(backbone, [pictures[i] for i in seen], row_tokens),
            "other": nll_per_prompt(backbone, others, row_tokens),
        }
    state = {
        k: v for k, v in backbone.trained_state().items() if k.startswith(("adapter.", "lm.")) or k == "soft_prompt"
    }
    save_file(state, out / "aligned.safetensors")
    return {
        "nll": _means(nll, seed),
        "looks_nll": _means(looks_nll, seed),
        "held_out_items": len(held),
        "width": backbone.sid_in.shape[1],
        "llm_sha256": after,
        "curve": curve,
    }


def _turned(items: list[int]) -> list[tuple[int, int]]:
    """Each item with another one."""
    return list(zip(items, [items[-1], *items[:-1]], strict=True))


def _means(values: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    return {k: {"mean": float(v.mean()), "ci95": list(ci95(v, 1000, seed))} for k, v in values.items()}


def main() -> None:
    """Align the adapter of a run from the command line."""
    from genrec.pipeline import Run

    parser = argparse.ArgumentParser(description="align a run's adapter with its frozen LLM")
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Run.open(parser.parse_args().run).align()


if __name__ == "__main__":
    main()
