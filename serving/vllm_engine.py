"""Lists and texts by vLLM, in this process: see docs/vllm-engine.md for settings and limits."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from genrec.errors import ArtefactError, ConfigError
from genrec.filters import item_bitmap
from genrec.prompts import Prompt
from genrec.serving.baked_rows import token_ids
from genrec.serving.compressed_tensors_copy import method_of, obstacle
from genrec.serving.engine import JsonRequest, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.resolve import MAX_POSITIONS, beam_width, item_rows, max_positions, recommend_prompt, text_prompt
from genrec.serving.speculation import Speculation
from genrec.trie import Filter, Prior, Trie

if TYPE_CHECKING:
    from genrec.serving.vllm_background import AsyncEngine

log = logging.getLogger(__name__)
CPU_BLOCK = 32  # tokens per block of the prefix cache; vLLM's 128 would recompute up to 127 tokens per beam
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


def _prepare_environment() -> None:
    """vLLM's settings for a small CPU machine and little logging, where the user has not set them."""
    if (found := vllm_obstacle()) is not None:
        raise ConfigError(f"{found}, or take the torch engine")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; skips the check for 92 % of all memory being free
    if "OMP_NUM_THREADS" in os.environ:
        binding = "nobind"
    else:  # vLLM would leave one core to its scheduler: half of a two-core machine
        binding = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)


