"""Serving's claims, measured side by side: exact beams, the floor below them, the prefix cache, the trie's size.

    make bench-serving                                              # half an hour on two idle cores
    python -m benchmarks.serving --parts lists --repeats 1          # a first look at one part

What each part found is kept in benchmarks/results/serving.npz: what one call does not measure stays as an earlier one
left it. The weights are random (`benchmarks.serving_model`) but for quantised copies. Rivals take turns within one
process, so that other work on the machine meets both; a ratio's interval is that of its mean over repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fuzz import fuzz
from benchmarks.kept import Kept
from benchmarks.overload import overload
from benchmarks.quantised import quantised
from benchmarks.ratios import ratio, seconds_of
from benchmarks.results import RESULTS, ROOT, Check, finish
from benchmarks.serving_model import CODES, LEVELS, random_export, random_ids
from benchmarks.vllm_lists import drafts, vllm_lists
from genrec.serving.engine import RankedItem, RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.trie import Trie

log = logging.getLogger("benchmarks.serving")
USERS, BEAMS, EVENTS, LONG = 16, 20, 20, 50
CATALOGUE = 10_000
STEP_CALLS = 20
PREFILLS = 6  # of one prompt, for every repeat: each takes milliseconds
Part = tuple[list[Check], dict[str, str]]  # its lines, and heading -> Markdown
TOLERANCE = 1e-3  # of a score, log P(item): float32 sums in another order


def requests(rng: np.random.Generator, users: int, events: int) -> list[RecommendRequest]:
    """Random users; nothing filtered, as transformers knows no filter."""
    histories = rng.integers(0, CATALOGUE, (users, events))
    return [
        RecommendRequest([f"item-{row}" for row in history], k=BEAMS, beams=BEAMS, exclude_seen=False)
        for history in histories
    ]


class Rival:
    """transformers' `generate` with beams and a prefix function over a dictionary of prefixes."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        export = engine.export
        tokens = export.layout.sid_tokens(export.codes).tolist()
        self._rows = {tuple(of): row for row, of in enumerate(tokens)}
        children: dict[tuple[int, ...], set[int]] = {}
        for of in tokens:
            for level in range(LEVELS):
                children.setdefault(tuple(of[:level]), set()).add(of[level])
        self._children = {prefix: sorted(codes) for prefix, codes in children.items()}

    @torch.inference_mode()
    def recommend(self, asked: list[RecommendRequest]) -> list[list[tuple[int, float]]]:
        """(row, score) per user, best first; scores renormalised over the legal tokens, as ours are."""
        engine, index = self._engine, self._engine.export.catalogue.index
        prompts = [engine.export.prompter.next_item([index[item] for item in one.history]) for one in asked]
        embeds, _ = engine._embed(prompts)
        found = engine.model.lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device),
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            max_new_tokens=LEVELS,
            length_penalty=0.0,
            do_sample=False,
            renormalize_logits=True,
            prefix_allowed_tokens_fn=lambda _, written: self._children[tuple(written.tolist())],
            output_scores=True,
            return_dict_in_generate=True,
        )
        rows = [self._rows[tuple(of)] for of in found.sequences.tolist()]
        pairs = list(zip(rows, found.sequences_scores.tolist(), strict=True))
        return [pairs[start : start + BEAMS] for start in range(0, len(pairs), BEAMS)]


