"""Names that lead back to their item, and titles found in text that somebody else wrote."""

import dataclasses

import numpy as np
import pytest

from genrec.item_names import ItemNames, one_line
from tests.export_fixture import make_catalogue


def names_of(*titles: str) -> ItemNames:
    catalogue = make_catalogue(len(titles), np.random.default_rng(0))
    return ItemNames(dataclasses.replace(catalogue, titles=list(titles)))


HOSTILE = (
    "Lamp",
    "Lamp",
    "Lamp (2)",
    "",
    " ",
    "Lamp\n2. Chair",
    "Chair",
    "Desk — the best",
    "a\u202eb\u0000c\u2028d",
    "x" * 300,
    "x" * 299,
    "1. Chair",
    "红灯",
    "Стул 🙂",
    "🙂🙂",
    "<|sid_0_1|>",
)


def test_every_name_is_its_own_and_leads_back() -> None:
    names = names_of(*HOSTILE)
    found = [names.of(row) for row in range(len(HOSTILE))]
    assert len(set(found)) == len(found)
    assert found[:5] == ["Lamp", "Lamp (2)", "Lamp (2) (2)", "this item", "this item (2)"]
    assert all(len(name.splitlines()) == 1 and len(name) < 100 for name in found)
    lines = ["These fit:", *(f"{n}. {name} — because of “1. Chair”" for n, name in enumerate(found, 1))]
    assert names.listed("\n".join(lines)) == list(range(len(HOSTILE)))
    assert names.listed("\n".join(f"{n}. {name}" for n, name in enumerate(found, 1))) == list(range(len(HOSTILE)))


def test_ids_and_loose_names_lead_nowhere() -> None:
    names = names_of("Lamp", "Chair")
    for line in (
        "1. item-0",
        "2. <|sid_0_1|>",
        "Chair",
        "* Chair",
        "1.Chair",
        "1. chair",
        "1. Chair yes",
        "9999. Lamp",
    ):
        assert names.listed(line) == []
    assert names.listed("1. Chair — item-0") == [1]


@pytest.mark.parametrize(
    ("text", "known", "strangers"),
    [
        ("You chose Red Lamp 1.", [0], []),
        ("You chose Red Lamp 11.", [0], ["red lamp 11"]),  # the longest title counts
        ("You chose Red Lamp 1.", [1], ["red lamp 1"]),
        ("Take RED   lamp: 11!", [], ["red lamp 11"]),
        ("ｒｅｄ ｌａｍｐ １１", [], ["red lamp 11"]),
        ("red\u200b lamp\u202e 11", [], ["red lamp 11"]),
        ("Tired lamp 11", [], []),  # within a word
        ("It is good. It fits.", [], ["it", "it"]),
        ("is it good?", [], []),  # a title of one word counts as it is spelled
        ("我要红灯吗", [], ["红灯"]),
        ("🙂🙂!", [], ["🙂🙂"]),
        ("Star Wars Episode IV", [], ["star wars episode iv"]),
        ("star wars: episode iv and it", [6], []),
        ("", [], []),
    ],
)
def test_strangers(text: str, known: list[int], strangers: list[str]) -> None:
    names = names_of("Red Lamp 1", "Red Lamp 11", "It", "红灯", "🙂🙂", "", "Star Wars: Episode IV")
    assert names.strangers(text, known) == strangers


def test_one_line() -> None:
    assert one_line(" a\n\n2. b\t\u202ec — d\x00\x85e ") == "a 2. b c - d e"
