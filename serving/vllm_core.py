"""The process that vLLM runs in: its engine core and its worker in one, answering one call at a time.

By default vLLM keeps the two in processes of their own, below the one that asks: a level's beams then trickle in one by
one, the first of them is computed alone, and the core spins on a CPU that the products need
([design/014](../docs/design/014-vllm-in-one-process.md)). Only `genrec.serving.vllm_process` starts this one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import embeds_input, tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerBase

from genrec.serving.speculation import Speculation
from genrec.serving.trie_processor import level_request, settings
from genrec.serving.vllm_process import Codes, Start, Text

log = logging.getLogger(__name__)
PROCESSORS = "genrec.serving.trie_processor:TrieProcessor", "genrec.serving.trie_processor:TrieProcessorV2"
CPU_BLOCK = 32  # tokens per block of the prefix cache; vLLM's 128 would recompute up to 127 tokens per beam


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


class VllmCore:
    """One vLLM engine.

    The trie's logits processor is loaded wherever vLLM takes one: not beside drafts on model runner V1, where a list of
    allowed tokens keeps codes out of texts.
    """

    def __init__(self, start: Start):
        self._start, self._speculation, self._count = start, Speculation(), 0
        cpu = current_platform.is_cpu()
        if cpu:  # eager; it still compiles one sampler function: most of a minute on a small machine
            torch.compiler.set_stance("force_eager")
        arguments = EngineArgs(
            **start.arguments,
            # JSON needs the tokenizer; there is one way to write it, as in `genrec.serving.json_grammar`
            structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            additional_config=settings(start.text_vocab, start.n_codes),
            enforce_eager=cpu,
            block_size=CPU_BLOCK if cpu else None,
        )
        # limits for throughput, as LLM has them: a server's 128 sequences at once would cut a level's beams in two
        config = arguments.create_engine_config(UsageContext.LLM_CLASS)
        v2 = config.use_v2_model_runner
        self._has_processor = v2 or config.speculative_config is None
        config.model_config.logits_processors = [PROCESSORS[v2]] if self._has_processor else None
        assert isinstance(config.model_config.dtype, torch.dtype)  # resolved by now
        self.dtype = config.model_config.dtype
        self._llm = LLMEngine(
            config,
            Executor.get_class(config),
            log_stats=config.speculative_config is not None,  # where drafts are counted
            stat_loggers=[lambda *_: _Counter(self._speculation)],
        )

    def codes(self, asked: Codes) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [R, n] and scores float32 [R, n] of the best codes after each beam: log-probabilities, -inf
        behind the last legal one."""
        prompts = [torch.from_numpy(prompt) for prompt in asked.prompts]
        suffixes = torch.from_numpy(asked.suffixes)
        outputs = self._complete(
            [
                (
                    torch.cat([prompts[row], suffix]),
                    SamplingParams(
                        max_tokens=1,
                        temperature=0.0,
                        logprobs=asked.best,
                        flat_logprobs=True,
                        detokenize=False,
                        skip_clone=True,
                        extra_args=level_request(asked.first, *scores),
                    ),
                )
                for row, suffix, *scores in zip(
                    asked.rows.tolist(), suffixes, asked.known, asked.legal, asked.weights, strict=True
                )
            ]
        )
        found: list[Any] = [output.logprobs for output in outputs]
        return (
            np.array([of.token_ids for of in found], np.int64),
            np.array([of.logprobs for of in found], np.float32),
        )

    def texts(self, asked: Sequence[Text]) -> tuple[list[tuple[list[int], str]], Speculation]:
        """For each text its tokens without the end token and why it ended; and the counts of drafts so far."""
        start = self._start
        outputs = self._complete(
            [
                (
                    torch.from_numpy(text.prompt),
                    SamplingParams(
                        max_tokens=text.max_tokens,
                        temperature=text.temperature,
                        seed=text.seed,
                        stop_token_ids=[start.eos],
                        allowed_token_ids=None if self._has_processor else list(range(start.text_vocab)),
                        structured_outputs=None if text.schema is None else StructuredOutputsParams(json=text.schema),
                        detokenize=False,
                        skip_clone=True,
                    ),
                )
                for text in asked
            ]
        )
        texts = [
            ([token for token in of.token_ids if token != start.eos], of.finish_reason or "stop") for of in outputs
        ]
        return texts, dataclasses.replace(self._speculation)

    def _complete(self, prompts: Sequence[tuple[Tensor, SamplingParams]]) -> list[CompletionOutput]:
        """All answers, in order; on an error none of the requests stays behind."""
        added: list[str] = []
        answers: dict[str, CompletionOutput] = {}
        try:
            for prompt, params in prompts:
                params.output_kind = RequestOutputKind.FINAL_ONLY
                self._count += 1
                added.append(str(self._count))
                ids = prompt.ndim == 1
                given = tokens_input(prompt.tolist()) if ids else embeds_input(prompt.to(self.dtype))
                self._llm.add_request(added[-1], given, params)
            while self._llm.has_unfinished_requests():
                for output in self._llm.step():
                    assert isinstance(output, RequestOutput)
                    answers[output.request_id] = output.outputs[0]
        except BaseException:
            self._llm.abort_request(added)
            raise
        return [answers[name] for name in added]


def serve(pipe: Connection, start: Start, environment: Mapping[str, str], threads: int) -> None:
    """Answer calls until the other end closes.

    The first message says what became of the start: the engine's dtype. Each call is a method's name and its argument;
    an answer is ``(result, None)`` or ``(None, what went wrong)``.

    Args:
        pipe: this end.
        start: what to start.
        environment: the other process's, as it is now; this one may come from a helper that is older.
        threads: for products; vLLM's attention needs the number to stay what it was at the start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        core = VllmCore(start)
    except BaseException as error:
        log.exception("vLLM did not start")
        pipe.send((None, described(error)))
        return
    pipe.send((str(core.dtype).removeprefix("torch."), None))
    while True:
        try:
            name, asked = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = getattr(core, name)(asked), None
        except Exception as error:
            log.exception("vLLM: %s", name)
            answer = None, described(error)
        pipe.send(answer)


def described(error: BaseException) -> str:
    """One line; vLLM's own classes stay on this side, as reading one would import vLLM."""
    return f"{type(error).__name__}: {error}"
