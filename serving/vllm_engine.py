"""Lists and texts by vLLM, in this process: see docs/vllm-engine.md for settings and limits."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from genrec.adapters.item_scores import Likely
from genrec.adapters.mixer import whole_lists
from genrec.decode import Ranked
from genrec.errors import ArtefactError, ConfigError
from genrec.filters import item_bitmap
from genrec.prompts import Prompt
from genrec.serving.baked_rows import token_ids
from genrec.serving.compressed_tensors_copy import method_of, obstacle
from genrec.serving.engine import JsonRequest, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.ranked_items import ranked_items
from genrec.serving.resolve import MAX_POSITIONS, beam_width, item_rows, max_positions, recommend_prompt, text_prompt
from genrec.serving.speculation import Speculation
from genrec.serving.vllm_beams import sent, vllm_beams
from genrec.serving.vllm_process import Start, Text, VllmProcess
from genrec.trie import Trie

log = logging.getLogger(__name__)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


def input_embedding(model_dir: Path) -> Tensor:
    """The input embedding [V, D] of a transformers folder, read from its safetensors files.

    Raises:
        ArtefactError: no file there holds one.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                if name.endswith("embed_tokens.weight"):
                    embedding: Tensor = weights.get_tensor(name)
                    return embedding
    raise ArtefactError(
        f"{model_dir}: no input embedding (…embed_tokens.weight) in {[f.name for f in files] or 'it'}; "
        "export the run again"
    )


