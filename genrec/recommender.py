"""The library's front door: a folder in, items out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec.errors import ConfigError

if TYPE_CHECKING:
    from genrec.serving.chat import Chat, ChatReply, Message, Understand
    from genrec.serving.engine import Engine, RankedItem
    from genrec.serving.export import Export
    from genrec.serving.provenance import Written


class Recommender:
    """An export with an engine on it.

    Example::

        with Recommender.load("runs/demo/export") as recommender:
            for item in recommender.recommend(["item-1", "item-7"], k=5, price_max=50):
                print(item.rank, item.item_id, item.score)
    """

    def __init__(self, export: Export, engine: Engine) -> None:
        self.export = export
        self.engine = engine

    @classmethod
    def load(cls, export_dir: Path | str, engine: str = "auto") -> Recommender:
        """Load an export folder and start an engine: "auto", "torch" or "vllm".

        Raises:
            ArtefactError: the folder is no whole export.
            ConfigError: no such engine.
        """
        from genrec.serving.export import Export
        from genrec.serving.select_engine import make_engine

        export = Export.load(export_dir)
        return cls(export, make_engine(export, engine))

    def recommend(self, history: list[str], k: int = 10, **filters: Any) -> list[RankedItem]:
        """The next items for a user.

        Args:
            history: item ids, oldest first; empty for a new user.
            k: list length; fewer come back only where fewer are allowed.
            filters: any other field of `genrec.serving.engine.RecommendRequest`, such as ``categories``.

        Raises:
            DataError: unknown item ids or categories, or numbers out of range.
        """
        from genrec.serving.engine import RecommendRequest

        return self.engine.recommend([RecommendRequest(history=history, k=k, **filters)])[0]

    def describe(self, history: list[str], item_id: str, **wishes: Any) -> Written:
        """Text about an item for the user with this history, which dwells on what this user cares about.

        Args:
            history: item ids, oldest first; empty for a new user.
            item_id: what to write about.
            wishes: any other field of `genrec.serving.engine.TextRequest`: ``style``, ``max_tokens``, ``temperature``
                (greedy at 0) and ``seed``.

        Raises:
            DataError: unknown item ids or style, or numbers out of range.
        """
        return self._write("describe", history, item_id, wishes)

    def explain(self, history: list[str], item_id: str, **wishes: Any) -> Written:
        """Why this item for the user with this history, naming items of it; arguments as in `describe`."""
        return self._write("explain", history, item_id, wishes)

    def headline(self, history: list[str], item_id: str, **wishes: Any) -> Written:
        """One line about an item for the user with this history; arguments as in `describe`."""
        return self._write("headline", history, item_id, wishes)

    def chat(
        self, messages: Sequence[Message], history: Sequence[str] = (), *, understand: Understand | None = None
    ) -> ChatReply:
        """Items that fit what a conversation asks for, and a reply about exactly those.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``, oldest first; the assistant's are
                the texts of earlier replies, in which "the second one" is looked up.
            history: item ids, oldest first; empty for a new user.
            understand: finds the wishes; None: the export's own language model does.

        Raises:
            ConfigError: the language model was not trained for it.
            DataError: no message, an unknown role, nothing said by the user, or unknown item ids.
        """
        from genrec.serving.chat import answer

        if understand is None:
            if "chat" not in self.export.tasks:
                raise ConfigError(
                    f"{self.export.folder}: this export was trained for {self.export.tasks or 'items alone'}, not for "
                    "conversations; train with finetune.mixture.chat above 0, or give `understand`"
                )
            from genrec.serving import understand as own

            understand = own.understand
        return answer(self._chat, self.engine, understand, messages, list(history))

    @cached_property
    def _chat(self) -> Chat:
        from genrec.serving.chat import Chat

        return Chat(self.export)

    def _write(self, task: str, history: list[str], item_id: str, wishes: dict[str, Any]) -> Written:
        from genrec.serving.engine import TextRequest
        from genrec.serving.provenance import Written, provenance_of

        request = TextRequest(item_id, history, task=task, **wishes)
        result = self.engine.generate([request])[0]
        return Written(result.text, result.finish_reason, provenance_of(self.export, self.engine.name, request))

    def close(self) -> None:
        """Free memory and processes."""
        self.engine.close()

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
