"""A small causal LM made on the spot, for machines without a model hub.

A byte-level BPE tokenizer is trained on the catalogue's text and on that of the tasks to come, a small Qwen3 or Llama
is initialised and pre-trained on both for some minutes, so that there is something to adapt.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)
END = "<|endoftext|>"
RATE = 5e-3  # peak of the schedule
FIRST_LINES = 3  # of an item, before all of them come
EXERCISES = 0.5  # at most, of the documents
IGNORED = -100  # a target that teaches nothing


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


class Documents:
    """Pre-training documents: some of an item's lines in random order, then all of them in another.

    What came first tells much of what follows, so the model learns to read its context: the ability that a large
    pre-trained model brings along, and that soft tokens need, for they are context. Without the repetition two layers
    learn no such thing in this time (docs/LOG.md, 2026-11-25). Exercises, what the tasks' prompts say in words, come as
    often as items, and at most half of the time.
    """

    def __init__(self, texts: Sequence[str], exercises: Sequence[str], seed: int):
        self.exercises = exercises
        self.share = min(EXERCISES, len(exercises) / max(1, len(exercises) + len(texts)))
        self.items = [[line for line in text.split("\n") if line] or [""] for text in texts]
        self.rng = random.Random(seed)

    def document(self) -> str:
        """One document."""
        if self.exercises and self.rng.random() < self.share:
            return self.rng.choice(self.exercises)
        lines = self.rng.choice(self.items)
        some = self.rng.sample(lines, min(len(lines), FIRST_LINES))
        return "\n".join([*some, *self.rng.sample(lines, len(lines))])


def make_scratch(
    texts: Sequence[str],
    folder: Path,
    *,
    exercises: Sequence[str] = (),
    arch: str,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocab: int,
    steps: int,
    seed: int,
    batch: int = 32,
    length: int = 128,
) -> dict[str, Any]:
    """Train tokenizer and LM, and save both as a transformers folder.

    Args:
        texts: one text per item.
        folder: where `from_pretrained` will find them.
        exercises: texts of the tasks that will be trained: without them their words are spelled out in bytes.
        arch: "qwen3" or "llama".
        hidden: D; layers, heads, ffn: the model's shape.
        vocab: tokens of the BPE.
        steps: AdamW steps of `batch` documents, each cut at `length` tokens.
        seed: of weights and batches.

    Returns:
        {"parameters", "vocab", "curve": [{"step", "loss"}]}, loss in nats per token.
    """
    documents = Documents(texts, exercises, seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([*texts, *exercises], vocab)
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
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=max(steps, 2), pct_start=0.1)
    curve: list[dict[str, float]] = []
    for step in tqdm(range(steps), desc="pre-train", unit="step", disable=None):
        texts_of_batch = [documents.document() for _ in range(batch)]
        encoded = tokenizer(texts_of_batch, add_special_tokens=False).input_ids
        parts = [torch.tensor([end, *ids, end][: length + 1]) for ids in encoded]
        rows = pad_sequence(parts, batch_first=True, padding_value=IGNORED)  # [batch, length + 1 at most]
        logits = model(rows[:, :-1].clamp(min=0)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=IGNORED)
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
