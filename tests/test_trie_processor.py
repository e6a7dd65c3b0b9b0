"""The logits processors of both model runners, without an engine."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
pytestmark = pytest.mark.vllm

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

from genrec.serving.trie_processor import (  # noqa: E402
    TrieProcessor,
    TrieProcessorV2,
    level_request,
    settings,
    write_scores,
)
from tests.oracles import codes_after, trie_log_softmax  # noqa: E402

TEXT, CODES, VOCAB = 7, 10, 31  # text, two levels of ten codes, four rows of padding
IDS = np.stack(np.divmod(np.random.default_rng(5).choice(CODES**2, 25, replace=False), CODES), 1)  # [N, L]
CPU = torch.device("cpu")
CONFIG: Any = SimpleNamespace(additional_config=settings(TEXT, CODES))


@dataclass(frozen=True)
class Asked:
    """The codes of one level after the prefix of an item's id, some of them filtered out."""

    item: int
    level: int
    legal: list[int]

    @property
    def first(self) -> int:
        return TEXT + self.level * CODES


def after(item: int, level: int) -> list[int]:
    return codes_after(IDS, IDS[item, :level].tolist())


def params(asked: Asked | None) -> SamplingParams:
    if asked is None:
        return SamplingParams()
    known = np.isin(np.arange(CODES), after(asked.item, asked.level))
    legal = np.isin(np.arange(CODES), asked.legal)
    return SamplingParams(extra_args=level_request(asked.first, known, legal, weights_of(asked)))


def weights_of(asked: Asked) -> np.ndarray:
    return np.random.default_rng([asked.item, asked.level]).normal(size=CODES).astype(np.float32)


def expected(logits: torch.Tensor, asked: Asked | None) -> torch.Tensor:
    """One row, code by code."""
    out = torch.full_like(logits, -torch.inf)
    if asked is None:
        out[:TEXT] = logits[:TEXT]
        return out
    level = (logits[asked.first : asked.first + CODES] + torch.from_numpy(weights_of(asked))).expand(len(IDS), -1)
    scores = trie_log_softmax(level, IDS, asked.level)[asked.item]
    for code in asked.legal:
        out[asked.first + code] = scores[code]
    return out


def test_the_example_of_the_docstring():
    logits = torch.tensor([[5.0, 5, 0, 0, 0, 1, 1, 9]]).repeat(2, 1)
    codes = torch.tensor([[[True, True, False], [True, False, False]]] * 2)
    out = write_scores(logits, torch.tensor([5, -1]), codes, torch.zeros(2, 3), 2)
    inf = torch.inf
    wanted = [[-inf] * 5 + [-np.log(2), -inf, -inf], [5, 5] + [-inf] * 6]
    torch.testing.assert_close(out, torch.tensor(wanted, dtype=torch.float32))


def test_a_filter_changes_no_score_and_all_codes_sum_to_one():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    item, level = max(((i, 1) for i in range(len(IDS))), key=lambda at: len(after(*at)))
    codes = after(item, level)
    assert 2 < len(codes) < CODES
    rows = []
    for legal in (codes, codes[1:2]):
        processor = TrieProcessor(CONFIG, CPU, False)
        asked = Asked(item, level, legal)
        processor.update_state(BatchUpdate(1, [], [(0, params(asked), [], [])], []))
        rows.append(processor.apply(logits.clone())[0, asked.first : asked.first + CODES])
    whole, filtered = rows
    assert whole.exp().sum() == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(filtered).nonzero().flatten().tolist() == codes[1:2]
    assert filtered[codes[1]] == whole[codes[1]] < 0


def test_both_processors_follow_requests_that_come_go_and_move():
    rng = np.random.default_rng(0)
    v1 = TrieProcessor(CONFIG, CPU, False)
    assert not v1.is_argmax_invariant()
    states: Any = SimpleNamespace(device=CPU, max_num_reqs=8)
    v2 = TrieProcessorV2(CONFIG, states)
    asked = [
        None,
        Asked(3, 0, after(3, 0)[::2]),
        Asked(8, 1, after(8, 1)),
        None,
        Asked(0, 1, IDS[0, 1:].tolist()),
    ]

    def check(order: list[int]) -> None:
        """`order[row]` is the request in the row; in V2 request r has slot 7 - r."""
        logits = torch.from_numpy(rng.normal(size=(len(order), VOCAB))).float()
        wanted = torch.stack([expected(logits[row], asked[r]) for row, r in enumerate(order)])
        torch.testing.assert_close(v1.apply(logits.clone()), wanted)
        context: Any = SimpleNamespace(expanded_idx_mapping=torch.tensor([7 - r for r in order], dtype=torch.int32))
        torch.testing.assert_close(v2.apply(logits.clone(), context), wanted)

    def added(row: int, r: int) -> tuple[int, SamplingParams, list[int], list[int]]:
        v2.add_request(7 - r, params(asked[r]))
        return row, params(asked[r]), [], []

    v1.update_state(BatchUpdate(4, [], [added(r, r) for r in range(4)], []))
    v2.apply_staged_writes()
    check([0, 1, 2, 3])
    v1.update_state(None)
    check([0, 1, 2, 3])
    # request 0 leaves, 3 takes its row; then 1 and 2 change places; then 4 comes
    v1.update_state(BatchUpdate(3, [0], [], [(3, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    check([3, 1, 2])
    v1.update_state(BatchUpdate(4, [], [added(3, 4)], [(1, 2, MoveDirectionality.SWAP)]))
    v2.apply_staged_writes()
    check([3, 2, 1, 4])
    # a slot and a row whose last request ranked items now write text
    asked[1] = None
    v1.update_state(BatchUpdate(4, [], [added(2, 1)], []))
    v2.apply_staged_writes()
    check([3, 2, 1, 4])
