"""Scripted conversations: what they mean against what is found in them, and what is kept from training."""

import dataclasses
from itertools import islice, pairwise

import numpy as np
import pytest

from genrec.catalog import Catalogue, read_catalogue
from genrec.chat_quality import commonest_roles, dealt, queries, same
from genrec.config import Synthetic
from genrec.errors import DataError
from genrec.query import Fact, Query
from genrec.query_schema import Change, answers, question, read_change
from genrec.query_turns import split_message
from genrec.synthetic import make_synthetic
from genrec.training import phrases
from genrec.training.conversations import BEGIN, FOLLOW, Scriptwriter, split_values
from genrec.training.surfaces import SLOT

SLOTS = {
    "want",
    "also",
    "avoid",
    "drop",
    "max",
    "min",
    "count",
    "like",
    "dislike",
    "cheaper",
    "dearer",
    "value",
    "number",
}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("shop")
    make_synthetic(Synthetic(n_items=120, n_users=10), 0, folder)
    return read_catalogue(folder / "items.jsonl", {}, max_bad_share=0, max_text_chars=1000, max_pixels=10**6)[0]


def scripts(catalogue: Catalogue, held_out: str, n: int, seed: int = 0) -> tuple[Scriptwriter, list]:
    writer = Scriptwriter(catalogue, np.random.default_rng(seed), seed=0, held_out=held_out)
    return writer, [writer.conversation() for _ in range(n)]


@pytest.mark.parametrize("held_out", ["nothing", "values", "phrasings"])
def test_the_right_roles_of_what_is_found_give_the_true_query(catalogue: Catalogue, held_out: str) -> None:
    """The mentions are found from the words alone; the truth comes from what the script meant."""
    writer, made = scripts(catalogue, held_out, 150)
    changes = [turn.target(writer.finder) for script in made for turn in script]
    found = queries(made, changes, catalogue)
    right = [same(query, script[-1].query) for query, script in zip(found, made, strict=True)]
    assert np.mean(right) > 0.98
    wrong = queries(made, dealt(changes, np.random.default_rng(0)), catalogue)
    assert np.mean([same(query, script[-1].query) for query, script in zip(wrong, made, strict=True)]) < 0.4


def test_messages_are_one_piece_and_their_changes_survive_writing(catalogue: Catalogue) -> None:
    writer, made = scripts(catalogue, "nothing", 60)
    for turn in (turn for script in made for turn in script):
        assert split_message(turn.text) == [turn.text]
        change = turn.target(writer.finder)
        mentions = [mention for mention, _ in change.roles]
        assert read_change(answers(change), mentions) == change
        assert question(turn.text, mentions).count("[]") == len(mentions)


def test_shown_items_satisfy_the_query_and_some_wishes_are_impossible(catalogue: Catalogue) -> None:
    _, made = scripts(catalogue, "nothing", 150)
    new = 0
    for script in made:
        for before, turn in pairwise(script):
            allowed = before.query.allowed(catalogue)
            if turn.shown != before.shown:
                new += 1
                assert allowed[[catalogue.index[item] for item in turn.shown]].all()
                assert len(turn.shown) == min(before.query.count, allowed.sum())
            assert allowed.any() or turn.shown == before.shown
    assert new > 50
    impossible = np.mean([not script[-1].query.allowed(catalogue).any() for script in made])
    assert 0.05 < impossible < 0.8
    assert 0.2 < np.mean([len(script) > 2 for script in made]) < 0.9


def test_every_act_happens_and_every_phrasing_has_known_slots(catalogue: Catalogue) -> None:
    _, made = scripts(catalogue, "nothing", 400)
    assert {act for script in made for turn in script for act in turn.acts} == BEGIN.keys() | FOLLOW.keys()
    assert phrases.TRAINED.keys() == phrases.HELD_OUT.keys() == BEGIN.keys() | FOLLOW.keys()
    for act, trained in phrases.TRAINED.items():
        kept = phrases.HELD_OUT[act]
        assert not set(trained) & set(kept)
        assert {match[1] for pattern in (*trained, *kept) for match in SLOT.finditer(pattern)} <= SLOTS


def test_held_out_values_are_in_no_training_message(catalogue: Catalogue) -> None:
    writer = Scriptwriter(catalogue, np.random.default_rng(1), seed=0, held_out="nothing")
    trained, apart = split_values(writer.finder, 0)
    assert not trained & apart
    assert {fact.name for fact in apart} == {"brand", "material", "use", "category"}
    assert 0.15 < len(apart) / len(trained | apart) < 0.35
    assert (trained, apart) == split_values(writer.finder, 0)
    assert apart != split_values(writer.finder, 1)[1]
    meant = [slot.means.fact for turn in islice(writer.turns(), 500) for slot in turn.slots]
    assert not apart & set(filter(None, meant))
    _, held = scripts(catalogue, "values", 100)
    named = {s.means.fact for script in held for turn in script for s in turn.slots if s.means.kind == "value"}
    assert named <= apart
    assert len(named) > len(apart) / 2


def test_the_same_seed_writes_the_same_script(catalogue: Catalogue) -> None:
    assert scripts(catalogue, "values", 5)[1] == scripts(catalogue, "values", 5)[1]
    assert scripts(catalogue, "values", 5)[1] != scripts(catalogue, "values", 5, seed=1)[1]


def test_a_catalogue_without_values_has_nothing_to_talk_about(catalogue: Catalogue) -> None:
    bare = dataclasses.replace(catalogue, attributes=[{}] * 120, categories=[[]] * 120)
    with pytest.raises(DataError, match="there is nothing to talk about"):
        Scriptwriter(bare, np.random.default_rng(0), seed=0, held_out="nothing")


def test_the_order_of_wishes_does_not_matter_and_all_else_does() -> None:
    red, oak = Fact(name="colour", value="red"), Fact(name="material", value="oak")
    assert same(Query(wanted=[red, oak], liked=["a", "b"]), Query(wanted=[oak, red], liked=["b", "a"]))
    assert not same(Query(wanted=[red]), Query(unwanted=[red]))
    assert not same(Query(price_max=5), Query(price_max=5.01))
    assert not same(Query(), Query(count=4))


def test_dealing_keeps_the_hands_and_the_rule_takes_the_commonest(catalogue: Catalogue) -> None:
    writer, made = scripts(catalogue, "nothing", 40)
    changes = [turn.target(writer.finder) for script in made for turn in script]
    mixed = dealt(changes, np.random.default_rng(0))

    def all_roles(of: list[Change]) -> list[str]:
        return sorted(role for change in of for _, role in change.roles)

    assert all_roles(mixed) == all_roles(changes)
    assert sorted(c.whole for c in mixed) == sorted(c.whole for c in changes)
    assert mixed != changes
    assert commonest_roles(changes)[("want", "also", "avoid", "drop", "none")] == "want"
