"""Speculative decoding as it is counted: a few tokens are guessed cheaply, and the model keeps those it agrees with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass
class Speculation:
    """Counts since the engine started."""

    drafts: int = 0  # times that tokens were proposed
    draft_tokens: int = 0  # proposed
    accepted_tokens: int = 0  # of them


@runtime_checkable
class Speculative(Protocol):
    """An engine that may draft its texts."""

    def speculation(self) -> Speculation | None:
        """The counts so far; None where this engine drafts nothing. Safe from any thread, never waits."""
        ...
