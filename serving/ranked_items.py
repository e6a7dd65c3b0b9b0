"""From what the beams found to the lists that are answered: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from genrec.decode import Ranked
from genrec.serving.engine import RankedItem
from genrec.serving.export import Export


def ranked_items(
    export: Export, found: Ranked, histories: Sequence[Sequence[int]], ks: Sequence[int]
) -> list[list[RankedItem]]:
    """Lists in the order of scores, or of the export's re-ranker where it has one.

    Args:
        export: with the items.
        found: of B users.
        histories: theirs, catalogue rows, oldest first.
        ks: most items of each list.
    """
    if export.reranker is not None:
        found = export.reranker.reorder(histories, found)
    ids, lists = export.catalogue.item_ids, []
    for items, scores, k in zip(found.items.tolist(), found.scores.tolist(), ks, strict=True):
        legal = [(ids[item], score) for item, score in zip(items, scores, strict=True) if item >= 0]
        lists.append([RankedItem(item, score, rank) for rank, (item, score) in enumerate(legal[:k], start=1)])
    return lists
