"""The library's front door: a folder in, items out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genrec.serving.engine import Engine, RankedItem
    from genrec.serving.export import Export


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

    def describe(
        self,
        history: list[str],
        item_id: str,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Text about an item for the user with this history; greedy at temperature 0.

        Raises:
            DataError: unknown item ids, or numbers out of range.
        """
        from genrec.serving.engine import TextRequest

        request = TextRequest(item_id, history, max_tokens, temperature, seed)
        return self.engine.generate([request])[0].text

    def close(self) -> None:
        """Free memory and processes."""
        self.engine.close()

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
