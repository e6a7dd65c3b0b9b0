"""What a conversation asks for: the model says what role each mention plays, and the roles make the query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from genrec.query import Query
from genrec.query_change import apply_change
from genrec.query_schema import Change, change_schema, labelled, longest_answer, read_change
from genrec.query_turns import Piece, pieces_of
from genrec.serving.engine import Engine, JsonRequest
from genrec.serving.export import Export


def understand(
    engine: Engine, export: Export, messages: Sequence[Mapping[str, Any]], shown: Sequence[Sequence[str]]
) -> Query:
    """The wishes that hold after a conversation's last message.

    The conversation is all there is: the same messages give the same query.

    Args:
        engine: of the export.
        export: whose catalogue the messages are about.
        messages: {"role": "user" or another, "content": text} each, oldest first.
        shown: for each message the ids of the items that it lists, in its order; empty for those without a list.

    Raises:
        DataError: not one list of ids for each message.
    """
    pieces = pieces_of(export.mention_finder, messages, shown)
    query = Query()
    for piece, change in zip(pieces, read_pieces(engine, pieces), strict=True):
        query = apply_change(query, change, export.catalogue, piece.shown)
    return query


def read_pieces(engine: Engine, pieces: Sequence[Piece]) -> list[Change]:
    """What each piece says, by the model, in one call of the engine."""
    requests = [
        JsonRequest(
            labelled(piece.text, piece.mentions),
            json.dumps(change_schema(piece.mentions), separators=(",", ":")),
            longest_answer(piece.mentions) + 1,  # a token holds at least one byte, and the last one ends the text
        )
        for piece in pieces
    ]
    if not requests:
        return []
    results = engine.generate(requests)
    return [read_change(result.text, piece.mentions) for piece, result in zip(pieces, results, strict=True)]
