"""Keys and values of prompts that were answered before, so that a user's next event extends them.

A prompt is found by what it consists of, its token ids and slots, and never by a user's name: what is found is what
would be computed, whoever asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genrec.decode import Past, Prefilled
from genrec.prompts import Prompt

NEW_EVENTS = 8  # a prompt is looked up without its newest 1 .. 8 events


@dataclass(frozen=True)
class Prefix:
    """A beginning that was read before."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [H, T, d] per layer
    n_tokens: int

    @property
    def n_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


def _key(prompt: Prompt, n_tokens: int) -> bytes:
    return prompt.input_ids[:n_tokens].tobytes() + prompt.slots[:n_tokens].tobytes()


class PrefixCache:
    """The most recently used prompts, in bounded memory. For one thread; the counts may be read from others."""

    def __init__(self, max_bytes: int, event_tokens: int) -> None:
        """
        Args:
            max_bytes: of keys and values together; the least recently used give way.
            event_tokens: tokens of one event of the history.
        """
        self._max_bytes, self._event_tokens = max_bytes, event_tokens
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self.n_bytes = 0
        self.hits = 0  # prompts that were extended
        self.misses = 0  # prompts that were computed whole

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all prompts."""
        self._entries.clear()
        self.n_bytes = 0

    def find(self, prompt: Prompt) -> Prefix | None:
        """The longest known beginning of a prompt, at least one event shorter; counts hit or miss."""
        n_tokens = len(prompt.input_ids)
        for events in range(1, NEW_EVENTS + 1):
            if (shorter := n_tokens - events * self._event_tokens) <= 0:
                break
            key = _key(prompt, shorter)
            if key in self._entries:
                self._entries.move_to_end(key)
                self.hits += 1
                return self._entries[key]
        self.misses += 1
        return None

    def keep(self, prompts: Sequence[Prompt], prefilled: Prefilled) -> None:
        """Remember what a batch computed; one that alone exceeds the bound is not kept."""
        for row, prompt in enumerate(prompts):
            key = _key(prompt, len(prompt.input_ids))
            if key in self._entries:
                self._entries.move_to_end(key)
                continue
            seen = prefilled.seen[row, 0]  # [T]
            if len(prompts) == 1 and bool(seen.all()):  # nobody else's, no padding: what is there already
                layers = [(keys[0], values[0]) for keys, values in prefilled.layers()]
            else:
                real = seen.nonzero().flatten()
                layers = [(keys[row][:, real], values[row][:, real]) for keys, values in prefilled.layers()]
            entry = Prefix(layers, len(prompt.input_ids))
            if entry.n_bytes > self._max_bytes:
                continue
            self._entries[key] = entry
            self.n_bytes += entry.n_bytes
            while self.n_bytes > self._max_bytes:
                self.n_bytes -= self._entries.popitem(last=False)[1].n_bytes


def stack(entries: Sequence[Prefix]) -> Past:
    """Beginnings side by side, padded on the right; one alone is not copied."""
    if len(entries) == 1:
        (entry,) = entries
        alone = [(keys[None], values[None]) for keys, values in entry.layers]
        return Past(alone, torch.tensor([entry.n_tokens], device=alone[0][0].device))
    width = max(entry.n_tokens for entry in entries)
    layers = []
    for of_layer in zip(*(entry.layers for entry in entries), strict=True):
        n_heads, _, size = of_layer[0][0].shape
        pair = [part.new_zeros(len(entries), n_heads, width, size) for part in of_layer[0]]
        for row, parts in enumerate(of_layer):
            for whole, part in zip(pair, parts, strict=True):
                whole[row, :, : part.shape[1]] = part
        layers.append((pair[0], pair[1]))
    lengths = torch.tensor([entry.n_tokens for entry in entries], device=layers[0][0].device)
    return Past(layers, lengths)
