"""vLLM's routes: our beams against vLLM's own, whether all routes agree, and drafts on and off."""

from __future__ import annotations

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.ratios import ratio, seconds_of
from benchmarks.results import Check
from benchmarks.trained_export import trained_export
from genrec.serving.baked_rows import bake_export, token_ids
from genrec.serving.engine import RankedItem, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.measured_engine import measure
from genrec.serving.torch_engine import TorchEngine

log = logging.getLogger("benchmarks.serving")
USERS, TOP = 16, 10  # at once, in the race
COMPARED = 300  # users whose lists are compared
TEXTS, WORDS = 64, 48  # descriptions, and their most tokens
AGREE, FASTER, DRAFTS = 0.99, 1.0, 1.2
CLOSE = 1e-3  # of a score, log P(item)
REST_S = 2.0  # between engines: vLLM's own processes spin for a second after a call, and would slow the next one down


class OwnBeams:
    """vLLM's `LLM.beam_search` on a baked export: token ids, no trie."""

    def __init__(self, export: Export) -> None:
        settings = {  # of its processes alone, not of engines that start later
            "TORCHDYNAMO_DISABLE": "1",  # an eager vLLM compiles a sampler function none the less
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, as ours
            # all cores, as ours; left alone, vLLM keeps one for its scheduler
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }
        from vllm import LLM

        from genrec.serving.vllm_core import CPU_BLOCK

        self._export = export
        self._items = {tuple(codes) for codes in export.layout.sid_tokens(export.codes).tolist()}
        with patch.dict(os.environ, settings):
            self._llm = LLM(
                str(export.model_dir), dtype="float32", enforce_eager=True, enable_prefix_caching=True,
                block_size=CPU_BLOCK, max_model_len=1024, max_logprobs=2 * TOP, generation_config="vllm",
                disable_log_stats=True,
            )  # fmt: skip
        self.listed = self.invalid = 0

    def recommend(self, asked: list[RecommendRequest]) -> None:
        """Search; counts sequences and those that are no item."""
        from vllm.sampling_params import BeamSearchParams

        index, levels = self._export.catalogue.index, self._export.layout.levels
        prompts: list[Any] = []
        for wish in asked:
            ids = token_ids(self._export, self._export.prompter.next_item([index[item] for item in wish.history]))
            assert ids is not None
            prompts.append({"prompt_token_ids": ids.tolist()})
        params = BeamSearchParams(beam_width=TOP, max_tokens=levels, ignore_eos=True)
        for output in self._llm.beam_search(prompts, params):
            found = [tuple(of.tokens[-levels:]) for of in output.sequences]
            self.listed += len(found)
            self.invalid += sum(of not in self._items for of in found)

    def close(self) -> None:
        """End its processes."""
        self._llm.llm_engine.engine_core.shutdown()


def agreement(one: list[list[RankedItem]], other: list[list[RankedItem]]) -> tuple[float, float]:
    """Share of users with the same items in the same order, and the greatest difference of a score at equal ranks."""
    same, worst = 0, 0.0
    for a, b in zip(one, other, strict=True):
        same += [item.item_id for item in a] == [item.item_id for item in b]
        worst = max([worst, *(abs(x.score - y.score) for x, y in zip(a, b, strict=True))])
    return same / len(one), worst


