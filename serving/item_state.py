"""One state of the items: what a request is answered from, whatever replaces it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from genrec.serving.chat import Chat
from genrec.serving.export import Export
from genrec.serving.fallback import Popularity
from genrec.serving.item_search import ItemSearch


@dataclass(frozen=True)
class ItemState:
    """An export and what is looked up in its items; never changed, replaced as a whole.

    Attributes:
        export: the items.
        popularity: the fallback.
        search: by words.
        categories: each with its number of items, the largest first.
        chat: what conversations need; None where there is no chat.
    """

    export: Export
    popularity: Popularity
    search: ItemSearch
    categories: list[tuple[str, int]]
    chat: Chat | None

    @classmethod
    def of(cls, export: Export, chats: bool) -> ItemState:
        """Everything that a request would else make while it waits."""
        sizes = {name: len(rows) for name, rows in export.catalogue.rows_of_category.items()}
        _ = export.catalogue.index
        if chats:
            _ = export.mention_finder
        return cls(
            export=export,
            popularity=Popularity(export),
            search=ItemSearch(export),
            categories=sorted(sizes.items(), key=lambda category: (-category[1], category[0])),
            chat=Chat(export) if chats else None,
        )

    def title(self, item_id: str) -> str:
        """Of an item that this state holds."""
        return self.export.catalogue.titles[self.export.catalogue.index[item_id]]
