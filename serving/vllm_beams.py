"""Beam search through vLLM: a level's beams of all users together, each a request of one token.

vLLM's prefix cache holds what a user's beams share, and its logits processor makes scores and legal codes those of
`genrec.decode.beam_search`; see `genrec.serving.trie_processor`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec.decode import Ranked
from genrec.prompts import Layout
from genrec.serving.vllm_process import Codes, VllmProcess
from genrec.trie import Filter, Prior, Trie


def vllm_beams(
    process: VllmProcess,
    layout: Layout,
    embedding: Tensor,
    trie: Trie,
    prompts: list[np.ndarray],
    beams: int,
    allowed: Filter,
    prior: Prior | None,
) -> Ranked:
    """The best legal items after each of B prompts, as `genrec.decode.beam_search` finds them.

    Args:
        process: for lists.
        layout: where the codes are in the vocabulary.
        embedding: input vectors [V, D] in the engine's dtype.
        trie: the catalogue's ids.
        prompts: vectors float32 [T, D], or token ids int64 [T].
        beams: W.
        allowed: item bitmaps [B, N] pushed up the trie.
        prior: item scores [B, N] pushed up the trie.
    """
    batch = len(prompts)
    state = torch.full((batch, 1), trie.root)  # [B, W]
    scores = torch.zeros(batch, 1)  # [B, W]
    written = torch.zeros(batch, 1, 0, dtype=torch.int64)  # [B, W, level]: each beam's tokens
    for level in range(trie.n_levels):
        logp = _level(process, layout, embedding, trie, prompts, written, state, level, allowed, prior, beams)
        total = (scores[..., None] + logp).flatten(1)  # [B, W * C]
        scores, best = total.topk(min(beams, total.shape[1]), dim=1)  # [B, W']
        parent, code = best // trie.n_codes, best % trie.n_codes
        state = trie.step(state.gather(1, parent), code, level).masked_fill(scores == -torch.inf, -1)
        before = written.gather(1, parent[..., None].expand(-1, -1, level))
        tokens = layout.sid_start + level * layout.n_codes + code
        written = torch.cat([before, tokens[..., None]], 2)
    return Ranked(trie.item(state), scores)


def _level(
    process: VllmProcess,
    layout: Layout,
    embedding: Tensor,
    trie: Trie,
    prompts: list[np.ndarray],
    written: Tensor,
    state: Tensor,
    level: int,
    allowed: Filter,
    prior: Prior | None,
    beams: int,
) -> Tensor:
    """Log-probabilities float32 [B, W, C] of a level's codes after each beam, -inf where illegal."""
    first = layout.sid_start + level * layout.n_codes
    options = trie.options(state, level, allowed, prior)
    logp = torch.where(options.legal, 0.0, -torch.inf)  # where one code leads on, its share is all
    asked = (options.known.sum(2) > 1) & options.legal.any(2)  # [B, W]
    if asked.any():
        known = options.known[asked]  # [R, C]
        weights = torch.zeros(known.shape) if options.weights is None else options.weights[asked]
        suffixes = written[asked] if prompts[0].dtype == np.int64 else embedding[written[asked]]
        codes, values = process.codes(
            Codes(
                prompts,
                asked.nonzero()[:, 0].numpy(),
                sent(suffixes),
                first,
                known.numpy(),
                options.legal[asked].numpy(),
                weights.numpy(),
                min(beams, layout.n_codes),
            )
        )
        row, at = np.isfinite(values).nonzero()
        answers = torch.full(known.shape, -torch.inf)
        answers[row, codes[row, at] - first] = torch.from_numpy(values[row, at])
        logp[asked] = answers
    return logp


def sent(inputs: Tensor) -> np.ndarray:
    """Token ids as they are; vectors as float32, which holds every value of the shorter types."""
    return inputs.numpy() if inputs.dtype == torch.int64 else inputs.float().numpy()
