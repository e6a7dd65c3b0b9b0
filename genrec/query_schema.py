"""The JSON that the model writes about one message: the role of every mention, under a schema made for that message.

The prompt shows labels in place of mentions ("a [A] lamp below [B]"), and the schema asks for each label's role, so the
model never writes a value, a number or an id, and a value that no training sample held is like any other. What comes
out is always whole and always about things that the message names. `genrec.query_change` turns it into a query.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from genrec.errors import DataError
from genrec.mentions import Mention

ValueRole = Literal["want", "also", "avoid", "drop", "none"]
NumberRole = Literal["max", "min", "count", "none"]
ItemRole = Literal["like", "dislike", "cheaper", "dearer", "none"]
Role = Literal["want", "also", "avoid", "drop", "none", "max", "min", "count", "like", "dislike", "cheaper", "dearer"]
Whole = Literal["keep", "cheaper", "dearer", "any price", "start over"]
WHOLE = "all"  # the key of what is said beside the mentions
LABELS = string.ascii_uppercase
FREE = str.maketrans("[]{}", "()()")  # nobody's own brackets look like a label


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


def roles_of(mention: Mention) -> list[str]:
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


def labelled(text: str, mentions: Sequence[Mention]) -> str:
    """A message with labels in place of its mentions.

    Example: "a steel lamp below 30" with three mentions -> "a [A] [B] below [C]".

    Args:
        text: the message.
        mentions: in the message's order, at most as many as there are `LABELS`.
    """
    parts, at = [], 0
    for label, mention in zip(LABELS, mentions, strict=False):
        parts += [text[at : mention.start].translate(FREE), f"[{label}]"]
        at = mention.end
    return " ".join("".join([*parts, text[at:].translate(FREE)]).split())


def change_schema(mentions: Sequence[Mention]) -> dict[str, Any]:
    """The JSON schema of what is to be written about a message with these mentions."""
    properties: dict[str, Any] = {
        label: {"enum": roles_of(mention)} for label, mention in zip(LABELS, mentions, strict=False)
    }
    properties[WHOLE] = {"enum": list(get_args(Whole))}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def longest_answer(mentions: Sequence[Mention]) -> int:
    """Bytes of the longest JSON that `change_schema` allows, written without spaces."""
    enums = {key: of["enum"] for key, of in change_schema(mentions)["properties"].items()}
    return len(json.dumps({key: max(roles, key=len) for key, roles in enums.items()}, separators=(",", ":")))


def write_change(change: Change) -> str:
    """What a perfect model writes: the JSON of a change, without spaces."""
    written: dict[str, str] = {label: role for label, (_, role) in zip(LABELS, change.roles, strict=False)}
    return json.dumps({**written, WHOLE: change.whole}, separators=(",", ":"))


def read_change(text: str, mentions: Sequence[Mention]) -> Change:
    """The change that a model wrote.

    Raises:
        DataError: not the JSON that `change_schema` allows, as when an engine stopped before its end.
    """
    schema = change_schema(mentions)["properties"]
    try:
        written = json.loads(text)
    except ValueError:
        written = None
    if not isinstance(written, dict) or written.keys() != schema.keys():
        raise DataError(f"expected JSON with the keys {list(schema)}, found {text[:200]!r}; ask for more tokens")
    for key, role in written.items():
        if role not in schema[key]["enum"]:
            raise DataError(f"{key}: expected one of {schema[key]['enum']}, found {str(role)[:50]!r}")
    return Change([(m, written[label]) for label, m in zip(LABELS, mentions, strict=False)], written[WHOLE])
