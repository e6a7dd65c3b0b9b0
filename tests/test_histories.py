"""Faded sums, beside the sum that their definition asks for."""

import pytest
import torch

from genrec.adapters.histories import BLOCK, faded_sums


@pytest.mark.parametrize("lengths", [[BLOCK], [BLOCK + 1, 3, 2 * BLOCK + 5, 1]], ids=str)
def test_faded_sums_are_those_of_every_earlier_event(lengths):
    draw = torch.Generator().manual_seed(len(lengths))
    rows = torch.randn(sum(lengths), 4, generator=draw, dtype=torch.float64).requires_grad_()
    decay = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    first = torch.repeat_interleave(torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths))
    expected = []
    for event, start in enumerate(first.tolist()):
        earlier = [decay ** (event - 1 - other) * rows[other] for other in range(start, event)]
        expected.append(sum(earlier, torch.zeros(4, dtype=torch.float64)))
    weights = torch.randn(len(rows), 4, generator=draw, dtype=torch.float64)
    oracle = torch.autograd.grad((torch.stack(expected) * weights).sum(), (rows, decay), allow_unused=True)
    found = faded_sums(rows, first, decay)
    torch.testing.assert_close(found, torch.stack(expected))
    for one, other in zip(torch.autograd.grad((found * weights).sum(), (rows, decay)), oracle, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)
