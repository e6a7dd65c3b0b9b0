"""The generator as a ranker: the best legal items after each history."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec.adapters.mixer import Mixer, whole_lists
from genrec.adapters.newcomers import Newcomers
from genrec.adapters.reranker import Reranker
from genrec.backbone import Backbone, collate_prompts
from genrec.decode import Ranked, beam_search, prefill
from genrec.prompts import Prompter
from genrec.splits import Cases

BATCH_TOKENS = 16_384  # of prompts per forward pass, padding included


def allowed_items(available: Tensor, cases: Cases, exclude_seen: bool) -> Tensor:
    """What B lists may hold, bool [B, N]: what is `available`, bool [N], less what the case's user had if so wished."""
    allowed = available.repeat(len(cases), 1)
    if exclude_seen:
        owner = np.repeat(np.arange(len(cases)), [len(of) for of in cases.seen])
        seen = np.concatenate(cases.seen).astype(np.int64)
        allowed[torch.from_numpy(owner), torch.from_numpy(seen)] = False
    return allowed


def search_cases(
    backbone: Backbone,
    prompter: Prompter,
    cases: Cases,
    *,
    available: np.ndarray,
    exclude_seen: bool,
    beams: int,
    newcomers: Newcomers | None = None,
    mixer: Mixer | None = None,
) -> Ranked:
    """What the beams find for every case.

    Args:
        backbone: in eval mode.
        prompter: encodes for the same catalogue.
        cases: histories to continue.
        available: bool [N]; other items are never ranked.
        exclude_seen: leave out what a case's user had.
        beams: beam width, W.
        newcomers: how new items get into the lists; None: like all others.
        mixer: orders the lists; None: the beams' scores do.

    Returns:
        [n, W] on the CPU.
    """
    width = min(beams, len(available))
    items = torch.full((len(cases), width), -1)
    scores = torch.full((len(cases), width), -torch.inf)
    prompts = [prompter.next_item(history) for history in cases.histories]
    order = np.argsort([len(p.input_ids) for p in prompts], kind="stable")
    open_items = torch.from_numpy(available).to(backbone.device)
    start = 0
    with torch.inference_mode():
        while start < len(order):
            size = max(1, min(128, BATCH_TOKENS // len(prompts[order[min(start + 127, len(order) - 1)]].input_ids)))
            rows = order[start : start + size]
            start += size
            ids, slots, lengths = collate_prompts([prompts[r] for r in rows], prompter.layout, backbone.device)
            batch = cases[rows]
            allowed = allowed_items(open_items, batch, exclude_seen)
            likely = backbone.likely(batch.histories, apart=mixer is not None)
            ranked = beam_search(
                backbone,
                prefill(backbone, backbone.embed(ids, slots), lengths),
                backbone.trie,
                beams,
                backbone.trie.filter(allowed if newcomers is None else newcomers.without(allowed)),
                None if likely is None else backbone.trie.prior(likely.total),
            )
            ranked = whole_lists(batch.histories, ranked, likely, allowed, newcomers, mixer, beams)
            n = min(width, ranked.items.shape[1])
            items[rows, :n], scores[rows, :n] = ranked.items[:, :n].cpu(), ranked.scores[:, :n].float().cpu()
    return Ranked(items, scores)


def rank_cases(
    backbone: Backbone,
    prompter: Prompter,
    cases: Cases,
    *,
    available: np.ndarray,
    exclude_seen: bool,
    beams: int,
    k: int = 50,
    newcomers: Newcomers | None = None,
    mixer: Mixer | None = None,
    reranker: Reranker | None = None,
) -> np.ndarray:
    """The generator's top items for every case; arguments as for `search_cases`.

    Args:
        k: items per case.
        reranker: orders what the beams find; None: their own scores do.

    Returns:
        int32 [n, k], best first, -1 where there are fewer.
    """
    found = search_cases(
        backbone, prompter, cases, available=available, exclude_seen=exclude_seen, beams=beams,
        newcomers=newcomers, mixer=mixer,
    )  # fmt: skip
    return listed(found if reranker is None else reranker.reorder(cases.histories, found), k)


def listed(found: Ranked, k: int = 50) -> np.ndarray:
    """Lists of k: int32 [n, k], -1 where there are fewer."""
    items = found.items[:, :k].to(torch.int32).numpy()
    return np.pad(items, ((0, 0), (0, k - items.shape[1])), constant_values=-1)