def worst_difference(ours: list[list[RankedItem]], theirs: list[list[tuple[int, float]]]) -> float:
    """The greatest difference of the scores at equal ranks; infinite where a list is shorter."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if len(one) != len(other):
            return float("inf")
        worst = max(worst, *(abs(a.score - b[1]) for a, b in zip(one, other, strict=True)))
    return worst


class Floor:
    """The matrix products of one batch and nothing else: linear layers, attention's two, the levels' output rows."""

    def __init__(self, engine: TorchEngine, users: int, prompt: int) -> None:
        model, config = engine.model, engine.model.lm.config
        linear = [m.weight for m in model.lm.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self._linear: list[tuple[Tensor, Tensor]] = []
        self._attention: list[tuple[Tensor, Tensor, Tensor]] = []
        seen = 0
        randn = partial(torch.randn, device=engine.device)
        for tokens in (prompt, *[BEAMS] * (LEVELS - 1)):
            seen += tokens
            inputs = {width: randn(users * tokens, width) for width in {w.shape[1] for w in linear}}
            self._linear += [(inputs[weight.shape[1]], weight) for weight in linear]
            query, key = randn(users * heads, tokens, size), randn(users * heads, size, seen)
            self._attention += [(query, key, key.mT)] * config.num_hidden_layers
        for level, rows in enumerate((1, *[BEAMS] * (LEVELS - 1))):
            start = model.layout.sid_start + level * CODES
            self._linear.append((randn(users * rows, config.hidden_size), model.embedding[start : start + CODES]))

    @torch.inference_mode()
    def run(self) -> None:
        for inputs, weight in self._linear:
            F.linear(inputs, weight)
        for query, key, value in self._attention:
            torch.bmm(torch.bmm(query, key), value)


def beams(folder: Path, repeats: int, device: str = "cpu") -> tuple[list[Check], str]:
    """Exact top 20 of 16 users at once, against transformers and against the matrix products."""
    engine = TorchEngine(Export.load(folder), device, cache_bytes=0)
    rng = np.random.default_rng(0)
    asked = requests(rng, USERS, EVENTS)
    rival = Rival(engine)
    tokens = len(engine.export.prompter.next_item(range(EVENTS)).input_ids)
    floor = Floor(engine, USERS, tokens)
    difference = worst_difference(engine.recommend(asked), rival.recommend(asked))
    floor.run()
    times: dict[str, list[float]] = {"genrec": [], "transformers": [], "products": []}
    for number in range(repeats):
        times["genrec"].append(seconds_of(lambda: engine.recommend(asked)))
        times["transformers"].append(seconds_of(lambda: rival.recommend(asked)))
        times["products"].append(seconds_of(floor.run))
        log.info("beams %d: %s", number, {name: round(of[-1], 3) for name, of in times.items()})
    faster, faster_ends = ratio(times["transformers"], times["genrec"])
    share, share_ends = ratio(times["products"], times["genrec"])
    table = ["| | users/s |", "|---|---|"]
    table += [f"| {name} | {USERS / np.median(of):.1f} |" for name, of in times.items()]
    checks = [
        Check("users/s, times transformers' generate", faster, faster_ends, "at least 10", faster >= 10),
        Check("greatest difference of a score", difference, None, f"at most {TOLERANCE}", difference <= TOLERANCE),
        Check("users/s, share of the products alone", share, share_ends, "at least .6", share >= 0.6),
    ]
    return checks, f"{USERS} users, {tokens} tokens, {BEAMS} beams, {CATALOGUE} items.\n\n" + "\n".join(table)


def one_more_event(folder: Path, repeats: int) -> list[Check]:
    """The prompt of a known user after one new event, against the whole prompt."""
    cached, whole = TorchEngine(Export.load(folder), "cpu"), TorchEngine(Export.load(folder), "cpu", cache_bytes=0)
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {"extended": [], "whole": []}
    differences = []
    for number in range(repeats + 1):  # the first one warms up
        (asked,) = requests(rng, 1, LONG + 1)
        cached.recommend([RecommendRequest(asked.history[:-1])])
        prompt = cached.export.prompter.next_item([cached.export.catalogue.index[item] for item in asked.history])
        known = cached.prefixes.find(prompt)
        assert known is not None
        extended = seconds_of(lambda p=prompt, k=known: cached._prefill([p], [k]))  # type: ignore[misc]
        recomputed = seconds_of(lambda p=prompt: whole._prefill([p], [None]))  # type: ignore[misc]
        ours, theirs = cached.recommend([asked])[0], whole.recommend([asked])[0]
        index = cached.export.catalogue.index
        differences.append(worst_difference([ours], [[(index[item.item_id], item.score) for item in theirs]]))
        if number:
            times["extended"].append(extended)
            times["whole"].append(recomputed)
    share, ends = ratio(times["extended"], times["whole"])
    worst = max(differences)
    return [
        Check(f"prefill after event {LONG + 1}, share of recomputing", share, ends, "at most .2", share <= 0.2),
        Check("greatest difference of a score, extended", worst, None, f"at most {TOLERANCE}", worst <= TOLERANCE),
    ]


def trie_sizes(sizes: list[int], repeats: int) -> tuple[list[Check], str]:
    """Bytes, build time and a step's time by the number of items."""
    tries, rows = {}, []
    for n_items in sizes:
        codes = torch.from_numpy(random_ids(n_items, np.random.default_rng(n_items)))
        started = time.perf_counter()
        tries[n_items] = Trie.build(codes, CODES)
        build_s = time.perf_counter() - started
        del codes
        gc.collect()
        allowed = tries[n_items].filter(torch.ones(1, n_items, dtype=torch.bool))
        n_bytes = (tries[n_items].n_bytes + sum(nodes.nbytes for nodes in allowed.nodes)) / n_items
        rows.append([n_items, n_bytes, build_s])
        log.info("trie of %d items: %.1f bytes an item, %.2f s to build", n_items, n_bytes, build_s)
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(STEP_CALLS, LEVELS, USERS, BEAMS, generator=generator)

    def walk(trie: Trie, allowed: Any) -> None:
        for choice in choices:
            state = torch.zeros(USERS, BEAMS, dtype=torch.int64)
            for level in range(LEVELS):
                legal = trie.mask(state, level, allowed)
                nth = (choice[level] * legal.sum(-1)).long()  # a random legal code
                code = (legal.cumsum(-1) > nth[..., None]).int().argmax(-1)
                state = trie.step(state, code, level)

    times: dict[int, list[float]] = {n_items: [] for n_items in sizes}
    filters = {n: trie.filter(torch.ones(1, n, dtype=torch.bool)) for n, trie in tries.items()}
    for number in range(repeats + 1):  # the first one warms up
        for n_items, trie in tries.items():
            taken = seconds_of(lambda t=trie, f=filters[n_items]: walk(t, f))  # type: ignore[misc]
            if number:
                times[n_items].append(1000 * taken / (STEP_CALLS * LEVELS))
    few, many = sizes[0], sizes[-1]
    slower, ends = ratio(times[many], times[few])
    worst = rows[-1][1]
    table = ["| items | bytes an item | build s | ms a step |", "|---|---|---|---|"]
    table += [f"| {n} | {size:.1f} | {build:.2f} | {np.median(times[int(n)]):.3f} |" for n, size, build in rows]
    checks = [
        Check(f"ms a trie step, {many} items to {few}", slower, ends, "at most 1.5", slower <= 1.5),
        Check(f"bytes an item, trie and filter, {many} items", worst, None, "at most 24", worst <= 24),
    ]
    return checks, f"{USERS} users, {BEAMS} beams, a filter for all.\n\n" + "\n".join(table)


