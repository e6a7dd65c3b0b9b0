"""A reply as text: lines that may each name certain items, cut at stop words and at a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from genrec.item_names import ItemNames

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Line:
    """One line of a reply, and the catalogue rows whose titles it may name."""

    text: str
    known: frozenset[int] = frozenset()


class ReplyText:
    """Puts lines together and cuts them; a cut never leaves a shorter title than the one that it cut.

    Example:
        "1. Lamp 11" cut after "1. Lamp 1" would name another item, Lamp 1; it is cut to "1. Lamp".
    """

    def __init__(self, tokenizer: Tokenizer, names: ItemNames, stop: Sequence[str], max_tokens: int | None) -> None:
        """
        Args:
            tokenizer: counts tokens; knows no special one (`genrec.prompts.plain_tokenizer`).
            names: of the catalogue.
            stop: the text ends before the first of these.
            max_tokens: of the whole text; None: no limit.
        """
        self._tokenizer, self._names = tokenizer, names
        self._stop, self._max_tokens = stop, max_tokens

    def cut(self, lines: Sequence[Line]) -> tuple[str, Finish | None]:
        """The lines as one text, and why it is cut; None: it is whole."""
        text = "\n".join(line.text for line in lines)
        finish: Finish | None = None
        places = [at for word in self._stop if (at := text.find(word)) >= 0]
        if places:
            text, finish = text[: min(places)], "stop"
        end = self._end(text)
        if end < len(text):
            text, finish = text[:end], "length"
        return (text, None) if finish is None else (self._tidied(text, lines), finish)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _end(self, text: str) -> int:
        """How many characters of a text fit into `max_tokens`."""
        most = self._max_tokens
        if most is None:
            return len(text)
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= most:
            return len(text)
        end = int(offsets[most - 1][1])
        while self.count(text[:end]) > most:  # a character of several tokens, or a piece that parts otherwise when cut
            end -= 1
        return end

    def _tidied(self, text: str, lines: Sequence[Line]) -> str:
        """Without the last words of a cut line as long as they name an item that the line does not."""
        start = text.rfind("\n") + 1
        line = lines[text.count("\n")]
        while self._names.strangers(text[start:], line.known):
            text = text[: start + len(text[start:].rstrip().rpartition(" ")[0])]
        return text
