"""What a history says of every item before the language model speaks: the sum of the parts that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrec.adapters.histories import Histories
from genrec.adapters.neighbours import Neighbours
from genrec.adapters.profile import Profile

KEYS, TABLES = "keys.", "tables."  # of frozen arrays in a saved file


class ItemScores(nn.Module):
    """A `Profile`, `Neighbours`, or both: scores that `genrec.trie.Trie.prior` spreads over the semantic ids."""

    def __init__(self, profile: Profile | None, neighbours: Neighbours | None):
        super().__init__()
        assert profile is not None or neighbours is not None
        self.profile = profile
        self.neighbours = neighbours

    def _sum(self, scores: Callable[[Profile | Neighbours], Tensor]) -> Tensor:
        first, *others = (scores(part) for part in (self.profile, self.neighbours) if part is not None)
        return sum(others, first)

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows, oldest first -> float32 [B, N], nats up to a constant per row."""
        return self._sum(lambda part: part(histories))

    def of_events(self, items: Tensor, first: Tensor) -> Tensor:
        """Scores [M, N] before each event; arguments as for `genrec.adapters.profile.Profile.of_events`."""
        return self._sum(lambda part: part.of_events(items, first))

    def save(self, path: Path) -> None:
        """Write weights and frozen arrays as float32 and int64."""
        state = dict(self.state_dict())
        if self.profile is not None:
            state |= {f"{KEYS}{name}": self.profile.keys(name) for name in self.profile.names}
        if self.neighbours is not None:
            state |= {f"{TABLES}{name}": table for name, table in self.neighbours.tables().items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)

    @classmethod
    def load(cls, path: Path) -> ItemScores:
        """Read what `save` wrote, frozen.

        Raises:
            OSError, SafetensorError, KeyError: no whole file of this kind.
        """
        state = load_file(path)
        keys = {name.removeprefix(KEYS): state.pop(name) for name in list(state) if name.startswith(KEYS)}
        tables = {name.removeprefix(TABLES): state.pop(name) for name in list(state) if name.startswith(TABLES)}
        scores = cls(Profile(keys) if keys else None, Neighbours(**tables) if tables else None)
        scores.load_state_dict(state)
        return scores.eval().requires_grad_(False)
