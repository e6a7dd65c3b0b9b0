"""Exact constrained beam search over semantic ids, with the prompt's keys and values computed once.

All beams of a user live in *one* sequence: each step appends the beams' tokens side by side, and a 4-D attention mask
lets every beam see the prompt and its own ancestors only. So nothing is copied or re-ordered between steps, only
the legal range of the output matrix is multiplied, and no Python runs per token or beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from genrec.trie import Filter, Prior, Trie


class Scorer(Protocol):
    """What beam search needs of a model."""

    @property
    def decoder(self) -> nn.Module:
        """A transformers decoder: (inputs_embeds, attention_mask, position_ids, past_key_values) -> hidden states."""
        ...

    def sid_embed(self, level: int, codes: Tensor) -> Tensor:
        """codes int64 [...] -> input vectors [..., D]."""
        ...

    def sid_logits(self, level: int, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., C] of the level's codes."""
        ...


@dataclass(frozen=True)
class Ranked:
    """Beams, best first."""

    items: Tensor  # int64 [B, W], -1 where fewer than W items are legal
    scores: Tensor  # float32 [B, W], -inf there


def attention_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """visible bool [B, Q, S] -> additive mask [B, 1, Q, S] for a transformers decoder."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class Past:
    """Keys and values of what stands before a prompt, B rows padded on the right."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, H, P, d] per layer
    lengths: Tensor  # int64 [B], tokens

    def cache(self) -> DynamicCache:
        """A cache that begins with it. It grows by concatenation, so nothing is copied here and nothing changes."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache


@dataclass(frozen=True)
class Prefilled:
    """Prompts that the model has read; one search uses it up."""

    cache: DynamicCache
    seen: Tensor  # bool [B, 1, S]: what of the cache is no padding
    lengths: Tensor  # int64 [B], tokens, those of the past included
    hidden: Tensor  # [B, 1, D] after the last token

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, S, d] per layer."""
        layers: list[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]


@torch.inference_mode()
def prefill(model: Scorer, embeds: Tensor, lengths: Tensor, past: Past | None = None) -> Prefilled:
    """Read prompts once.

    Args:
        embeds: [B, T, D] prompt vectors, padded on the right.
        lengths: int64 [B] true lengths, at least 1.
        past: what stands before them, where it was read already; else they begin a sequence.
    """
    device = embeds.device
    batch, width, _ = embeds.shape
    cache = DynamicCache() if past is None else past.cache()
    new = torch.arange(width, device=device)
    real = new < lengths[:, None]  # [B, T]
    visible = real[:, None] & (new[:, None] >= new)  # [B, T, T]
    positions = new.expand(batch, -1)
    if past is not None:
        before = torch.arange(past.layers[0][0].shape[2], device=device) < past.lengths[:, None]  # [B, P]
        visible = torch.cat([before[:, None].expand(-1, width, -1), visible], dim=2)  # [B, T, P + T]
        real = torch.cat([before, real], dim=1)
        positions = positions + past.lengths[:, None]
    hidden = model.decoder(
        inputs_embeds=embeds,
        attention_mask=attention_mask(visible, embeds.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    hidden = hidden[torch.arange(batch, device=device), lengths - 1][:, None]
    return Prefilled(cache, real[:, None], lengths if past is None else lengths + past.lengths, hidden)


@torch.inference_mode()
def beam_search(
    model: Scorer,
    prompt: Prefilled,
    trie: Trie,
    beams: int,
    allowed: Filter | None = None,
    prior: Prior | None = None,
) -> Ranked:
    """The best legal items after each prompt.

    With `beams` at least the number of legal prefixes at every level the result is exact; below that it is beam
    search. The filter acts before the beams are chosen, so it never costs one. An item's score is the sum over levels
    of the log-softmax over the codes that lead on in the trie, whatever the filter: log P(item), which sums to one over
    the catalogue, so a request's filter changes no score.

    Args:
        prompt: what `prefill` read, B prompts.
        trie: the catalogue's ids.
        beams: W.
        allowed: item bitmaps [B, N] pushed up the trie.
        prior: item scores [B, N] pushed up the trie, added to the model's own logits.

    Returns:
        Items and their log-probabilities (see `Ranked`).
    """
    hidden, seen, lengths = prompt.hidden, prompt.seen, prompt.lengths  # seen: what each beam attends to, [B, W, S]
    batch, device, dtype = len(hidden), hidden.device, hidden.dtype
    state = torch.full((batch, 1), trie.root, dtype=torch.int64, device=device)
    scores = torch.zeros(batch, 1, device=device)
    for level in range(trie.n_levels):
        options = trie.options(state, level, allowed, prior)  # [B, W, C] each
        logits = model.sid_logits(level, hidden).float()
        if options.weights is not None:
            logits = logits + options.weights
        logp = logits.masked_fill(~options.known, torch.finfo(logits.dtype).min).log_softmax(-1)
        total = (scores[..., None] + logp).masked_fill(~options.legal, -torch.inf).flatten(1)  # [B, W * C]
        scores, best = total.topk(min(beams, total.shape[1]), dim=1)  # [B, W']
        parent, code = best // trie.n_codes, best % trie.n_codes
        state = trie.step(state.gather(1, parent), code, level)
        state = state.masked_fill(scores == -torch.inf, -1)
        if level + 1 == trie.n_levels:
            break
        n = parent.shape[1]
        inherited = seen.expand(batch, int(parent.max()) + 1, -1) if seen.shape[1] == 1 else seen
        inherited = inherited.gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))  # [B, W', S]
        own = torch.eye(n, dtype=torch.bool, device=device).expand(batch, -1, -1)
        seen = torch.cat([inherited, own], dim=2)  # [B, W', S + W']
        hidden = model.decoder(
            inputs_embeds=model.sid_embed(level, code).to(dtype),
            attention_mask=attention_mask(seen, dtype),
            position_ids=(lengths[:, None] + level).expand(-1, n),
            past_key_values=prompt.cache,
            use_cache=True,
        ).last_hidden_state
    items = trie.item(state.clamp(min=0)).masked_fill(state < 0, -1)
    return Ranked(items, scores)
