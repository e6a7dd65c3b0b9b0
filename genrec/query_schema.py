"""What the model writes about one message: the role of each mention, as JSON under a schema of that mention's roles.

Each question is a prompt of its own: the message with ``[X]`` in place of the mention asked about and ``[]`` in place
of the others, as in "a [] [X] below []"; one more, without ``[X]``, asks about the message as a whole. So the model
never writes a value, a number or an id, a value that no training sample held is like any other, and the questions of a
whole conversation are one batch. `genrec.query_change` turns the roles into a query.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args

from genrec.errors import DataError
from genrec.mentions import Mention

ValueRole = Literal["want", "also", "avoid", "drop", "none"]
NumberRole = Literal["max", "min", "count", "none"]
ItemRole = Literal["like", "dislike", "cheaper", "dearer", "none"]
Role = Literal["want", "also", "avoid", "drop", "none", "max", "min", "count", "like", "dislike", "cheaper", "dearer"]
Whole = Literal["keep", "cheaper", "dearer", "any price", "start over"]
MOST_MENTIONS = 26  # of a piece of a message
FREE = str.maketrans("[]", "()")  # nobody's own brackets look like a mention


@dataclass(frozen=True)
class Change:
    """What one message says.

    Attributes:
        roles: each mention with its role, in the order of the message.
        whole: what it says beside them: nothing more, cheaper or dearer than what was shown, at any price, or that all
            earlier wishes are off.
    """

    roles: list[tuple[Mention, Role]]
    whole: Whole = "keep"


def roles_of(mention: Mention) -> list[Role]:
    """The roles that a mention may play."""
    match mention.kind:
        case "value":
            roles = list(get_args(ValueRole))
            return roles if mention.number is None else [*get_args(NumberRole)[:-1], *roles]
        case "attribute":
            return ["drop", "none"]
        case "item":
            return list(get_args(ItemRole))
        case "number":
            countable = mention.number is not None and mention.number >= 1 and mention.number == int(mention.number)
            return [role for role in get_args(NumberRole) if role != "count" or countable]


def question(text: str, mentions: Sequence[Mention], asked: int | None = None) -> str:
    """A message as the model reads it.

    Example: "a steel lamp below 30", its second mention -> "a [] [X] below []".

    Args:
        text: the message.
        mentions: in the message's order.
        asked: number of the mention asked about; None: the message as a whole.
    """
    parts, at = [], 0
    for number, mention in enumerate(mentions):
        parts += [text[at : mention.start].translate(FREE), "[X]" if number == asked else "[]"]
        at = mention.end
    return " ".join("".join([*parts, text[at:].translate(FREE)]).split())


def questions(text: str, mentions: Sequence[Mention]) -> list[tuple[str, list[str]]]:
    """What there is to ask about a message: the prompt's text and the possible answers; the message as a whole last."""
    asked: list[tuple[str, list[str]]] = [
        (question(text, mentions, number), [*roles_of(mention)]) for number, mention in enumerate(mentions)
    ]
    return [*asked, (question(text, mentions), [*get_args(Whole)])]


def answer_schema(possible: Sequence[str]) -> str:
    """The JSON schema, as text, of one answer."""
    return json.dumps({"enum": list(possible)}, separators=(",", ":"))


def answers(change: Change) -> list[str]:
    """What a perfect model writes to each of the `questions`, as JSON."""
    return [json.dumps(answer) for answer in chain((role for _, role in change.roles), [change.whole])]


def read_change(written: Sequence[str], mentions: Sequence[Mention]) -> Change:
    """The change that a model wrote.

    Args:
        written: its answers to the `questions`, in order.
        mentions: of the message.

    Raises:
        DataError: an answer that its schema does not allow, as when an engine stopped before its end.
    """
    read = []
    for text, (_, possible) in zip(written, questions("", mentions), strict=True):
        try:
            read.append(json.loads(text))
        except ValueError:
            read.append(None)
        if read[-1] not in possible:
            raise DataError(f"expected one of {possible} as JSON, found {text[:100]!r}; ask for more tokens")
    return Change(list(zip(mentions, read[:-1], strict=True)), read[-1])
