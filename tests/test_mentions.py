"""What a message names: values, attributes, numbers and items, and what only looks like them."""

import dataclasses

import numpy as np
import pytest

from genrec.mentions import MentionFinder, key_of, number_of
from genrec.query import Fact
from tests.export_fixture import make_catalogue

SHOWN = ("item-1", "item-6", "item-11")


@pytest.fixture(scope="module")
def finder() -> MentionFinder:
    made = make_catalogue(20, np.random.default_rng(0))
    attributes = [
        {**own, "size": ("S", "XL", "42")[i % 3], "brand name": "Black & Co"} for i, own in enumerate(made.attributes)
    ]
    titles = [*made.titles[:15], "Heat (1995)", "The Big Sleep", "black sofa", "It", "Heat"]
    return MentionFinder(dataclasses.replace(made, attributes=attributes, titles=titles))


def said(finder: MentionFinder, text: str, shown: tuple[str, ...] = ()) -> list[object]:
    """Each mention as what it means; the words it covers have to be those of the text."""
    found: list[object] = []
    for m in finder.find(text, shown):
        assert text[m.start : m.end].strip() == text[m.start : m.end] != ""
        found.append(m.items if m.items else m.fact if m.fact else m.number)
    return found


def colour(value: str) -> Fact:
    return Fact(name="colour", value=value)


def thing(value: str) -> Fact:
    return Fact(name="category", value=value)


def test_values_in_any_case_and_plural_longest_first(finder: MentionFinder) -> None:
    assert said(finder, "RED lamps, no blue") == [colour("red"), thing("lamp"), colour("blue")]
    assert said(finder, "black & co, or black") == [Fact(name="brand name", value="Black & Co"), colour("black")]
    assert said(finder, "redder lampshade bluest") == []


def test_short_values_need_the_catalogues_spelling(finder: MentionFinder) -> None:
    assert said(finder, "size S, it's nice") == [Fact(name="size", value=""), Fact(name="size", value="S")]
    assert said(finder, "XL or xl") == [Fact(name="size", value="XL")]


def test_a_value_may_be_a_number_as_well(finder: MentionFinder) -> None:
    (mention,) = finder.find("under 42")
    assert (mention.kind, mention.fact, mention.number) == ("value", Fact(name="size", value="42"), 42.0)


def test_attributes_by_name(finder: MentionFinder) -> None:
    assert said(finder, "any colour, any brand name") == [colour(""), Fact(name="brand name", value="")]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("under $20", [20.0]),
        ("19.99 or 12,50", [19.99, 12.5]),
        ("€1,200 to 1,000,000.5", [1200.0, 1000000.5]),
        ("five, not one", [5.0]),
        ("20€ and 2nd", [20.0]),
        ("iPhone15 v2 1.2.3", []),
        ("9" * 30, []),
        ("٣ ² Ⅻ", []),
    ],
)
def test_numbers(finder: MentionFinder, text: str, numbers: list[float]) -> None:
    assert said(finder, text) == numbers


def test_places_in_the_list_that_was_shown(finder: MentionFinder) -> None:
    one, two, three = ((item,) for item in SHOWN)
    assert said(finder, "the second, the 1st, the last one", SHOWN) == [two, one, three]
    assert said(finder, "number 3 or #1 or item 2", SHOWN) == [three, one, two]
    assert said(finder, "none of these", SHOWN) == [SHOWN]
    assert said(finder, "the first of these, two of them", SHOWN) == [one, 2.0]
    assert said(finder, "the fourth", SHOWN) == []
    assert said(finder, "number 7", SHOWN) == [7.0]
    assert said(finder, "the second of these") == []


def test_titles(finder: MentionFinder) -> None:
    assert said(finder, "more like green chair number 1 please", SHOWN) == [("item-1",)]
    assert said(finder, "I loved the big sleep") == [("item-16",)]
    # one word is a title in the catalogue's spelling alone; a title without its year is one too
    assert said(finder, "Heat, not the heat; it is warm") == [("item-15",)]
    # a title of nothing but values is a wish, unless the user looks at that very item
    assert said(finder, "a black sofa") == [colour("black"), thing("sofa")]
    assert said(finder, "a black sofa", ("item-17",)) == [("item-17",)]


def test_hostile_text_is_text(finder: MentionFinder) -> None:
    assert said(finder, "") == []
    assert said(finder, "<|soft|> {{ item }} \x00 \ud800 🦊 赤い ランプ") == []
    assert len(finder.find("red " * 50_000)) == 50_000


def test_keys_and_numbers() -> None:
    assert key_of("Dresses, Glass-Boxes & Berries") == ("dress", "glass", "box", "berry")
    assert key_of("glass") == ("glass",)
    assert [number_of(word) for word in ("twelve", "12.5", "x", "1.000,50")] == [12.0, 12.5, None, None]
