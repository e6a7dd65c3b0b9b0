"""vLLM's asynchronous engine for one export, with an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import embeds_input, tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from genrec.serving.speculation import Speculation

T = TypeVar("T")
NO_DYNAMO = "TORCHDYNAMO_DISABLE"
STOP_TIMEOUT_S = 30  # vLLM's 5 s kill a slow machine's workers before they have cleaned up
PROCESSORS = "genrec.serving.trie_processor:TrieProcessor", "genrec.serving.trie_processor:TrieProcessorV2"


class BackgroundLoop:
    """An event loop that runs coroutines for threads that have none."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="genrec-vllm", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine's result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def stop(self) -> None:
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class _Counter(StatLoggerBase):
    def __init__(self, into: Speculation):
        self.into = into

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        stats = scheduler_stats and scheduler_stats.spec_decoding_stats
        if stats:
            self.into.drafts += stats.num_drafts
            self.into.draft_tokens += stats.num_draft_tokens
            self.into.accepted_tokens += stats.num_accepted_tokens

    def log_engine_initialized(self) -> None:
        pass


@contextlib.contextmanager
def without_dynamo(eager: bool) -> Iterator[None]:
    """Start worker processes that compile nothing at all, if nothing is to be compiled.

    An eager vLLM still compiles one sampler function when log-probabilities are first asked for: on a small
    CPU that stops the first list for most of a minute.
    """
    if not eager or NO_DYNAMO in os.environ:
        yield
        return
    os.environ[NO_DYNAMO] = "1"
    try:
        yield
    finally:
        del os.environ[NO_DYNAMO]


class AsyncEngine:
    """One vLLM engine: its processes, and requests of prompt vectors or token ids.

    The trie's logits processor is loaded wherever vLLM takes one: not beside speculative decoding on model
    runner V1 (`has_processor` says so).
    """

    def __init__(self, arguments: dict[str, Any], background: BackgroundLoop):
        """
        Args:
            arguments: of vLLM's AsyncEngineArgs, untouched.
            background: the loop that the engine lives on.
        """
        self.speculation = Speculation()
        self._background = background
        self._count = 0
        self._llm: AsyncLLM | None = background.run(self._start(AsyncEngineArgs(**arguments)))

    async def _start(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        # limits for throughput, as LLM has them: a server's 128 sequences at once would cut a level's beams in two
        config: VllmConfig = arguments.create_engine_config(UsageContext.LLM_CLASS)
        v2 = config.use_v2_model_runner
        self.has_processor = v2 or config.speculative_config is None
        config.model_config.logits_processors = [PROCESSORS[v2]] if self.has_processor else None
        self.dtype = config.model_config.dtype
        assert isinstance(self.dtype, torch.dtype)  # resolved by now
        before = multiprocessing.active_children()
        with without_dynamo(bool(config.model_config.enforce_eager)):
            llm = AsyncLLM.from_vllm_config(
                config, disable_log_stats=True, stat_loggers=[lambda *_: _Counter(self.speculation)]
            )
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        return llm

    async def complete(self, prompt: Tensor, params: SamplingParams) -> RequestOutput:
        """The whole answer to a prompt: vectors [T, D] in the engine's dtype, or token ids int64 [T]."""
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._count += 1
        assert self._llm is not None
        given = tokens_input(prompt.tolist()) if prompt.ndim == 1 else embeds_input(prompt)
        outputs = self._llm.generate(given, params, request_id=str(self._count))
        return await anext(outputs)  # the only one: params ask for the final output

    def complete_all(self, prompts: Iterable[tuple[Tensor, SamplingParams]]) -> list[RequestOutput]:
        """`complete` for many prompts at once, in order."""

        async def gather() -> list[RequestOutput]:
            return await asyncio.gather(*(self.complete(*prompt) for prompt in prompts))

        return self._background.run(gather())

    def counts(self) -> Speculation:
        """A copy of the counts so far."""
        return dataclasses.replace(self.speculation)

    def stop(self) -> None:
        """End the engine's processes and wait for them."""

        async def shut_down() -> None:
            assert self._llm is not None
            self._llm.shutdown(timeout=STOP_TIMEOUT_S)
            await asyncio.sleep(0)  # let the output handler end

        self._background.run(shut_down())
        self._llm = None
        for process in self._processes:  # killed or not: none stays behind, not even as a zombie
            process.join(STOP_TIMEOUT_S)
