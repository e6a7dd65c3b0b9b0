"""Items' soft tokens have to make a frozen language model write the items' texts (EASE: Qiu et al., CIKM 2024).

The language model belongs to the objective: it is made from the catalogue's own words when a stage needs it, and no
weight of it reaches the system. What is left after the stage is an adapter that keeps of the features what texts say.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from genrec.adapters.modalities import Scaled
from genrec.adapters.soft_queries import SOFT_TOKENS
from genrec.adapters.system import System
from genrec.errors import ConfigError
from genrec.planted import Table
from genrec.scratch import IGNORED, make_scratch
from genrec.training.views import Views

log = logging.getLogger(__name__)
LONGEST = 48  # tokens of a text
DEPTH = {"hidden": 128, "layers": 1, "heads": 2, "ffn": 256, "vocab": 1000}
PRETRAIN = (300, 600, 1200)  # steps, tried in turn until the model reads what stands before
WELL = 2.0  # nats a token that a text's own words spare, against another's, where it reads well enough to teach
READS = 0.1  # nats below which it does not read
ASKED = 128  # texts that this is measured on


@lru_cache(maxsize=2)
def frozen_lm(texts: tuple[str, ...]) -> tuple[Any, Any]:
    """A small causal LM of these texts, frozen, and its tokenizer; made once for the same texts.

    Half of what it learned from are a text's words in random order and then the text, or it would write well without
    looking at what stands before, and soft tokens could not move it. How well it looks is measured; one that does not
    look well is trained again for longer, and the best one is taken.

    Raises:
        ConfigError: none of them looks.
    """
    rng = random.Random(0)
    exercises = [f"{mixed(text, rng)}\n{text}" for text in texts]
    found: list[tuple[float, Any, Any]] = []
    for attempt, steps in enumerate(PRETRAIN):
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
            make_scratch(
                texts, Path(folder), exercises=exercises, arch="qwen3", steps=steps, seed=attempt,
                length=2 * LONGEST, **DEPTH,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        found.append((spared(model, tokenizer, texts), model, tokenizer))
        log.info("reconstruct: %d steps, a text's own words spare %.3f nats a token", steps, found[-1][0])
        if found[-1][0] >= WELL:
            break
    spares, model, tokenizer = max(found, key=lambda attempt: attempt[0])
    if spares >= READS:
        return model, tokenizer
    raise ConfigError(
        f"objective reconstruct: the language model of these {len(texts)} texts does not read what stands before: a "
        f"text's own words spare it {spares:.3f} nats a token against another's after {PRETRAIN[-1]} steps, and "
        f"{READS} are needed; give items texts that differ in more than a few words, or drop the stage"
    )


def mixed(text: str, rng: random.Random) -> str:
    """A text's words in random order."""
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


@torch.no_grad()
def spared(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """How much less a text costs after its own words than after another's, in nats a token: 0 if nothing is read."""
    rng = random.Random(1)  # other orders than those it learned from
    some = rng.sample(texts, min(ASKED, len(texts)))
    before = [mixed(text, rng) for text in some]
    costs = []
    for words in (before, [*before[1:], before[0]]):
        start = [[tokenizer.eos_token_id, *tokenizer(f"{of}\n", add_special_tokens=False).input_ids] for of in words]
        ends = [tokenizer(text, add_special_tokens=False).input_ids[:LONGEST] for text in some]
        rows = pad_sequence([torch.tensor([*a, *b]) for a, b in zip(start, ends, strict=True)], True, IGNORED)
        targets = rows.clone()
        for row, of in zip(targets, start, strict=True):
            row[: len(of)] = IGNORED
        logits = model(rows[:, :-1].clamp(min=0)).logits
        costs.append(F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED).item())
    return costs[1] - costs[0]


class Reconstruct(nn.Module):
    """NLL of an item's text after a view of it as SOFT_TOKENS soft tokens, in nats per token.

    The view's W values are that many tokens, mapped to the LM's width by weights that go when the stage ends.
    """

    ids: Tensor
    lm: Any
    start: Tensor
    line: Tensor

    def __init__(self, system: System, table: Table, view: str = "content"):
        """Raises ConfigError where the data has no texts, or the view cannot be cut into tokens."""
        super().__init__()
        if not table.texts or not any(table.texts):
            raise ConfigError(
                f"objective reconstruct({view}): the items have no texts to write; give them titles, or drop the stage"
            )
        width = system.sizes.width
        if width % SOFT_TOKENS:
            raise ConfigError(f"objective reconstruct({view}): item.width {width} is no multiple of {SOFT_TOKENS}")
        self.view = view
        self.lm, tokenizer = frozen_lm(tuple(sorted(table.texts)))
        end = tokenizer.eos_token_id
        encoded = tokenizer(table.texts, add_special_tokens=False).input_ids
        parts = [torch.tensor([*ids[:LONGEST], end]) for ids in encoded]
        self.register_buffer("ids", pad_sequence(parts, True, IGNORED), persistent=False)
        self.register_buffer("start", torch.tensor([end]), persistent=False)
        self.register_buffer(
            "line", torch.tensor(tokenizer("\n", add_special_tokens=False).input_ids), persistent=False
        )
        words: Tensor = self.lm.get_input_embeddings().weight
        dim = words.shape[1]
        self.lift = nn.Sequential(
            nn.Linear(width // SOFT_TOKENS, dim), Scaled(dim, float(words.square().mean().sqrt()))
        )

    def forward(self, views: Views) -> Tensor:
        targets = self.ids[views.batch.items]  # [B, L]
        soft = self.lift(views[self.view].unflatten(1, (SOFT_TOKENS, -1)))  # [B, 4, D]
        word = self.lm.get_input_embeddings()
        start, line = (word(of).expand(len(soft), -1, -1) for of in (self.start, self.line))
        read = torch.cat([start, soft, line, word(targets[:, :-1].clamp(min=0))], 1)
        logits = self.lm(inputs_embeds=read).logits[:, -targets.shape[1] :]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
