"""Items' soft tokens have to make a frozen language model write the items' texts (EASE: Qiu et al., CIKM 2024).

The language model belongs to the objective: it is made from the catalogue's own words when a stage needs it, and no
weight of it reaches the system. What is left after the stage is an adapter that keeps of the features what texts say.
"""

from __future__ import annotations

import random
import tempfile
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

LONGEST = 48  # tokens of a text
DEPTH = {"hidden": 128, "layers": 1, "heads": 2, "ffn": 256, "vocab": 1000}
PRETRAIN = 300  # steps


@lru_cache(maxsize=2)
def frozen_lm(texts: tuple[str, ...]) -> tuple[Any, Any]:
    """A small causal LM of these texts, frozen, and its tokenizer; made once for the same texts.

    Half of what it learned from are a text's words in random order and then the text, or it would write well without
    looking at what stands before, and soft tokens could not move it.
    """
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(words, len(words))) for words in (text.split() for text in texts)]
    exercises = [f"{words}\n{text}" for words, text in zip(shuffled, texts, strict=True)]
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        make_scratch(
            texts, Path(folder), exercises=exercises, arch="qwen3", steps=PRETRAIN, seed=0, length=2 * LONGEST, **DEPTH
        )
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


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
