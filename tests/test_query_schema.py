"""What is asked about a message, what may be answered, and what is refused."""

import json

import pytest

from genrec.errors import DataError
from genrec.mentions import Mention
from genrec.query import Fact
from genrec.query_schema import Change, answer_schema, answers, question, questions, read_change, roles_of

TEXT = "a steel lamp  below 30, [X] like the 2nd"
STEEL = Mention(2, 7, "value", fact=Fact(name="material", value="steel"))
LAMP = Mention(8, 12, "value", fact=Fact(name="category", value="lamp"))
THIRTY = Mention(20, 22, "number", number=30.0)
SECOND = Mention(37, 40, "item", items=("item-1",))
MENTIONS = [STEEL, LAMP, THIRTY, SECOND]
VALUE_ROLES = ["want", "also", "avoid", "drop", "none"]


def test_marks_stand_in_place_of_mentions_and_nobody_forges_them() -> None:
    assert question(TEXT, MENTIONS, 1) == "a [] [X] below [], (X) like the []"
    assert question(TEXT, MENTIONS) == "a [] [] below [], (X) like the []"
    assert question("nothing", []) == "nothing"


def test_each_mention_is_asked_about_and_then_the_whole() -> None:
    asked = questions(TEXT, [STEEL, THIRTY])
    assert [text.count("[X]") for text, _ in asked] == [1, 1, 0]
    assert [possible for _, possible in asked] == [
        VALUE_ROLES,
        ["max", "min", "count", "none"],
        ["keep", "cheaper", "dearer", "any price", "start over"],
    ]
    assert json.loads(answer_schema(["a", "b c"])) == {"enum": ["a", "b c"]}


def test_what_cannot_be_is_not_offered() -> None:
    assert "count" not in roles_of(Mention(0, 0, "number", number=19.99))
    assert "count" not in roles_of(Mention(0, 0, "number", number=0.0))
    assert roles_of(Mention(0, 0, "attribute", fact=Fact(name="colour", value=""))) == ["drop", "none"]
    both = roles_of(Mention(0, 0, "value", fact=Fact(name="size", value="42"), number=42.0))
    assert {"want", "max", "none"} <= set(both)
    assert len(set(both)) == len(both)


def test_a_change_is_read_as_it_was_written() -> None:
    change = Change([(STEEL, "want"), (LAMP, "avoid"), (THIRTY, "max"), (SECOND, "like")], "any price")
    written = answers(change)
    assert written == ['"want"', '"avoid"', '"max"', '"like"', '"any price"']
    assert read_change(written, MENTIONS) == change
    assert read_change(['"keep"'], []) == Change([])


@pytest.mark.parametrize("text", ['"wan', "want", '"max"', "[]", "{}", "null", ""])
def test_what_no_schema_allows_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"expected one of \['want', .*'none'\] as JSON, found .*; ask for more tokens"):
        read_change([text, '"keep"'], [STEEL])
