"""Many histories per row: no padding to speak of, and no history sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.errors import DataError
from genrec.prompts import Layout, Prompt


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Sequences -> rows of at most `row_tokens`, by first fit on decreasing length.

    Example: lengths [3, 5, 2], rows of 5 -> [[1], [0, 2]].

    Raises:
        DataError: a sequence is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > row_tokens:
        raise DataError(
            f"sequence {order[0]} has {lengths[order[0]]} tokens, a packed row holds {row_tokens}; "
            "raise finetune.pack_tokens or lower data.max_history"
        )
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows with exactly that much
    rooms: np.ndarray = np.zeros(row_tokens + 1, np.int64)  # how many rows have that much room
    for i in order:
        fits = np.flatnonzero(rooms[lengths[i] :])
        if len(fits):
            room = lengths[i] + int(fits[0])
            row = by_room[room].pop()
            rooms[room] -= 1
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - lengths[i]
        by_room.setdefault(left, []).append(row)
        rooms[left] += 1
    return rows


def packed_rows(prompts: Sequence[Prompt], row_tokens: int) -> list[dict[str, np.ndarray]]:
    """Prompts -> rows with input_ids, slots, labels, position_ids, segments: int64 [T] each.

    Labels are the token ids at targets and -100 elsewhere; segments number the row's sequences from 0.
    """
    rows = []
    for members in pack([len(p.input_ids) for p in prompts], row_tokens):
        chosen = [prompts[i] for i in members]
        lengths = [len(p.input_ids) for p in chosen]
        ids = np.concatenate([p.input_ids for p in chosen])
        targets = np.concatenate([p.targets for p in chosen])
        rows.append(
            {
                "input_ids": ids,
                "slots": np.concatenate([p.slots for p in chosen]),
                "labels": np.where(targets, ids, -100),
                "position_ids": np.concatenate([np.arange(n) for n in lengths]),
                "segments": np.repeat(np.arange(len(chosen)), lengths),
            }
        )
    return rows


def blank_row(layout: Layout) -> dict[str, np.ndarray]:
    """A row of one token and no target: it fills a batch and teaches nothing."""
    return {name: np.array([filler]) for name, filler in {**_fillers(layout), "segments": 0}.items()}


def _fillers(layout: Layout) -> dict[str, int]:
    return {"input_ids": layout.eos, "slots": -1, "labels": -100, "position_ids": 0, "segments": -1}


class PackedCollator:
    """Packed rows -> one batch, padded on the right to its longest row."""

    def __init__(self, layout: Layout):
        self.padding = _fillers(layout)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of `packed_rows` -> int64 [B, T] tensors of the same names."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name, filler in self.padding.items():
            values = np.full((len(rows), width), filler, np.int64)
            for i, row in enumerate(rows):
                values[i, : len(row[name])] = row[name]
            batch[name] = torch.from_numpy(values)
        return batch
