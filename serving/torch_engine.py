"""The reference engine: transformers' forward pass, our beam search, one process, any device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from genrec.adapters.mixer import whole_lists
from genrec.decode import Prefilled, Ranked, beam_search, prefill
from genrec.filters import item_bitmap
from genrec.prompts import Prompt
from genrec.serving.engine import JsonRequest, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.exported_model import ExportedModel
from genrec.serving.prefix_cache import Prefix, PrefixCache, stack
from genrec.serving.ranked_items import ranked_items
from genrec.serving.resolve import beam_width, item_rows, max_positions, recommend_prompt, text_prompt
from genrec.trie import Trie

if TYPE_CHECKING:
    from genrec.serving.json_grammar import JsonGrammar

log = logging.getLogger(__name__)
BATCH_TOKENS = 16_384  # positions of one batch, beams and padding included
BATCH_ROWS = 64
CACHE_BYTES = 256 << 20  # of keys and values kept from earlier prompts
LEAST_SHARED = 16  # tokens at the start of two prompts that are worth reading once for both


class TorchEngine:
    """An `Engine` on torch."""

    name = "torch"

    def __init__(
        self,
        export: Export,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Load an export's weights and build its trie.

        Args:
            export: the export.
            device: None takes a GPU where there is one.
            dtype: see `ExportedModel`.
            cache_bytes: of the prompts' keys and values that are kept for a user's next event; 0 keeps none.

        Raises:
            ArtefactError: model/ holds no loadable model of this export, or another export took its place.
        """
        self.model = ExportedModel(export, device, dtype)
        self.device = self.model.device
        self.max_positions = max_positions(export)
        _ = export.prompter  # with the tokenizer, so that nothing is left to read from the folder
        export.check_unchanged()
        self.prefixes = PrefixCache(cache_bytes, export.layout.levels + export.layout.soft_tokens)
        self.prepare(export)()

    def prepare(self, export: Export) -> Callable[[], None]:
        """See `Engine.prepare`."""
        # soft vectors stay beside the embedding that they are spliced into
        splicer = dataclasses.replace(export, items=export.items.to(self.device), prompt=export.prompt.to(self.device))
        trie = Trie.build(torch.from_numpy(export.codes), export.layout.n_codes, self.device)
        item_scores = None if export.item_scores is None else export.item_scores.to(self.device)
        newcomers = None if export.newcomers is None else export.newcomers.to(self.device)
        mixer = None if export.mixer is None else export.mixer.to(self.device)

        def swap() -> None:
            self.export, self._splicer, self.trie = export, splicer, trie
            self.item_scores, self.newcomers, self.mixer = item_scores, newcomers, mixer
            if export.renewed:  # prompts are known by rows, whose soft tokens are others now
                self.prefixes.clear()

        return swap

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        """Best items first, at most `k`, fewer only where fewer are allowed.

        Raises:
            DataError: unknown item ids or categories, or numbers out of range.
        """
        catalogue = self.export.catalogue
        histories, prompts, bitmaps, widths = [], [], [], []
        for request in requests:
            rows = item_rows(catalogue, request.history)
            histories.append(rows)
            widths.append(beam_width(request, len(catalogue.item_ids)))
            prompts.append(recommend_prompt(self.export, rows, self.max_positions))
            bitmaps.append(
                item_bitmap(
                    catalogue,
                    seen=rows if request.exclude_seen else [],
                    categories=request.categories,
                    price_min=request.price_min,
                    price_max=request.price_max,
                    allow=request.allow,
                    deny=request.deny,
                )
            )
        results: list[list[RankedItem]] = [[] for _ in requests]
        steps = self.export.layout.levels - 1
        known = [self.prefixes.find(prompt) for prompt in prompts]
        extended = [i for i, key in enumerate(known) if key is not None]
        whole = [i for i, key in enumerate(known) if key is None]
        for group in (extended, whole):  # apart: beside a whole prompt nothing would be saved
            lengths = [len(prompts[i].input_ids) for i in group]
            for numbers in _batches(lengths, [widths[i] for i in group], steps):
                batch = [group[number] for number in numbers]
                prompt = self._prefill([prompts[i] for i in batch], [known[i] for i in batch])
                ranked = self._search(
                    prompt, [histories[i] for i in batch], [bitmaps[i] for i in batch], widths[batch[0]]
                )
                lists = ranked_items(self.export, ranked, [histories[i] for i in batch], [requests[i].k for i in batch])
                for i, items in zip(batch, lists, strict=True):
                    results[i] = items
        return results

    @cached_property
    def json_grammar(self) -> JsonGrammar:
        """What keeps JSON to its schema; made when first asked for."""
        from genrec.serving.json_grammar import JsonGrammar

        return JsonGrammar(self.export.tokenizer, self.export.layout)

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """Text for each request: greedy at temperature 0, else sampled from the whole softmax with its own seed.

        Raises:
            DataError: unknown item ids, numbers out of range, or no JSON schema.
        """
        prompts = [text_prompt(self.export, request, self.max_positions) for request in requests]
        longest = max((request.max_tokens for request in requests), default=0)
        results: list[TextResult | None] = [None] * len(requests)
        lengths = [len(p.input_ids) for p in prompts]
        # the same history side by side: its prompts share their beginning
        histories = [[] if isinstance(request, JsonRequest) else request.history for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: (len(histories[i]), histories[i], lengths[i]))
        for batch in _batches(lengths, [1] * len(prompts), longest, order):
            texts = self._generate([prompts[i] for i in batch], [requests[i] for i in batch])
            for i, result in zip(batch, texts, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    def continue_prompt(self, prompt: Prompt, max_tokens: int) -> TextResult:
        """The likeliest text after any prompt, for people who edit prompts."""
        return self._generate([prompt], [TextRequest("", max_tokens=max_tokens)])[0]

    def close(self) -> None:
        """Free the weights; the engine cannot answer any more. Calling it again does nothing."""
        for name in ("model", "trie", "item_scores", "newcomers", "mixer", "_splicer", "prefixes", "json_grammar"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _search(self, prompt: Prefilled, histories: list[list[int]], bitmaps: list[np.ndarray], beams: int) -> Ranked:
        """The best legal items after each of B prompts, new ones among them."""
        allowed = torch.from_numpy(np.stack(bitmaps)).to(self.device)  # [B, N]
        likely = None if self.item_scores is None else self.item_scores.read(histories, self.mixer is not None)
        prior = None if likely is None else self.trie.prior(likely.total)
        searched = self.trie.filter(allowed if self.newcomers is None else self.newcomers.without(allowed))
        found = beam_search(self.model, prompt, self.trie, beams, searched, prior)
        return whole_lists(histories, found, likely, allowed, self.newcomers, self.mixer, beams)

    def _prefill(self, prompts: list[Prompt], known: list[Prefix | None]) -> Prefilled:
        """Prompts through the model: whole ones, or what is new behind beginnings that are known for all of them."""
        found = [prefix for prefix in known if prefix is not None]
        new = prompts
        if found:
            new = [_cut(p, prefix.n_tokens, None) for p, prefix in zip(prompts, found, strict=True)]
        prefilled = prefill(self.model, *self._embed(new), stack(found) if found else None)
        self.prefixes.keep(prompts, prefilled)
        return prefilled

    def _embed(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Prompts -> vectors [B, T, D], padded on the right, and lengths int64 [B]."""
        lengths = [len(p.input_ids) for p in prompts]
        ids = np.zeros((len(prompts), max(lengths)), np.int64)
        slots = np.full_like(ids, -1)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, :length], slots[row, :length] = prompt.input_ids, prompt.slots
        padded = Prompt(ids, slots, np.zeros(ids.shape, bool))
        embeds = self._splicer.splice(padded, self.model.embedding)
        return embeds, torch.tensor(lengths, device=self.device)

    @torch.inference_mode()
    def _generate(self, prompts: list[Prompt], requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """One batch, token by token; a row that ended is carried along until all have."""
        n_rows = len(prompts)
        rows = torch.arange(n_rows, device=self.device)
        owner, shared = shared_prefixes(prompts)
        if max(shared):  # no row may begin with nothing: attention over nothing is not a number
            shared = [n or len(prompt.input_ids) - 1 for n, prompt in zip(shared, prompts, strict=True)]
        cache = DynamicCache()
        mask = torch.zeros(n_rows, 0, dtype=torch.long, device=self.device)  # [B, S]: 0 at padding
        if max(shared):
            firsts = [owner.index(group) for group in range(owner[-1] + 1)]
            read = prefill(self.model, *self._embed([_cut(prompts[i], 0, shared[i]) for i in firsts]))
            index = torch.tensor(owner, device=self.device)
            cache = read.cache
            cache.batch_select_indices(index)
            mask = read.seen[index, 0].long()
        starts = torch.tensor(shared, device=self.device)
        inputs, lengths = self._embed([_cut(p, n, None) for p, n in zip(prompts, shared, strict=True)])
        own = torch.arange(inputs.shape[1], device=self.device)
        positions = starts[:, None] + own  # [B, T]
        mask = torch.cat([mask, (own < lengths[:, None]).long()], dim=1)
        last = lengths - 1
        matchers = [self.json_grammar.matcher(r.schema) if isinstance(r, JsonRequest) else None for r in requests]
        dice = [torch.Generator().manual_seed(request.seed) for request in requests]
        written: list[list[int]] = [[] for _ in requests]
        ended: list[str | None] = [None] * n_rows
        while True:
            hidden = self.model.decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = self.model.text_logits(hidden[rows, last]).float()  # [B, V]
            if any(matchers):
                self.json_grammar.mask(logits, matchers)
            tokens = logits.argmax(-1).tolist()
            for row, request in enumerate(requests):
                if ended[row]:
                    continue
                if request.temperature > 0:  # on the CPU, so that a seed means the same on every device
                    below = logits[row].double().cpu() - logits[row].max().item()  # finite at any temperature
                    chances = (below / request.temperature).softmax(-1)
                    tokens[row] = int(torch.multinomial(chances, 1, generator=dice[row]))
                if (matcher := matchers[row]) is not None:
                    matcher.accept_token(tokens[row])
                if tokens[row] == self.export.layout.eos:
                    ended[row] = "stop"
                    continue
                written[row].append(tokens[row])
                if len(written[row]) == request.max_tokens:
                    ended[row] = "length"
            if all(ended):
                break
            inputs = self.model.embedding[torch.tensor(tokens, device=self.device)][:, None]  # [B, 1, D]
            positions = positions[rows, last][:, None] + 1
            mask = torch.cat([mask, mask.new_ones(n_rows, 1)], dim=1)
            last = torch.zeros_like(last)
        return [
            TextResult(self.export.tokenizer.decode(ids, skip_special_tokens=True), str(reason), ids)
            for ids, reason in zip(written, ended, strict=True)
        ]


def shared_prefixes(prompts: Sequence[Prompt]) -> tuple[list[int], list[int]]:
    """Which neighbouring prompts begin alike.

    Example, `LEAST_SHARED` 2: "abcd", "abce", "xy" -> [0, 0, 1], [3, 3, 0]; at least one token is a prompt's own.

    Returns:
        for each prompt its group, and the tokens that it shares with the whole group (0: none).
    """
    owner, shared = [0], [0]
    for before, prompt in pairwise(prompts):
        n = min(len(before.input_ids), len(prompt.input_ids)) - 1
        differ = (before.input_ids[:n] != prompt.input_ids[:n]) | (before.slots[:n] != prompt.slots[:n])
        common = int(differ.argmax()) if differ.any() else n
        group = [i for i in range(len(owner)) if owner[i] == owner[-1]]
        if len(group) > 1:
            common = min(common, shared[-1]) if 2 * common >= shared[-1] else 0
        if common >= LEAST_SHARED:
            owner.append(owner[-1])
            shared.append(0)
            for i in (*group, len(owner) - 1):
                shared[i] = common
        else:
            owner.append(owner[-1] + 1)
            shared.append(0)
    return owner, shared


def _cut(prompt: Prompt, start: int, end: int | None) -> Prompt:
    return Prompt(prompt.input_ids[start:end], prompt.slots[start:end], prompt.targets[start:end])


def _batches(
    lengths: list[int], widths: list[int], steps: int, order: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Request numbers in batches of one beam width and of similar length.

    Args:
        lengths: prompt tokens per request.
        widths: beams per request.
        steps: tokens that each beam appends.
        order: of the requests; None: by width and length.
    """
    batch: list[int] = []
    for i in order if order is not None else sorted(range(len(lengths)), key=lambda i: (widths[i], lengths[i])):
        # the batch is padded to its longest request
        size = (len(batch) + 1) * (max(lengths[j] for j in (*batch, i)) + steps * widths[i])
        if batch and (widths[i] != widths[batch[0]] or size > BATCH_TOKENS or len(batch) == BATCH_ROWS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
