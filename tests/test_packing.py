"""Packing: nothing lost, nothing too long, little padding, and the collator's fillers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec.errors import DataError
from genrec.prompts import Layout, Prompt
from genrec.training.packing import PackedCollator, blank_row, pack, packed_rows

LAYOUT = Layout(base_vocab=50, levels=2, n_codes=4, soft_tokens=1, soft_prompt=1, bos=0, eos=1)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_every_sequence_once_and_rows_fit(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used, default=0) <= row_tokens
    # first fit: no two rows could be joined
    assert sum(u <= row_tokens // 2 for u in used) <= 1


def test_a_sequence_longer_than_a_row():
    with pytest.raises(DataError, match="sequence 1 has 9 tokens, a packed row holds 8"):
        pack([3, 9], 8)


def test_rows_and_batch():
    prompts = [
        Prompt(np.array([5, 6, 7]), np.array([-1, -1, 3]), np.array([False, True, False])),
        Prompt(np.array([8, 9]), np.array([-2, -1]), np.array([False, True])),
    ]
    (row,) = packed_rows(prompts, 6)
    np.testing.assert_array_equal(row["input_ids"], [5, 6, 7, 8, 9])
    np.testing.assert_array_equal(row["labels"], [-100, 6, -100, -100, 9])
    np.testing.assert_array_equal(row["position_ids"], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(row["segments"], [0, 0, 0, 1, 1])
    short = {k: v[:2] for k, v in row.items()}
    batch = PackedCollator(LAYOUT)([row, short])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]]
    assert batch["slots"].tolist() == [[-1, -1, 3, -2, -1], [-1, -1, -1, -1, -1]]
    assert batch["labels"][1].tolist() == [-100, 6, -100, -100, -100]
    assert batch["segments"][1].tolist() == [0, 0, -1, -1, -1]
    assert all(v.dtype == torch.int64 for v in batch.values())


def test_a_blank_row_teaches_nothing():
    row = blank_row(LAYOUT)
    assert {name: values.tolist() for name, values in row.items()} == {
        "input_ids": [1],
        "slots": [-1],
        "labels": [-100],
        "position_ids": [0],
        "segments": [0],
    }
