"""A small causal LM made on the spot, for machines without a model hub.

A byte-level BPE tokenizer is trained on the catalogue's text, a small Qwen3 or Llama is initialised, and both are
pre-trained on that text for a minute or two, so that LoRA has something to adapt.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)
END = "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string has tokens, and they decode to the same string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


class Pages:
    """Pre-training documents: pages that list items with a line in common, like the pages of a shop.

    On such a page what came before tells what comes next, so the model learns to read its context: the ability that a
    large pre-trained model brings along. An item shows some of its lines, in random order.
    """

    def __init__(self, texts: Sequence[str], seed: int, items_per_page: int = 8, lines_per_item: int = 3):
        self.items = [[line for line in text.split("\n") if line] for text in texts]
        self.rng = random.Random(seed)
        self.items_per_page, self.lines_per_item = items_per_page, lines_per_item
        self.having: dict[str, list[int]] = {}
        for row, lines in enumerate(self.items):
            for line in lines:
                self.having.setdefault(line, []).append(row)

    def page(self) -> str:
        """One page."""
        rng = self.rng
        topic = rng.choice(rng.choice(self.items) or [""])
        rows = self.having.get(topic, [0])
        shown = []
        for row in rng.sample(rows, min(len(rows), rng.randint(1, self.items_per_page))):
            lines = rng.sample(self.items[row], min(len(self.items[row]), self.lines_per_item))
            shown.append("\n".join(dict.fromkeys([*lines[:-1], topic, *lines[-1:]]) if rng.random() < 0.5 else lines))
        return "\n\n".join(shown)


def make_scratch(
    texts: Sequence[str],
    folder: Path,
    *,
    arch: str,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocab: int,
    steps: int,
    seed: int,
    batch: int = 16,
    length: int = 128,
) -> dict[str, Any]:
    """Train tokenizer and LM, and save both as a transformers folder.

    Args:
        texts: one text per item.
        folder: where `from_pretrained` will find them.
        arch: "qwen3" or "llama".
        hidden: D; layers, heads, ffn: the model's shape.
        vocab: tokens of the BPE.
        steps: AdamW steps of `batch` rows of `length` tokens.
        seed: of weights and batches.

    Returns:
        {"parameters", "vocab", "curve": [{"step", "loss"}]}, loss in nats per token.
    """
    pages = Pages(texts, seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts, vocab)
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    end = tokenizer.eos_token_id
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=max(steps, 2), pct_start=0.1)
    curve: list[dict[str, float]] = []
    stream: list[int] = []
    for step in tqdm(range(steps), desc="pre-train", unit="step", disable=None):
        while len(stream) < batch * (length + 1):
            stream += [end, *tokenizer(pages.page(), add_special_tokens=False).input_ids]
        rows = torch.from_numpy(np.array(stream[: batch * (length + 1)]).reshape(batch, -1))
        del stream[: batch * (length + 1)]
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            curve.append({"step": step, "loss": round(loss.item(), 4)})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocab": len(tokenizer), "curve": curve}
