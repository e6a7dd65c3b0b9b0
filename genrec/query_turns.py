"""A conversation's user messages as short pieces, each with its mentions and the list that the user looked at.

Each piece is read by itself: what a message means hangs on its own words, what it changes is decided by
`genrec.query_change`. So all pieces of a conversation are one batch of an engine; a long message is many pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genrec.errors import DataError
from genrec.mentions import Mention, MentionFinder
from genrec.query_schema import MOST_MENTIONS

PIECE_CHARS = 160
MOST_PIECES = 8  # of a message; the rest is not read
MOST_MESSAGES = 40  # of a user, the newest; earlier ones are not read
SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
BREAK = re.compile(rf"(?=\S)(?:.{{1,{PIECE_CHARS}}}(?=\s|$)|.{{1,{PIECE_CHARS}}})", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Some sentences of a user's message.

    Attributes:
        text: as the user wrote it.
        mentions: what it names.
        shown: ids of the list that the user was looking at, in its order.
    """

    text: str
    mentions: list[Mention]
    shown: tuple[str, ...]


def pieces_of(
    finder: MentionFinder, messages: Sequence[Mapping[str, Any]], shown: Sequence[Sequence[str]]
) -> list[Piece]:
    """The pieces of a conversation's user messages, oldest first.

    Args:
        finder: of the catalogue.
        messages: {"role", "content"} each; roles other than "user" say nothing about wishes.
        shown: for each message the ids of the items that it lists; empty for most.

    Raises:
        DataError: not one list of ids for each message.
    """
    if len(messages) != len(shown):
        raise DataError(f"{len(messages)} messages but {len(shown)} lists of shown items; give one each, even empty")
    found: list[list[Piece]] = []
    seen: tuple[str, ...] = ()
    for message, items in zip(messages, shown, strict=True):
        if message["role"] == "user":
            texts = split_message(message["content"])
            found.append([Piece(text, finder.find(text, seen)[:MOST_MENTIONS], seen) for text in texts])
        if items:
            seen = tuple(items)
    return [piece for pieces in found[-MOST_MESSAGES:] for piece in pieces]


def split_message(text: str) -> list[str]:
    """Sentences, joined while they are short and broken where they are long; at most `MOST_PIECES`."""
    text = text[: MOST_PIECES * PIECE_CHARS]
    pieces: list[str] = []
    for sentence in SENTENCE.split(text):
        for part in BREAK.findall(sentence):
            if pieces and len(pieces[-1]) + len(part) < PIECE_CHARS:
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces[:MOST_PIECES]