def lists(arguments: argparse.Namespace) -> Part:
    """Beams and prefix cache on the random export."""
    folder = random_export(arguments.runs, CATALOGUE)
    checks, table = beams(folder, arguments.repeats)
    return checks + one_more_event(folder, PREFILLS * arguments.repeats), {"Lists": table}


def catalogue_size(arguments: argparse.Namespace) -> Part:
    """The trie from few items to many."""
    checks, table = trie_sizes(sorted(arguments.items), arguments.repeats)
    return checks, {"Catalogue size": table}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "lists": lists,
    "catalogue-size": catalogue_size,
    "vllm": lambda arguments: vllm_lists(arguments.runs, arguments.repeats),
    "drafts": lambda arguments: drafts(arguments.runs, arguments.repeats),
    "quantised": lambda arguments: quantised(arguments.runs),
    "fuzz": lambda arguments: fuzz(arguments.document, arguments.words),
    "overload": lambda arguments: overload(arguments.runs, CATALOGUE, arguments.seconds),
}


def verdicts(kept: Kept) -> Part:
    """The lines and tables of every part of which something is kept, in the order of `PARTS`."""
    checks: list[Check] = []
    tables: dict[str, str] = {}
    for name in PARTS:
        if of := kept.get(f"serving/{name}"):
            checks += [Check(**check) for check in json.loads(str(of["checks"]))]
            tables |= json.loads(str(of["tables"]))
    return checks, tables | {"Which run each number comes from": kept.runs()}


def main() -> int:
    """Measure what is asked for, then write the verdicts on all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: only render what is kept")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--items", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--document", type=int, default=5_000, help="requests that schemathesis makes up")
    parser.add_argument("--words", type=int, default=10_000, help="conversations, and item texts, that are made up")
    parser.add_argument("--seconds", type=float, default=300, help="of the overload")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-serving", help="where exports are made")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("genrec").setLevel(logging.INFO)
    kept = Kept(RESULTS / "serving.npz")
    for name in arguments.parts:
        started = time.monotonic()
        checks, tables = PARTS[name](arguments)
        found = {"checks": json.dumps([asdict(check) for check in checks]), "tables": json.dumps(tables)}
        kept.put(f"serving/{name}", {key: np.array(text) for key, text in found.items()}, time.monotonic() - started)
    checks, tables = verdicts(kept)
    return finish("serving", "make bench-serving", [0], kept.seconds, checks, tables)


if __name__ == "__main__":
    sys.exit(main())
