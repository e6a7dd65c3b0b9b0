"""Labels, the schema of a message, and the JSON that it allows."""

import json

import pytest

from genrec.errors import DataError
from genrec.mentions import Mention
from genrec.query import Fact
from genrec.query_schema import (
    LABELS,
    Change,
    change_schema,
    labelled,
    longest_answer,
    read_change,
    roles_of,
    write_change,
)

TEXT = "a steel lamp  below 30, [A] like the 2nd"
STEEL = Mention(2, 7, "value", fact=Fact(name="material", value="steel"))
LAMP = Mention(8, 12, "value", fact=Fact(name="category", value="lamp"))
THIRTY = Mention(20, 22, "number", number=30.0)
SECOND = Mention(37, 40, "item", items=("item-1",))
MENTIONS = [STEEL, LAMP, THIRTY, SECOND]


def test_labels_stand_in_place_of_mentions_and_nobody_forges_them() -> None:
    assert labelled(TEXT, MENTIONS) == "a [A] [B] below [C], (A) like the [D]"
    assert labelled("nothing", []) == "nothing"


def test_the_schema_asks_for_the_role_of_each_mention() -> None:
    schema = change_schema([STEEL, THIRTY])
    assert schema["required"] == ["A", "B", "all"]
    assert schema["properties"]["A"]["enum"] == ["want", "also", "avoid", "drop", "none"]
    assert schema["properties"]["B"]["enum"] == ["max", "min", "count", "none"]
    assert schema["additionalProperties"] is False


def test_what_cannot_be_is_not_offered() -> None:
    assert "count" not in roles_of(Mention(0, 0, "number", number=19.99))
    assert "count" not in roles_of(Mention(0, 0, "number", number=0.0))
    assert roles_of(Mention(0, 0, "attribute", fact=Fact(name="colour", value=""))) == ["drop", "none"]
    both = roles_of(Mention(0, 0, "value", fact=Fact(name="size", value="42"), number=42.0))
    assert {"want", "max", "none"} <= set(both)
    assert len(set(both)) == len(both)


def test_a_change_is_read_as_it_was_written() -> None:
    change = Change([(STEEL, "want"), (LAMP, "avoid"), (THIRTY, "max"), (SECOND, "like")], "cheaper")
    text = write_change(change)
    assert text == '{"A":"want","B":"avoid","C":"max","D":"like","all":"cheaper"}'
    assert read_change(text, MENTIONS) == change
    assert len(text) <= longest_answer(MENTIONS)
    assert longest_answer([]) == len('{"all":"start over"}')


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"A":"want"', 'found \'{"A":"want"\''),
        ("[]", r"expected JSON with the keys \['A', 'all'\]"),
        ('{"A":"want"}', "expected JSON with the keys"),
        ('{"A":"max","all":"keep"}', r"A: expected one of \['want', .*found 'max'"),
        ('{"A":{},"all":"keep"}', "A: expected one of"),
        ('{"A":"want","all":"keep","B":"want"}', "expected JSON with the keys"),
    ],
)
def test_what_no_schema_allows_is_refused(text: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_change(text, [STEEL])


def test_mentions_beyond_the_labels_are_left_as_they_are() -> None:
    text = "x " * 30
    many = [Mention(2 * i, 2 * i + 1, "value", fact=STEEL.fact) for i in range(30)]
    assert labelled(text, many).split()[-5:] == ["[Z]", "x", "x", "x", "x"]
    assert len(json.loads(write_change(Change([(m, "want") for m in many])))) == len(LABELS) + 1