def vllm_lists(runs: Path, repeats: int) -> tuple[list[Check], dict[str, str]]:
    """Lists by vectors, by ids, by the torch engine and by vLLM's own beams."""
    from genrec.serving.vllm_engine import VllmEngine

    run, folder = trained_export(runs)
    whole, baked = Export.load(folder), Export.load(bake_export(folder, folder.parent))
    ids, test = whole.catalogue.item_ids, run.space.split.test
    wishes = [RecommendRequest([ids[row] for row in history], k=TOP, beams=TOP, exclude_seen=False)
              for history in test.histories[:COMPARED]]  # fmt: skip
    expected = TorchEngine(whole, "cpu", cache_bytes=0).recommend(wishes)
    times: dict[str, list[float]] = {}
    found: dict[str, list[list[RankedItem]]] = {}
    engines: dict[str, Any] = {}
    try:
        for name, make in (
            ("vectors", lambda: VllmEngine(whole, dtype="float32")),
            ("token ids", lambda: VllmEngine(baked, dtype="float32")),
            ("LLM.beam_search", lambda: OwnBeams(baked)),
        ):
            started = time.monotonic()
            engines[name] = make()
            log.info("%s: started in %.0f s", name, time.monotonic() - started)
        found = {name: engines[name].recommend(wishes) for name in ("vectors", "token ids")}
        for number in range(repeats + 1):  # the first one warms up
            at = (COMPARED + number * USERS) % (len(test.users) - USERS)  # users that no prefix cache knows
            asked = [RecommendRequest([ids[row] for row in history], k=TOP, beams=TOP, exclude_seen=False)
                     for history in test.histories[at : at + USERS]]  # fmt: skip
            for name, engine in engines.items():
                time.sleep(REST_S)
                taken = seconds_of(lambda e=engine, a=asked: e.recommend(a))  # type: ignore[misc]
                if number:
                    times.setdefault(name, []).append(taken)
            log.info("vLLM %d: %s", number, {name: round(of[-1], 3) for name, of in times.items()})
        theirs = engines["LLM.beam_search"]
        invalid = theirs.invalid / theirs.listed
    finally:
        for engine in engines.values():
            engine.close()
    checks = []
    for name in ("vectors", "token ids"):
        faster, ends = ratio(times["LLM.beam_search"], times[name])
        checks.append(
            Check(f"vLLM by {name}: users/s, times LLM.beam_search", faster, ends, "at least 1", faster >= FASTER)
        )
    known = set(ids)
    ours_invalid = sum(item.item_id not in known for lists in found.values() for items in lists for item in items)
    checks.append(Check("vLLM: items outside the catalogue", float(ours_invalid), None, "0", ours_invalid == 0))
    for name, lists in (
        ("torch and vLLM", (expected, found["vectors"])),
        ("vectors and token ids", tuple(found.values())),
    ):
        share, worst = agreement(*lists)
        checks.append(Check(f"{name}: users with the same top 10", share, None, f"at least {AGREE}", share >= AGREE))
        checks.append(Check(f"{name}: greatest difference of a score", worst, None, f"at most {CLOSE}", worst <= CLOSE))
    table = ["| route | users/s | lists that are items |", "|---|---|---|"]
    for name, of in times.items():
        share = 1 - invalid if name == "LLM.beam_search" else 1.0
        table.append(f"| {name} | {USERS / np.median(of):.1f} | {share:.3f} |")
    title = f"{USERS} test users at once, {TOP} beams, top {TOP}, {len(ids)} items, float32.\n\n"
    return checks, {"vLLM": title + "\n".join(table)}


def drafts(runs: Path, repeats: int) -> tuple[list[Check], dict[str, str]]:
    """Descriptions with n-gram drafts and without."""
    from genrec.serving.vllm_engine import VllmEngine

    run, folder = trained_export(runs)
    export = Export.load(folder)
    ids, test = export.catalogue.item_ids, run.space.split.test
    times: dict[str, list[float]] = {"on": [], "off": []}
    same = True
    with (
        closing(VllmEngine(export, dtype="float32", speculative=True)) as on,
        closing(VllmEngine(export, dtype="float32")) as off,
    ):
        for number in range(repeats + 1):  # the first one warms up
            rows = np.arange(number * TEXTS, (number + 1) * TEXTS) % len(test.targets)
            asked = [TextRequest(ids[test.targets[i]], [ids[row] for row in test.histories[i]], WORDS) for i in rows]
            answers = {}
            for name, engine in (("on", on), ("off", off)):
                started = time.perf_counter()
                answers[name] = engine.generate(asked)
                taken = (time.perf_counter() - started) / sum(len(text.token_ids) for text in answers[name])
                if number:
                    times[name].append(taken)
            same &= answers["on"] == answers["off"]
        counts = on.speculation()
        assert counts is not None
    speeds = measure(export)  # what `--engine auto` would see
    faster, ends = ratio(times["off"], times["on"])
    accepted = counts.accepted_tokens / max(1, counts.draft_tokens)
    example = answers["off"][0].text
    checks = [
        Check("drafts: greedy texts unlike those without", float(not same), None, "0", same),
        Check("drafts by n-grams: tokens/s, times without", faster, ends, f"at least {DRAFTS} where auto takes them",
              faster >= DRAFTS or not speeds.choose().drafts),
    ]  # fmt: skip
    text = (
        f"{TEXTS} descriptions at once, at most {WORDS} tokens. Tokens/s: {1 / np.median(times['on']):.0f} with n-gram "
        f"drafts, {1 / np.median(times['off']):.0f} without; {accepted:.2f} of the drafted tokens accepted. One text: "
        f"{example!r}. `--engine auto` measured {speeds}, and takes {speeds.choose()}."
    )
    return checks, {"Drafts": text}
