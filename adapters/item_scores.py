"""What a history says of every item before the language model speaks: the sum of the parts that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrec.adapters.histories import Histories
from genrec.adapters.neighbours import WINDOW, Neighbours, Table, grown_table
from genrec.adapters.profile import Profile
from genrec.adapters.repeats import Repeats
from genrec.adapters.sequence import SequenceScores

KEYS = "keys."  # of the profile's frozen arrays in a saved file; those of a table have its name
SEQUENCE = "sequence."  # of all that the sequence part saves
TABLES = ("neighbours", "followers")
PARTS = ("profile", *TABLES, "sequence")


@dataclass(frozen=True)
class Likely:
    """What B histories say of every item, in nats up to a constant per row.

    Attributes:
        total: float32 [B, N].
        parts: what it is the sum of, where that was asked for: name -> float32 [B, N].
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def of(self, rows: Sequence[int]) -> Likely:
        """Some histories'."""
        return Likely(self.total[rows], {name: part[rows] for name, part in self.parts.items()})

    def cpu(self) -> Likely:
        """The same on the CPU."""
        return Likely(self.total.cpu(), {name: part.cpu() for name, part in self.parts.items()})


class ItemScores(nn.Module):
    """A `Profile`, two tables of `Neighbours`, or some, and `Repeats`; `genrec.trie.Trie.prior` spreads their sum.

    `sequence`, trained apart and on the same events, joins them only after training: before, it would explain what it
    has seen and leave the others nothing to learn.
    """

    def __init__(self, profile: Profile | None, neighbours: Table | None, followers: Table | None):
        """
        Args:
            profile: compares content.
            neighbours: what `genrec.adapters.neighbours.neighbour_table` returns.
            followers: what `genrec.adapters.neighbours.follower_table` returns.
        """
        super().__init__()
        sizes = [len(of[0]) for of in (neighbours, followers) if of is not None]
        sizes += [len(profile.keys(name)) for name in profile.names] if profile is not None else []
        assert sizes, "neither content nor a log to score by"
        self.profile = profile
        self.neighbours = None if neighbours is None else Neighbours(*neighbours)
        self.followers = None if followers is None else Neighbours(*followers, within=WINDOW)
        self.repeats = Repeats(sizes[0])
        self.sequence: SequenceScores | None = None

    @property
    def names(self) -> list[str]:
        """The parts there are, but repeats."""
        return [name for name in PARTS if getattr(self, name) is not None]

    def read(self, histories: Histories, apart: bool = False) -> Likely:
        """B histories of catalogue rows, oldest first; `apart`: keep the parts, each as large as their sum."""
        total, parts = self.repeats(histories), {}
        for name in self.names:
            part = getattr(self, name)(histories)
            total = total + part
            if apart:
                parts[name] = part
        return Likely(total, parts)

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows, oldest first -> float32 [B, N], nats up to a constant per row."""
        return self.read(histories).total

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores [M, N] before each event, without `sequence`; arguments as for `Profile.of_events`."""
        parts = (getattr(self, name) for name in self.names if name != "sequence")
        return sum((part.of_events(items, first) for part in parts), self.repeats.of_events(items, first))

    def grown(self, n_items: int, keys: dict[str, Tensor], unseen: Tensor) -> ItemScores:
        """The same weights over N' items: those there are, in their rows, and new ones that no history holds.

        Args:
            n_items: N'.
            keys: modality -> float32 [N', E_m], from `genrec.adapters.profile.KeySpace.keys`; used by what reads
                content.
            unseen: bool [N], items without training events.
        """
        tables = {
            part: None if (of := getattr(self, part)) is None else grown_table(tuple(of.tables().values()), n_items)
            for part in TABLES
        }
        more = ItemScores(None if self.profile is None else Profile(keys), **tables)
        more.load_state_dict({name: of for name, of in self.state_dict().items() if not name.startswith(SEQUENCE)})
        if self.sequence is not None:
            reads = self.sequence.network.features is not None
            features = torch.cat([*keys.values()], 1) if reads else None
            more.sequence = self.sequence.grown(n_items, features, unseen)
        return more.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write weights and frozen arrays as float32 and int64."""
        state = {name: of for name, of in self.state_dict().items() if not name.startswith(SEQUENCE)}
        if self.sequence is not None:
            state |= {f"{SEQUENCE}{name}": of for name, of in self.sequence.tensors().items()}
        if self.profile is not None:
            state |= {f"{KEYS}{name}": self.profile.keys(name) for name in self.profile.names}
        for part in TABLES:
            if (of := getattr(self, part)) is not None:
                state |= {f"{part}.{name}": table for name, table in of.tables().items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)

    @classmethod
    def load(cls, path: Path) -> ItemScores:
        """Read what `save` wrote, frozen.

        Raises:
            OSError, SafetensorError, KeyError: no whole file of this kind.
        """
        state = load_file(path)
        keys = {name.removeprefix(KEYS): state.pop(name) for name in list(state) if name.startswith(KEYS)}
        ordered = {name.removeprefix(SEQUENCE): state.pop(name) for name in list(state) if name.startswith(SEQUENCE)}
        tables: dict[str, Table | None] = dict.fromkeys(TABLES)
        for part in TABLES:
            if f"{part}.columns" in state:
                tables[part] = (
                    state.pop(f"{part}.columns"), state.pop(f"{part}.counts"), state.pop(f"{part}.norms"),
                )  # fmt: skip
        scores = cls(Profile(keys) if keys else None, **tables)
        scores.load_state_dict(state)
        scores.sequence = SequenceScores.of_tensors(ordered) if ordered else None
        return scores.eval().requires_grad_(False)
