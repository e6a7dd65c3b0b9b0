"""The perfect writer: what it says, for whom, and that it says only what is true."""

import itertools

import numpy as np
import pytest

from genrec.catalog import read_catalogue
from genrec.config import Synthetic
from genrec.errors import ConfigError
from genrec.faithful import Checker, Mention
from genrec.reader import chance_of_right, overlap
from genrec.synthetic import KINDS, Truth, make_synthetic
from genrec.synthetic_pictures import COLOURS
from genrec.writer import STYLES, TASKS, Brief, Writer, compose, evidence_of, style_of
from tests.export_fixture import make_catalogue


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Writer:
    folder = tmp_path_factory.mktemp("planted")
    truth = make_synthetic(Synthetic(n_items=60, n_users=90), 3, folder)
    items = read_catalogue(folder / "items.jsonl", {}, max_bad_share=0, max_text_chars=1000, max_pixels=10_000)[0]
    return Writer(items, truth)


@pytest.fixture(scope="module")
def plain() -> Writer:
    """A catalogue without a known truth: item i is COLOURS[i % 5] THINGS[i % 4]."""
    return Writer(make_catalogue(40, np.random.default_rng(0)))


BRIEF = Brief("Red lamp", [("colour", "red"), ("use", "office"), ("brand", "Kestrel")], ["Blue mug", "Oak tray"])


@pytest.mark.parametrize(
    ("task", "style", "text"),
    [
        ("describe", "short plain", "Red lamp with colour red and use office."),
        ("describe", "long plain", "This is Red lamp. Its colour is red. Its use is office. Its brand is Kestrel."),
        ("describe", "short playful", "Hey, colour red and use office! Meet Red lamp!"),
        (
            "describe",
            "long playful",
            "Look, colour red! Look, use office! Look, brand Kestrel! Say hello to Red lamp!",
        ),
        ("explain", "short plain", "You chose Blue mug. Red lamp goes with colour red."),
        ("explain", "long playful", "Remember Blue mug and Oak tray? Meet Red lamp: colour red and use office!"),
        ("headline", "short plain", "Red lamp, colour red"),
        ("headline", "long playful", "Hey, colour red and use office! Red lamp!"),
    ],
)
def test_golden_texts(task: str, style: str, text: str) -> None:
    assert compose(task, style, BRIEF) == text


def test_nothing_to_say_is_still_a_sentence() -> None:
    for task, style in itertools.product(TASKS, STYLES):
        text = compose(task, style, Brief("Red lamp", [], []))
        assert "Red lamp" in text
        assert "  " not in text
    with pytest.raises(ConfigError, match="no text 'poem' in style 'short plain'"):
        compose("poem", "short plain", BRIEF)


def test_planted_texts_are_true_and_begin_with_what_the_user_cares_about(planted: Writer) -> None:
    checker, truth = Checker(planted), planted.truth
    assert truth is not None
    first = {"picture": "colour", "text": "brand", "order": "category"}
    for user in range(0, 90, 7):
        name = truth.user_ids[user]
        for task, style, row in itertools.product(TASKS, STYLES, (0, 17)):
            text = planted.write(task, style, name, [3, 4, 5], row)
            found = checker.mentions(text, row, [3, 4, 5])
            assert all(m.true for m in found), (text, found)
            assert next(m.attribute for m in found if m.attribute) == first[KINDS[truth.kinds[user]]]


def test_styles_are_planted_evenly() -> None:
    counts = np.unique([style_of(f"user-{i:06d}") for i in range(2000)], return_counts=True)[1]
    assert len(counts) == len(STYLES)
    assert counts.min() > 400


def test_shared_values_come_first_without_a_truth(plain: Writer) -> None:
    # items 1, 6, 11 are green chair, green table, green sofa; 21 is a green chair
    assert plain.brief("u", [1, 6, 11], 21).facts[0][0] == "colour"
    assert plain.cares("u", [1, 6, 11], 21)[0] == "colour"
    # 1, 5, 9 are chairs of three colours
    assert plain.brief("u", [1, 5, 9], 21).facts[0] == ("category", "chair")
    assert plain.cares("u", [], 21) == []


def test_evidence_shares_most_and_is_newest(plain: Writer) -> None:
    catalogue = plain.catalogue
    assert evidence_of(catalogue, [2, 1, 5], 21)[0] == 1  # a green chair, as 21 is
    assert evidence_of(catalogue, [1, 2, 21, 2], 21)[:2] == [21, 1]
    assert evidence_of(catalogue, [1, 21], 21) == [21, 1]  # equal but for the age
    assert evidence_of(catalogue, [], 21) == []


def test_a_wrong_value_name_number_or_title_is_found(planted: Writer) -> None:
    checker, truth = Checker(planted), planted.truth
    assert truth is not None
    row = 0
    title = planted.catalogue.titles[row]
    colour = COLOURS[truth.attributes["colour"][row]]
    wrong = next(c for c in COLOURS if c != colour)
    other = next(t for t in planted.catalogue.titles if t != title)
    text = f"Its colour is {wrong}. {title}, {other}, Glimmerbrand, 17 pieces. Its colour is {colour}."
    false = [m for m in checker.mentions(text, row) if not m.true]
    assert Mention("value", wrong, "colour", False) in false
    assert Mention("item", other.lower(), None, False) in false
    assert Mention("name", "glimmerbrand", None, False) in false
    assert Mention("number", "17", None, False) in false
    assert Mention("value", colour, "colour", True) in checker.mentions(text, row)
    # a title of the history is no lie where the text may name it
    assert all(m.true for m in checker.mentions(other, row, [planted.catalogue.titles.index(other)]))


def test_names_inside_sentences_without_a_truth(plain: Writer) -> None:
    checker = Checker(plain)
    false = [m for m in checker.mentions("A lovely green chair. Made by Zorblatt for you.", 1) if not m.true]
    assert false == [Mention("name", "zorblatt", None, False)]
    assert [m.text for m in checker.mentions("Its colour is red.", 1) if not m.true] == ["red"]


def test_mixed_scripts_and_emoji_do_not_break_the_checker(plain: Writer) -> None:
    assert Checker(plain).mentions("绿色 椅子 🪑 стул — كرسي \u202e", 1) == []
    assert Checker(plain).mentions("", 1) == []


def test_the_reader_is_right_by_chance_when_texts_are_the_same() -> None:
    assert chance_of_right("Red lamp", ["Blue mug"] * 20, 7) == pytest.approx(1 / 20)
    assert chance_of_right("Red lamp!", ["Blue mug", "Red lamp"], 1) == 1
    assert chance_of_right("Red lamp!", ["Blue mug", "Red lamp"], 0) == 0
    assert overlap("a b c", "a b c") == 1
    # pairs: (^a)(ab)(b$) and (^a)(ac)(c$): one of three in common
    assert overlap("a b", "a c") == pytest.approx(1 / 3)


def test_perfect_texts_are_read_right_and_item_only_texts_by_chance(planted: Writer) -> None:
    truth = planted.truth
    assert isinstance(truth, Truth)
    users = truth.user_ids[:20]
    own, blind = [], []
    for i, row in itertools.product(range(20), range(0, 60, 6)):
        references = [planted.write("describe", style_of(u), u, [1, 2], row) for u in users]
        own.append(chance_of_right(references[i], references, i))
        blind.append(chance_of_right(planted.write("describe", STYLES[0], users[0], [], row), references, i))
    assert np.mean(own) > 5 / 20
    assert np.mean(blind) == pytest.approx(1 / 20)
