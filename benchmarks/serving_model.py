"""A random export of a given size: what serving costs does not depend on what the weights learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from genrec.artefacts import run_stage
from genrec.catalog import Catalogue
from genrec.prompts import Layout, Prompter
from genrec.serving.export import FORMAT, write_export

LEVELS, CODES, SOFT_TOKENS, WIDTH = 3, 256, 1, 256
FIXED = 16  # prompt tokens beside the history's; every event takes LEVELS + SOFT_TOKENS more
END = "<|end|>"


def random_ids(n_items: int, rng: np.random.Generator, n_codes: int = CODES) -> np.ndarray:
    """int32 [N, LEVELS] ids, all different, drawn from all that there are."""
    flat = np.unique(rng.integers(0, n_codes**LEVELS, 2 * n_items + 64))
    while len(flat) < n_items:
        flat = np.unique(np.concatenate([flat, rng.integers(0, n_codes**LEVELS, n_items)]))
    flat = rng.permutation(flat)[:n_items]
    return np.stack(np.unravel_index(flat, (n_codes,) * LEVELS), 1).astype(np.int32)


def random_export(runs: Path, n_items: int, seed: int = 0) -> Path:
    """An export with a Llama of about five million parameters.

    A prompt takes FIXED tokens and LEVELS + SOFT_TOKENS for each event: 96 for 20 events.

    Args:
        runs: where ``export/`` is made, or found from an earlier call.
        n_items: catalogue rows.
        seed: of weights, ids and soft tokens.

    Returns:
        The export's folder.
    """

    def build(work: Path) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(["History: Item: a lamp for the room"] * 9, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
        sizes: dict[str, Any] = {
            "base_vocab": len(tokenizer), "levels": LEVELS, "n_codes": CODES, "soft_tokens": SOFT_TOKENS,
            "bos": None, "eos": tokenizer.eos_token_id,
        }  # fmt: skip
        codes = random_ids(n_items, rng)
        bare = len(Prompter(tokenizer, Layout(**sizes, soft_prompt=0), codes).next_item([]).input_ids)
        layout = Layout(**sizes, soft_prompt=FIXED - bare)
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in layout.token_strings()])
        config = LlamaConfig(
            vocab_size=layout.size,
            hidden_size=WIDTH,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=layout.eos,
            pad_token_id=layout.eos,
        )
        names = [f"item-{row}" for row in range(n_items)]
        catalogue = Catalogue(
            item_ids=names,
            titles=names,
            descriptions=[""] * n_items,
            categories=[[] for _ in names],
            attributes=[{} for _ in names],
            prices=np.full(n_items, np.nan, np.float32),
            images=[None] * n_items,
            available=np.ones(n_items, bool),
        )
        return write_export(
            work,
            model=AutoModelForCausalLM.from_config(config).eval(),
            tokenizer=tokenizer,
            layout=layout,
            catalogue=catalogue,
            codes=codes,
            popularity=np.ones(n_items, np.int64),
            soft_items=torch.randn(n_items, SOFT_TOKENS, WIDTH) * 0.05,
            soft_prompt=torch.randn(layout.soft_prompt, WIDTH) * 0.05,
            item_scores=None,
            newcomers=None,
            adapter_state={"weight": torch.zeros(1)},
            adapter_settings={"kind": "linear"},
            tasks=[],
            card="# A random export of benchmarks/serving.py\n",
        )

    return run_stage(runs, "export", {"n_items": n_items, "seed": seed, "format": FORMAT}, {}, build)
