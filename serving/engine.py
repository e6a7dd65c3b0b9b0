"""What every engine does: ranked items for a history, and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from genrec.writer import DEFAULT_STYLE

if TYPE_CHECKING:
    from genrec.serving.export import Export


@dataclass(frozen=True)
class RecommendRequest:
    """One user's wish for items."""

    history: list[str]  # item ids, oldest first; unknown ids are errors
    k: int = 10
    beams: int | None = None  # beam width; None: max(50, k) limited by the catalogue
    exclude_seen: bool = True
    categories: list[str] | None = None  # items in any of them
    price_min: float | None = None
    price_max: float | None = None
    allow: list[str] | None = None  # only these item ids
    deny: frozenset[int] | None = None  # none of these catalogue rows


@dataclass(frozen=True)
class RankedItem:
    """One recommended item."""

    item_id: str
    score: float  # log P(item): sum over levels of the log-softmax over the codes that lead on in the trie
    # (with a mixer: log P among the list's candidates)
    rank: int  # 1 is best; by the score, or by the export's re-ranker


@dataclass(frozen=True)
class TextRequest:
    """A wish for text about an item, for the user with this history."""

    item_id: str
    history: list[str] = field(default_factory=list)
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    task: str = "describe"  # or "explain", "headline"
    style: str = DEFAULT_STYLE  # see `genrec.writer.STYLES`


@dataclass(frozen=True)
class JsonRequest:
    """A question about a message of a conversation; its answer is the likeliest JSON that the schema allows."""

    message: str  # see `genrec.query_schema.question`
    schema: str  # JSON schema, as text
    max_tokens: int  # enough for the longest JSON that the schema allows
    temperature: ClassVar[float] = 0.0
    seed: ClassVar[int] = 0


@dataclass(frozen=True)
class TextResult:
    """Text and why it ended ("stop" or "length")."""

    text: str
    finish_reason: str
    token_ids: list[int]


class Engine(Protocol):
    """Loads an export once, then answers; safe to call from one thread at a time."""

    name: str

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[list[RankedItem]]:
        """Best items first, at most `k`, fewer only where fewer are allowed."""
        ...

    def generate(self, requests: Sequence[TextRequest | JsonRequest]) -> list[TextResult]:
        """Text for each request, in order; JSON without spaces where that was asked for."""
        ...

    def prepare(self, export: Export) -> Callable[[], None]:
        """Make ready, aside and on any thread, to answer from another state of the items of the export in use.

        Args:
            export: what `genrec.serving.item_upsert.with_items` made of it.

        Returns:
            To be called between two calls of the engine, on the thread that makes them; takes no time.
        """
        ...

    def close(self) -> None:
        """Free memory and processes."""
        ...


class ExportEngine(Engine, Protocol):
    """An engine that says what it serves."""

    @property
    def export(self) -> Export:
        """What was loaded."""
        ...