@dataclass(frozen=True)
class _Search:
    """A list request, checked; answered by what was served then, whatever is swapped in meanwhile."""

    export: Export
    trie: Trie
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
        if method is not None and (found := obstacle(method)) is not None:
            raise ArtefactError(f"{export.folder}: {found}")
        _prepare_environment()
        from vllm.config import StructuredOutputsConfig
        from vllm.platforms import current_platform

        from genrec.serving.trie_processor import settings
        from genrec.serving.vllm_background import BackgroundLoop

        cpu = current_platform.is_cpu()
        layout = export.layout
        self._served = export, Trie.build(torch.from_numpy(export.codes), layout.n_codes)
        self._speculative = speculative
        self._max_positions = max_positions(export, max_model_len)
        self._arguments: dict[str, Any] = {
            "model": str(export.model_dir),
            # JSON needs the tokenizer; there is one way to write it, as in `genrec.serving.json_grammar`
            "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            "dtype": dtype,
            "seed": seed,
            "max_model_len": self._max_positions,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # none of the base's sampling defaults
            "logprobs_mode": "processed_logits",
            "max_logprobs": layout.n_codes,
            "additional_config": settings(layout.sid_start, layout.n_codes),
            "enforce_eager": cpu,
            "block_size": CPU_BLOCK if cpu else None,
            "gpu_memory_utilization": gpu_memory_utilization / (2 if speculative else 1),
        }
        self._lock = threading.Lock()
        self._texts: AsyncEngine | None = None
        self._closed = False
        embedding = input_embedding(export.model_dir)
        _ = export.prompter  # with the tokenizer: only the engine for texts is left to read the folder
        self._background = BackgroundLoop()
        try:
            self._lists = self._start(self._arguments)
        except BaseException:
            self._background.stop()
            raise
        self._embedding = embedding.to(self._lists.dtype)

    def _start(self, arguments: dict[str, Any]) -> AsyncEngine:
        """An engine on the export's model.

        Raises:
            ArtefactError: another export took its place, before or meanwhile.
        """
        from genrec.serving.vllm_background import AsyncEngine

        self.export.check_unchanged()
        engine = AsyncEngine(arguments, self._background)
        try:
            self.export.check_unchanged()
        except BaseException:
            engine.stop()
            raise
        return engine

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
        likely = None if scores_of is None else scores_of([search.history for search in searches])  # [B, N]

        async def gather() -> list[list[RankedItem]]:
            rows = [None] * len(searches) if likely is None else likely.split(1)
            return await asyncio.gather(*map(self._search, searches, rows))

        return self._background.run(gather()) if searches else []

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
        return _Search(
            export=export,
            trie=trie,
            history=history,
            prompt=recommend_prompt(export, history, self._max_positions),
            allowed=allowed,
            width=beam_width(request, trie.n_items),
            k=request.k,
        )

    def _inputs(self, export: Export, prompt: Prompt) -> Tensor:
        """What vLLM is sent of a prompt: token ids int64 [T] where the export is baked, else vectors [T, D]."""
        ids = token_ids(export, prompt)
        return export.splice(prompt, self._embedding) if ids is None else ids

    async def _search(self, search: _Search, likely: Tensor | None) -> list[RankedItem]:
        """Beam search as in `genrec.decode.beam_search`, by requests of one token; what is likely: float32 [1, N]."""
        if not search.allowed.any():
            return []
        newcomers = search.export.newcomers
        allowed = torch.from_numpy(search.allowed)[None]  # [1, N]
        items, scores = await self._beams(search, allowed if newcomers is None else newcomers.without(allowed), likely)
        if newcomers is not None:
            joined = newcomers.join(items[None], scores[None], likely, allowed, search.width)
            listed = joined[0][0] >= 0
            items, scores = joined[0][0, listed], joined[1][0, listed]
        ids = search.export.catalogue.item_ids
        best = zip(items[: search.k].tolist(), scores.tolist(), strict=False)
        return [RankedItem(ids[row], score, rank) for rank, (row, score) in enumerate(best, start=1)]

    async def _beams(self, search: _Search, allowed_items: Tensor, likely: Tensor | None) -> tuple[Tensor, Tensor]:
        """Items int64 [W] and scores float32 [W] of a search among bool [1, N], best first; none: [-1] and [-inf]."""
        if not allowed_items.any():
            return torch.tensor([-1]), torch.tensor([-torch.inf])
        trie, layout = search.trie, search.export.layout
        allowed = trie.filter(allowed_items)
        prior = None if likely is None else trie.prior(likely)
        prompt = self._inputs(search.export, search.prompt)
        state = torch.full((1, 1), trie.root)  # [1, W]
        suffix = prompt[None, :0]  # [W, level] or [W, level, D]
        scores = np.zeros(1)  # [W]
        for level in range(trie.n_levels):
            logp = await self._level(trie, prompt, suffix, state, level, allowed, prior, search.width)  # [W, C]
            total = (scores[:, None] + logp).ravel()
            width = min(search.width, int(np.isfinite(total).sum()))
            best = np.argpartition(-total, width - 1)[:width]
            best = best[np.argsort(-total[best], kind="stable")]
            parent, code = np.divmod(best, trie.n_codes)
            scores = total[best]
            state = trie.step(state[:, parent], torch.from_numpy(code)[None], level)
            tokens = torch.from_numpy(layout.sid_start + level * layout.n_codes + code)  # [W]
            chosen = tokens if prompt.ndim == 1 else self._embedding[tokens]
            suffix = torch.cat([suffix[parent], chosen[:, None]], 1)
        return trie.item(state)[0], torch.from_numpy(scores).float()

    async def _level(
        self,
        trie: Trie,
        prompt: Tensor,
        suffix: Tensor,
        state: Tensor,
        level: int,
        allowed: Filter,
        prior: Prior | None,
        width: int,
    ) -> np.ndarray:
        """Log-probabilities float64 [W, C] of a level's codes after each beam, -inf where illegal."""
        from vllm import SamplingParams

        from genrec.serving.trie_processor import level_request

        layout = self.export.layout
        first = layout.sid_start + level * layout.n_codes
        options = trie.options(state, level, allowed, prior)
        known, legal = options.known[0].numpy(), options.legal[0].numpy()  # [W, C]
        weights = np.zeros(known.shape) if options.weights is None else options.weights[0].numpy()
        logp = np.where(legal, 0.0, -np.inf)  # where one code leads on, its share is all
        asked = np.flatnonzero((known.sum(1) > 1) & legal.any(1))
        outputs = await asyncio.gather(
            *(
                self._lists.complete(
                    torch.cat([prompt, codes]),
                    SamplingParams(
                        max_tokens=1,
                        temperature=0.0,
                        logprobs=min(width, layout.n_codes),
                        flat_logprobs=True,
                        detokenize=False,
                        skip_clone=True,
                        extra_args=level_request(first, *scores),
                    ),
                )
                for codes, *scores in zip(suffix[asked], known[asked], legal[asked], weights[asked], strict=True)
            )
        )
        logp[asked] = -np.inf
        for beam, output in zip(asked, outputs, strict=True):
            found: Any = output.outputs[0].logprobs  # the best tokens and their scores, -inf behind the last legal one
            values = np.array(found.logprobs)
            finite = np.isfinite(values)
            logp[beam, np.array(found.token_ids)[finite] - first] = values[finite]
        return logp

    # -- texts -----------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """Text for each request, in order; `token_ids` without the end token.

        Raises:
            DataError: unknown item ids, or numbers out of range.
        """
        self._check_open()
        export = self.export
        prompts = [text_prompt(export, request, self._max_positions) for request in requests]
        return self._write(self._text_engine(), requests, [self._inputs(export, prompt) for prompt in prompts])

    def speculation(self) -> Speculation | None:
        """How many tokens of texts were drafted and accepted so far; None where texts are not drafted."""
        if not self._speculative:
            return None
        texts = self._texts  # without the lock, which is held for half a minute while the engine starts
        return Speculation() if texts is None else texts.counts()

    def _write(
        self, engine: AsyncEngine, requests: Sequence[TextRequest | JsonRequest], prompts: Sequence[Tensor]
    ) -> list[TextResult]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        layout, tokenizer = self.export.layout, self.export.tokenizer
        text_tokens = None if engine.has_processor else list(range(layout.sid_start))
        outputs = engine.complete_all(
            (
                prompt,
                SamplingParams(
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    seed=request.seed,
                    stop_token_ids=[layout.eos],
                    allowed_token_ids=text_tokens,
                    structured_outputs=(
                        StructuredOutputsParams(json=request.schema) if isinstance(request, JsonRequest) else None
                    ),
                    detokenize=False,
                    skip_clone=True,
                ),
            )
            for request, prompt in zip(requests, prompts, strict=True)
        )
        results = []
        for output in outputs:
            answer = output.outputs[0]
            ids = [token for token in answer.token_ids if token != layout.eos]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            results.append(TextResult(text, answer.finish_reason or "stop", ids))
        return results

    def _text_engine(self) -> AsyncEngine:
        if not self._speculative:
            return self._lists
        with self._lock:
            if self._texts is None:
                log.info("starting the engine for texts")
                self._texts = self._start({**self._arguments, "speculative_config": NGRAM})
            return self._texts

    # -- both ------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this engine is closed; make a new VllmEngine")

    def close(self) -> None:
        """End vLLM's processes and the thread; calling it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for engine in (self._lists, self._texts):
                if engine is not None:
                    engine.stop()
            self._background.stop()
