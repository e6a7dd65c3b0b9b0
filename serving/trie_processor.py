"""vLLM's side of constrained decoding: a logits processor that scores codes and keeps them out of text.

A request that carries `level_request` in its ``SamplingParams.extra_args`` gets, in place of its logits, the
log-softmax over the codes that lead on in the trie, prior included, written at those that its filter leaves, and -inf
at every other token. With vLLM's ``logprobs_mode="processed_logits"`` these come back as they are, so a beam's score is
that of `genrec.decode` and no legal code is lost to an illegal one. Every other request writes text: the tokens that
genrec added and a base's padding rows behind them are never chosen.

vLLM 0.32 has two model runners with two interfaces: V1 (`TrieProcessor`, on CPUs) and V2 (`TrieProcessorV2`,
where Triton works: GPUs). Both write by the same function. **V2 has not been run inside vLLM**, for want of a
GPU: it is tested with made-up batches only, and its interface was read from the source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

SETTINGS = "genrec"  # VllmConfig.additional_config[SETTINGS]: what `settings` returns
FIRST, CODES, WEIGHTS = "genrec_first", "genrec_codes", "genrec_weights"


def settings(text_vocab: int, n_codes: int) -> dict[str, dict[str, int]]:
    """What an engine that loads these processors needs as its ``additional_config``.

    Args:
        text_vocab: tokens below this one are text.
        n_codes: codes per level, C.
    """
    return {SETTINGS: {"text_vocab": text_vocab, "n_codes": n_codes}}


def level_request(first: int, known: np.ndarray, legal: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """A one-token request's ``extra_args``.

    Args:
        first: the token of the level's code 0.
        known: bool [C], the codes that lead on in the trie: scores are relative to them.
        legal: bool [C], those of them that the request's filter leaves.
        weights: float32 [C], the prior of each code (see `genrec.trie.Trie.weigh`).
    """
    return {
        FIRST: first,
        CODES: np.packbits([known, legal], axis=1).tobytes(),
        WEIGHTS: weights.astype(np.float32).tobytes(),
    }


def _unpack(params: SamplingParams, n_codes: int) -> tuple[int, np.ndarray, np.ndarray] | None:
    """What `level_request` packed: first token, known and legal codes bool [2, C], weights [C]; None for text."""
    arguments = params.extra_args or {}
    if FIRST not in arguments:
        return None
    bits = np.frombuffer(arguments[CODES], np.uint8).reshape(2, -1)
    weights = np.frombuffer(arguments[WEIGHTS], np.float32)
    return arguments[FIRST], np.unpackbits(bits, axis=1, count=n_codes).astype(bool), weights


def write_scores(logits: Tensor, first: Tensor, codes: Tensor, weights: Tensor, text_vocab: int) -> Tensor:
    """Put scores of codes, or the ban on codes, into a batch's logits.

    Example, ``text_vocab = 2``, C = 3 and the logits ``[5, 5, 0, 0, 0, 1, 1, 9]``: with ``first = 5``, codes 0 and 1
    known, code 0 legal and no weights they become ``[-inf, -inf, -inf, -inf, -inf, -0.69, -inf, -inf]``, with
    ``first = -1`` (text) ``[5, 5, -inf, -inf, -inf, -inf, -inf, -inf]``.

    Args:
        logits: float32 [R, V], changed in place.
        first: int64 [R], the token of the level's code 0, or -1 where the row writes text.
        codes: bool [R, 2, C], known and legal (see `level_request`); ignored where the row writes text.
        weights: float32 [R, C], added to the codes' logits.
        text_vocab: tokens below this one are text.
    """
    known, legal = codes.unbind(1)  # [R, C] each
    ranks = first >= 0  # [R]
    columns = torch.where(ranks, first, text_vocab)[:, None] + torch.arange(known.shape[1], device=logits.device)
    scores = logits.gather(1, columns) + weights  # [R, C]
    scores = scores.masked_fill(~known, -torch.inf).log_softmax(-1)  # nan where text
    scores.masked_fill_(~(legal & ranks[:, None]), -torch.inf)
    logits[:, text_vocab:] = -torch.inf
    logits.masked_fill_(ranks[:, None], -torch.inf)
    return logits.scatter_(1, columns, scores)


class TrieProcessor(V1Processor):
    """For model runner V1; a request is a row of the batch."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        own = vllm_config.additional_config[SETTINGS]  # type: ignore[index]
        self.text_vocab, self.n_codes = own["text_vocab"], own["n_codes"]
        self.device = device
        self.asked: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that come, go and change rows."""
        process_dict_updates(self.asked, batch_update, lambda params, _prompt, _output: _unpack(params, self.n_codes))

    def apply(self, logits: Tensor) -> Tensor:
        """logits float32 [rows, V], changed in place."""
        first = np.full(len(logits), -1, np.int64)
        codes = np.zeros((len(logits), 2, self.n_codes), bool)
        weights = np.zeros((len(logits), self.n_codes), np.float32)
        for row, asked in self.asked.items():
            first[row], codes[row], weights[row] = asked
        return write_scores(
            logits,
            torch.from_numpy(first).to(self.device),
            torch.from_numpy(codes).to(self.device),
            torch.from_numpy(weights).to(self.device),
            self.text_vocab,
        )


class TrieProcessorV2(V2Processor):
    """For model runner V2; a request is a slot, and a batch names the slot of each of its rows."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        own = vllm_config.additional_config[SETTINGS]  # type: ignore[index]
        self.text_vocab, self.n_codes = own["text_vocab"], own["n_codes"]
        self.first = torch.full((req_states.max_num_reqs,), -1, dtype=torch.int64)
        self.codes = torch.zeros(req_states.max_num_reqs, 2, self.n_codes, dtype=torch.bool)
        self.weights = torch.zeros(req_states.max_num_reqs, self.n_codes)
        here = (self.first, self.codes, self.weights)
        self.on_device = tuple(slots.to(req_states.device) for slots in here)
        self.changed = False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Fill the slot; text needs the processor as well, so every request does."""
        asked = _unpack(sampling_params, self.n_codes)
        self.first[req_idx] = -1 if asked is None else asked[0]
        if asked is not None:
            self.codes[req_idx] = torch.from_numpy(asked[1])
            self.weights[req_idx] = torch.tensor(asked[2])
        self.changed = True
        return True

    def apply_staged_writes(self) -> None:
        """Send the slots to the device, once per step with new requests."""
        if self.changed:
            for there, here in zip(self.on_device, (self.first, self.codes, self.weights), strict=True):
                there.copy_(here)
            self.changed = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """logits float32 [rows, V], changed in place."""
        first, codes, weights = self.on_device
        slots = ctx.expanded_idx_mapping.long()  # [rows]
        return write_scores(logits, first[slots], codes[slots], weights[slots], self.text_vocab)
