"""The logits processors of both model runners, without an engine."""

from __future__ import annotations

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

TEXT, CODES, VOCAB = (
    7,
    10,
    31,
)  # three levels of ten codes would end at 37: here one level and a half, and padding
CPU = torch.device("cpu")
CONFIG: Any = SimpleNamespace(additional_config=settings(TEXT, CODES))


def params(first: int | None, legal: np.ndarray | None = None) -> SamplingParams:
    return SamplingParams(extra_args=None if first is None or legal is None else level_request(first, legal))


def expected(logits: torch.Tensor, first: int | None, legal: np.ndarray | None) -> torch.Tensor:
    """One row, code by code."""
    out = torch.full_like(logits, -torch.inf)
    if first is None or legal is None:
        out[:TEXT] = logits[:TEXT]
        return out
    total = torch.logsumexp(logits[first : first + CODES], 0)
    for code in np.flatnonzero(legal):
        out[first + code] = logits[first + code] - total
    return out


def test_the_example_of_the_docstring():
    logits = torch.tensor([[5.0, 5, 0, 0, 1, 1]]).repeat(2, 1)
    out = write_scores(logits, torch.tensor([4, -1]), torch.tensor([[True, False]] * 2), 2)
    inf = torch.inf
    torch.testing.assert_close(
        out, torch.tensor([[-inf] * 4 + [-np.log(2), -inf], [5, 5] + [-inf] * 4], dtype=torch.float32)
    )


def test_both_processors_follow_requests_that_come_go_and_move():
    rng = np.random.default_rng(0)
    v1 = TrieProcessor(CONFIG, CPU, False)
    assert not v1.is_argmax_invariant()
    states: Any = SimpleNamespace(device=CPU, max_num_reqs=8)
    v2 = TrieProcessorV2(CONFIG, states)
    asked = [
        (None, None),
        (7, rng.random(CODES) < 0.5),
        (17, rng.random(CODES) < 0.5),
        (None, None),
        (7, None),
    ]
    asked[4] = (17, np.eye(CODES, dtype=bool)[3])

    def check(order: list[int]) -> None:
        """`order[row]` is the request in the row; in V2 request r has slot 7 - r."""
        logits = torch.from_numpy(rng.normal(size=(len(order), VOCAB))).float()
        wanted = torch.stack([expected(logits[row], *asked[r]) for row, r in enumerate(order)])
        torch.testing.assert_close(v1.apply(logits.clone()), wanted)
        context: Any = SimpleNamespace(expanded_idx_mapping=torch.tensor([7 - r for r in order], dtype=torch.int32))
        torch.testing.assert_close(v2.apply(logits.clone(), context), wanted)

    def added(row: int, r: int) -> tuple[int, SamplingParams, list[int], list[int]]:
        v2.add_request(7 - r, params(*asked[r]))
        return row, params(*asked[r]), [], []

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
    asked[1] = (None, None)
    v1.update_state(BatchUpdate(4, [], [added(2, 1)], []))
    v2.apply_staged_writes()
    check([3, 2, 1, 4])