def vllm_obstacle(method: str | None = None) -> str | None:
    """Why vLLM cannot compute here with a copy by a method (None: with an unquantised export); None when it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; run `pip install 'genrec[cpu]'` (or 'genrec[gpu]' beside an NVIDIA GPU)"
    return None if method is None else obstacle(method)


@dataclass(frozen=True)
class _Search:
    """A list request, checked."""

    history: list[int]  # catalogue rows
    prompt: Prompt
    allowed: np.ndarray  # bool [N]
    width: int
    k: int


class VllmEngine:
    """`genrec.serving.engine.Engine` by vLLM.

    Lists: beam search by requests of one token each; a level's beams run as one batch, and the prefix cache
    holds what they share. The trie's logits processor makes scores and legal codes those of `genrec.decode`.

    Texts: n-gram drafts speed up text that repeats itself. vLLM's model runner V1 takes no logits processor
    beside drafts, so texts then run on an engine of their own, started when first asked.

    Safe to call from several threads.
    """

    name = "vllm"

    def __init__(
        self,
        export: Export,
        *,
        speculative: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int = MAX_POSITIONS,
        gpu_memory_utilization: float = 0.8,
        seed: int = 0,
    ):
        """
        Args:
            export: what to serve.
            speculative: draft texts by n-grams; greedy texts stay the same.
            dtype: of weights and cache; auto is bfloat16 or float16 for float32 exports as well.
            max_model_len: longest prompt and answer, in tokens; the model's own limit where that is less. Longer
                histories lose their oldest events.
            gpu_memory_utilization: share of a GPU's memory for everything, both engines if speculative.
            seed: of vLLM; a text request's own seed decides its draws.

        Raises:
            ConfigError: vLLM is not installed.
            ArtefactError: vLLM cannot serve this kind of export here, or another took its place.
        """
        config = json.loads((export.model_dir / "config.json").read_text(encoding="utf-8"))
        if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
            raise ArtefactError(
                f"{export.folder}: quantised by bitsandbytes, which vLLM 0.32 cannot load; "
                "serve the unquantised export, or take the torch engine"
            )
        method = method_of(config)
        if method == "w4a16" and dtype == "float32":
            raise ArtefactError(f"{export.folder}: vLLM has 4-bit weights in half precision only; leave dtype at auto")
        if method is not None and (found := obstacle(method)) is not None:
            raise ArtefactError(f"{export.folder}: {found}")
        if (found := vllm_obstacle()) is not None:
            raise ConfigError(f"{found}, or take the torch engine")
        layout = export.layout
        self._served = export, Trie.build(torch.from_numpy(export.codes), layout.n_codes)
        self._speculative = speculative
        self._max_positions = max_positions(export, max_model_len)
        self._arguments: dict[str, Any] = {
            "model": str(export.model_dir),
            "dtype": dtype,
            "seed": seed,
            "max_model_len": self._max_positions,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # none of the base's sampling defaults
            "logprobs_mode": "processed_logits",
            "max_logprobs": layout.n_codes,
            "gpu_memory_utilization": gpu_memory_utilization / (2 if speculative else 1),
        }
        self._lock = threading.Lock()
        self._processes: dict[str, VllmProcess] = {}  # for "lists", and for "texts" where those are drafted
        self._closed = False
        embedding = input_embedding(export.model_dir)
        _ = export.prompter  # with the tokenizer: only vLLM's process is left to read the folder
        self._embedding = embedding.to(self._running("lists").dtype)

    def _running(self, kind: Literal["lists", "texts"]) -> VllmProcess:
        """The process for lists or for texts, started when first asked for and again when it has ended.

        Raises:
            ArtefactError: it has to start, and another export took the place of this one, before or meanwhile.
            VllmError: it does not start.
        """
        drafts = kind == "texts" and self._speculative
        place = "texts" if drafts else "lists"
        with self._lock:
            found = self._processes.get(place)
            if found is None or found.ended:
                if found is not None:
                    log.warning("vLLM's process for %s has ended; starting another", place)
                arguments = {**self._arguments, "speculative_config": NGRAM} if drafts else self._arguments
                layout = self.export.layout
                self.export.check_unchanged()
                found = VllmProcess(Start(arguments, layout.sid_start, layout.n_codes, layout.eos))
                try:
                    self.export.check_unchanged()
                except BaseException:
                    found.stop()
                    raise
                self._processes[place] = found
            return found

    @property
    def export(self) -> Export:
        """What is served."""
        return self._served[0]

    def prepare(self, export: Export) -> Callable[[], None]:
        """See `genrec.serving.engine.Engine.prepare`."""
        served = export, Trie.build(torch.from_numpy(export.codes), export.layout.n_codes)

        def swap() -> None:
            self._served = served

        return swap

    # -- lists -----------------------------------------------------------------------------------------------

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        """Best items first, at most `k`, fewer only where fewer are allowed.

        Raises:
            DataError: unknown item ids or categories, or numbers out of range.
        """
        self._check_open()
        export, trie = self._served
        searches = [self._checked(export, trie, request) for request in requests]
        scores_of = export.item_scores
        everyone = [search.history for search in searches]
        likely = None if scores_of is None else scores_of.read(everyone, apart=export.mixer is not None)

        groups: dict[int, list[int]] = {}  # beam width -> numbers of searches
        for number, search in enumerate(searches):
            groups.setdefault(search.width, []).append(number)

        results: list[list[RankedItem]] = [[] for _ in searches]
        for group in groups.values():
            of_group = None if likely is None else likely.of(group)
            ranked = self._search(export, trie, [searches[i] for i in group], of_group)
            histories, ks = [searches[i].history for i in group], [searches[i].k for i in group]
            for i, items in zip(group, ranked_items(export, ranked, histories, ks), strict=True):
                results[i] = items
        return results

    def _checked(self, export: Export, trie: Trie, request: RecommendRequest) -> _Search:
        catalogue = export.catalogue
        history = item_rows(catalogue, request.history)
        allowed = item_bitmap(
            catalogue,
            seen=history if request.exclude_seen else [],
            categories=request.categories,
            price_min=request.price_min,
            price_max=request.price_max,
            allow=request.allow,
            deny=request.deny,
        )
        prompt = recommend_prompt(export, history, self._max_positions)
        return _Search(history, prompt, allowed, beam_width(request, trie.n_items), request.k)

    def _inputs(self, export: Export, prompt: Prompt) -> Tensor:
        """What vLLM is sent of a prompt: token ids int64 [T] where the export is baked, else vectors [T, D]."""
        ids = token_ids(export, prompt)
        return export.splice(prompt, self._embedding) if ids is None else ids

    def _search(self, export: Export, trie: Trie, searches: list[_Search], likely: Likely | None) -> Ranked:
        """Searches of one beam width."""
        width, newcomers = searches[0].width, export.newcomers
        allowed = torch.from_numpy(np.stack([search.allowed for search in searches]))  # [B, N]
        searched = trie.filter(allowed if newcomers is None else newcomers.without(allowed))
        prompts = [sent(self._inputs(export, search.prompt)) for search in searches]
        prior = None if likely is None else trie.prior(likely.total)
        process = self._running("lists")
        found = vllm_beams(process, export.layout, self._embedding, trie, prompts, width, searched, prior)
        histories = [search.history for search in searches]
        return whole_lists(histories, found, likely, allowed, newcomers, export.mixer, width)

    # -- texts -----------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """Text for each request, in order; `token_ids` without the end token.

        Raises:
            DataError: unknown item ids, or numbers out of range.
        """
        self._check_open()
        export = self.export
        prompts = [text_prompt(export, request, self._max_positions) for request in requests]
        wishes = [
            Text(
                sent(self._inputs(export, prompt)),
                request.max_tokens,
                request.temperature,
                request.seed,
                request.schema if isinstance(request, JsonRequest) else None,
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        found = self._running("texts").texts(wishes)
        return [TextResult(export.tokenizer.decode(ids, skip_special_tokens=True), why, ids) for ids, why in found]

    def speculation(self) -> Speculation | None:
        """How many tokens of texts were drafted and accepted so far; None where texts are not drafted."""
        if not self._speculative:
            return None
        texts = self._processes.get("texts")  # without the lock, which is held while a process starts
        return Speculation() if texts is None else texts.speculation

    # -- both ------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this engine is closed; make a new VllmEngine")

    def close(self) -> None:
        """End vLLM's processes; calling it again does nothing."""
        with self._lock:
            self._closed = True
            for process in self._processes.values():
                process.stop()
