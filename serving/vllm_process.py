"""The other end of `genrec.serving.vllm_core`: starts vLLM's process, asks it, and notices when it has ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genrec.serving.speculation import Speculation

log = logging.getLogger(__name__)
STOP_TIMEOUT_S = 30
SERVED = "genrec.serving.vllm_core"


@dataclass(frozen=True)
class Start:
    """What an engine is made of."""

    arguments: Mapping[str, Any]  # of vLLM's EngineArgs; what only this process can know is added here
    text_vocab: int  # tokens below this one are text
    n_codes: int  # per level, C
    eos: int


@dataclass(frozen=True)
class Codes:
    """One level of a beam search: R beams of B prompts."""

    prompts: list[np.ndarray]  # vectors float32 [T, D], or token ids int64 [T]
    rows: np.ndarray  # int64 [R], each beam's prompt
    suffixes: np.ndarray  # what each beam wrote: float32 [R, level, D] or int64 [R, level]
    first: int  # the token of the level's code 0
    known: np.ndarray  # bool [R, C], the codes that lead on in the trie
    legal: np.ndarray  # bool [R, C], those of them that the filter leaves
    weights: np.ndarray  # float32 [R, C], the prior
    best: int  # answers per beam, at most C


@dataclass(frozen=True)
class Text:
    """A prompt to continue."""

    prompt: np.ndarray  # vectors float32 [T, D], or token ids int64 [T]
    max_tokens: int
    temperature: float
    seed: int | None
    schema: str | None  # of JSON


class VllmError(RuntimeError):
    """vLLM did not start, refused a request, or its process ended."""


def _environment() -> tuple[dict[str, str], int]:
    """Of vLLM's process: its settings for a small CPU machine, where the user has not set them; and its threads."""
    environment = dict(os.environ)
    threads = int(environment.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    settings = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; skips the check for 92 % of all memory being free
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),  # of n-gram drafts: it would set the threads of everything else as well
    }
    return {**settings, **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, threads


class VllmProcess:
    """vLLM in a process of its own. Safe to call from several threads, which wait for each other."""

    def __init__(self, start: Start):
        """
        Args:
            start: what to start.

        Raises:
            VllmError: it did not start; its reasons are in the log.
        """
        self._lock = threading.Lock()
        self.speculation = Speculation()
        # from a helper that has imported vLLM once: that is most of what a start takes
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([SERVED])
        environment, threads = _environment()
        self._pipe, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, start, environment, threads), name="genrec-vllm", daemon=True
        )
        self.process.start()
        other.close()  # else its end would go unnoticed here
        self.ended = False
        try:
            self.dtype: torch.dtype = getattr(torch, self._answer())
        except BaseException:
            self.stop()
            raise

    def codes(self, asked: Codes) -> tuple[np.ndarray, np.ndarray]:
        """See `genrec.serving.vllm_core.VllmCore.codes`."""
        tokens, scores = self._call("codes", asked)
        return tokens, scores

    def texts(self, asked: list[Text]) -> list[tuple[list[int], str]]:
        """See `genrec.serving.vllm_core.VllmCore.texts`; the counts are kept in `speculation`."""
        texts, self.speculation = self._call("texts", asked)
        return texts

    def _call(self, name: str, asked: Any) -> Any:
        with self._lock:
            try:
                self._pipe.send((name, asked))
            except OSError as error:
                raise self._gone() from error
            return self._answer()

    def _answer(self) -> Any:
        try:
            result, wrong = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        except BaseException:  # interrupted: what comes now must not answer a later call
            self.ended = True
            self.process.kill()
            raise
        if wrong is not None:
            raise VllmError(f"vLLM: {wrong}")
        return result

    def _gone(self) -> VllmError:
        self.ended = True
        self.process.join(STOP_TIMEOUT_S)
        return VllmError(f"vLLM's process ended (exit code {self.process.exitcode}); its last words are in the log")

    def stop(self) -> None:
        """End the process and wait for it; calling it again does nothing."""
        with self._lock:
            self.ended = True
            self._pipe.close()
            self.process.join(STOP_TIMEOUT_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


def _serve(*given: Any) -> None:
    """`genrec.serving.vllm_core.serve`; the one import of vLLM happens in its process."""
    from genrec.serving.vllm_core import serve

    serve(*given)
