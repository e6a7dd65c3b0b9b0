"""Messages in pieces: nothing of a usual message is lost, and nothing huge comes through."""

import numpy as np
import pytest

from genrec.errors import DataError
from genrec.mentions import MentionFinder
from genrec.query_turns import MOST_MESSAGES, MOST_PIECES, PIECE_CHARS, pieces_of, split_message
from tests.export_fixture import make_catalogue

FINDER = MentionFinder(make_catalogue(20, np.random.default_rng(0)))


def test_short_messages_are_one_piece_and_long_ones_keep_every_word() -> None:
    assert split_message("A red lamp. Under 20, please!") == ["A red lamp. Under 20, please!"]
    text = " ".join(f"Sentence {i} says something." for i in range(30))
    pieces = split_message(text)
    assert " ".join(pieces) == text
    assert 4 < len(pieces) <= MOST_PIECES
    assert all(len(piece) <= PIECE_CHARS for piece in pieces)
    assert all(piece.endswith(".") for piece in pieces)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "no " * 400_000, "\n" * 100_000, "🦊" * 1000, "", "   "])
def test_no_message_is_too_long(text: str) -> None:
    pieces = split_message(text)
    assert len(pieces) <= MOST_PIECES
    assert all(0 < len(piece) <= PIECE_CHARS for piece in pieces)


def test_a_piece_looks_at_the_list_before_it() -> None:
    messages = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": "a red lamp"},
        {"role": "assistant", "content": "1. blue lamp"},
        {"role": "user", "content": "not the second"},
        {"role": "assistant", "content": "sorry"},
        {"role": "user", "content": "the first"},
    ]
    shown = [[], [], ["item-1", "item-2"], [], [], []]
    pieces = pieces_of(FINDER, messages, shown)
    assert [piece.shown for piece in pieces] == [(), ("item-1", "item-2"), ("item-1", "item-2")]
    assert [m.items for piece in pieces[1:] for m in piece.mentions] == [("item-2",), ("item-1",)]
    with pytest.raises(DataError, match="6 messages but 5 lists of shown items; give one each"):
        pieces_of(FINDER, messages, shown[:5])


def test_the_newest_messages_of_a_long_conversation_are_read() -> None:
    messages = [{"role": "user", "content": f"{i} lamps"} for i in range(10_000)]
    pieces = pieces_of(FINDER, messages, [()] * len(messages))
    assert len(pieces) == MOST_MESSAGES
    assert pieces[-1].text == "9999 lamps"
