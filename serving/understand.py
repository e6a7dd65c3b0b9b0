"""What a conversation asks for: the model says what role each mention plays, and the roles make the query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.query import Query
from genrec.query_change import apply_change
from genrec.query_schema import Change, answer_schema, questions, read_change
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
    asked = [questions(piece.text, piece.mentions) for piece in pieces]
    requests = [
        # a token holds at least one byte; two are quotes, and the last one ends the text
        JsonRequest(text, answer_schema(possible), max(map(len, possible)) + 3)
        for of_piece in asked
        for text, possible in of_piece
    ]
    results = iter(engine.generate(requests) if requests else [])
    return [
        read_change([next(results).text for _ in of_piece], piece.mentions)
        for piece, of_piece in zip(pieces, asked, strict=True)
    ]
