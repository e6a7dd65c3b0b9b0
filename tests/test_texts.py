"""Training samples of text and their measures, on a tiny run."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from genrec.chat_quality import measure_chat
from genrec.chat_replies import FITS, STRANGERS, judge_replies
from genrec.config import resolve_recipe
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.query import Query
from genrec.recommender import Recommender
from genrec.scratch import train_tokenizer
from genrec.serving.chat import ChatItem, ChatReply
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.text_quality import distinct, measure, swap_pairs, swap_values
from genrec.text_subjects import subjects
from genrec.training.conversations import Scriptwriter
from genrec.training.texts import (
    assignments,
    chat_samples,
    exercises,
    held_out_items,
    held_out_users,
    looks_of,
    looks_samples,
    text_samples,
)
from genrec.writer import PICTURE_ONLY, STYLES, VALUES, Writer, told
from tests.conftest import tiny_recipe

MIXTURE = {
    "describe": 1.0,
    "explain": 0.5,
    "headline": 0.5,
    "id_text": 0.2,
    "text_id": 0.2,
    "looks": 0.2,
    "chat": 0.5,
}


@pytest.fixture(scope="module")
def writing(tmp_path_factory) -> Run:
    """A tiny run whose mixture holds every task, trained for one epoch and exported."""
    recipe = tiny_recipe(
        data={"synthetic": {"n_items": 60, "n_users": 300}},
        finetune={"epochs": 0.2, "evals": 1, "mixture": MIXTURE},
    )
    run = Run.create(resolve_recipe(recipe), tmp_path_factory.mktemp("writing"))
    run.through_training()
    run.export()
    return run


def test_samples_follow_the_mixture_and_leave_users_out(writing: Run) -> None:
    space = writing.space
    prompts = text_samples(space)
    n = len(space.split.train)
    chat = chat_samples(space)
    expected = 0.9 * n * (1.0 + 0.5 + 0.5) + n * 0.6 + len(chat)
    assert abs(len(prompts) - expected) < 4 * expected**0.5
    apart = held_out_users(len(space.user_ids), space.recipe.seed)
    assert apart.sum() == 30
    texts = [space.tokenizer.decode(p.input_ids[p.targets][:-1]) for p in prompts]
    assert any(text.startswith("You chose ") for text in texts)
    assert sum(text[:1] == text[-1:] == '"' for text in texts) == len(chat)
    assert 2 * 0.5 * n < len(chat) < 5 * 0.5 * n
    assert all(p.targets.any() for p in prompts)
    # no sample is about an item that the log never names
    cold = set(np.flatnonzero(space.split.cold).tolist())
    soft = space.layout.soft_tokens
    assert cold.isdisjoint({int(slot) // soft for p in prompts for slot in p.slots if slot >= 0})


def test_looks_name_what_the_picture_shows_and_leave_items_out(writing: Run) -> None:
    space = writing.space
    found = looks_samples(space)
    n = 0.2 * len(space.split.train)
    assert abs(len(found) - n) < 4 * n**0.5
    apart, truth = held_out_items(len(space.catalogue), space.recipe.seed), space.writer.truth
    assert apart.sum() == 6
    assert truth is not None
    assert not any(apart[row] or space.split.cold[row] for row, *_ in found)
    first = set()
    for row, style, text in found:
        planted = [(name, VALUES[name][truth.attributes[name][row]]) for name in PICTURE_ONLY]
        orders = [told(style, order) for order in itertools.permutations(planted)]
        assert text in orders
        first.add((style, orders.index(text) // 2))
    assert {style for style, _ in first} == set(STYLES)
    assert {place for _, place in first} == {0, 1, 2}  # every name comes first somewhere
    row, style, text = found[0]
    prompt = space.prompter.looks(row, style, text)
    assert space.tokenizer.decode(prompt.input_ids[prompt.targets][:-1]) == text
    assert {int(slot) // space.layout.soft_tokens for slot in prompt.slots if slot >= 0} == {row}
    written = assignments(space)
    assert not any(apart[a.row] for a in written)
    lengths = {len(a.history) for a in written}
    assert 0 in lengths
    assert min(lengths - {0}) >= 2  # half of the shortest training history, 4 events


def test_looks_of_a_catalogue_are_the_attributes_that_the_recipe_names(writing: Run) -> None:
    catalogue = writing.space.catalogue
    writer = Writer(catalogue, shown=["use", "colour"])
    assert writer.looks(3) == [("use", catalogue.attributes[3]["use"])]
    assert Writer(catalogue).looks(3) == []


def test_looks_of_nothing_are_refused(prepared: Run) -> None:
    recipe = resolve_recipe(tiny_recipe(align={"looks": True}))
    space = dataclasses.replace(prepared.space, recipe=recipe)
    space.__dict__["writer"] = Writer(space.catalogue, shown=["hue"])
    with pytest.raises(ConfigError, match=r"no item has an attribute of data.looks \(\['hue'\]\)"):
        looks_of(space)


def test_a_scratch_base_learns_the_words_of_its_tasks(writing: Run) -> None:
    said = exercises(writing.space)
    assert any("Describe, long plain:This is " in text and "Its " in text for text in said)
    assert any(text.startswith("User: ") and "[X]" in text and text.endswith('"') for text in said)
    assert not any("<|" in text for text in said)  # ids and vectors are left out
    plain = train_tokenizer(writing.space.catalogue.texts(), writing.recipe.backbone.scratch.vocab)  # the control
    tokens = [sum(len(of(text).input_ids) for text in said) for of in (writing.space.tokenizer, plain)]
    assert tokens[0] < 0.8 * tokens[1]


def test_no_mixture_no_samples(prepared: Run) -> None:
    assert text_samples(prepared.space) == []
    assert exercises(prepared.space) == []


def test_measures_have_controls_and_examples(writing: Run) -> None:
    result = measure(writing, "describe", 25)
    metrics = result["metrics"]
    assert result["texts"] == 25
    # this model has learned next to nothing: a checker that finds its babble true would be none
    assert "faithful mentions" not in metrics or metrics["faithful mentions"]["mean"] < 0.9
    assert ("faithful mentions" in metrics) == (metrics["mentions"]["mean"] > 0)
    assert metrics["equal to the reference"]["mean"] < 0.5
    assert 0 <= metrics["personal, item-only writer"]["mean"] < 0.2
    assert metrics["log perplexity"]["mean"] > 0
    assert {"user", "item", "style", "text", "reference"} == set(result["examples"][0])
    assert result["human_examples"] == []
    assert "rouge-l" not in metrics  # nobody wrote about these items
    kept = json.loads((writing.folder / "texts" / "describe" / "texts.json").read_text())
    assert kept == result
    with np.load(writing.folder / "texts" / "describe" / "values.npz") as values:
        assert len(values["personal"]) == 25


def test_understanding_is_measured_beside_its_controls(writing: Run, prepared: Run) -> None:
    result = measure_chat(writing, 40)
    metrics = {name: value["mean"] for name, value in result["metrics"].items()}
    for name in ("held-out values", "held-out values and phrasings"):
        # nothing was learned in this time, and what the mentions alone allow is next to everything
        assert metrics[name] < 0.5
        assert metrics[f"{name}, roles dealt at random"] < 0.5
        assert metrics[f"{name}, majority rule"] < 0.6
        assert metrics[f"{name}, right roles"] > 0.95
    assert metrics[FITS] == 1
    assert metrics[STRANGERS] == 0
    assert {"messages", "query", "expected"} == set(result["examples"][0])
    assert json.loads((writing.folder / "texts" / "chat" / "texts.json").read_text()) == result
    with np.load(writing.folder / "texts" / "chat" / "values.npz") as values:
        assert values["held-out values"].mean() == metrics["held-out values"]
    with pytest.raises(ConfigError, match=r"set finetune\.mixture\.chat above 0"):
        measure_chat(prepared)


def test_replies_that_break_their_promise_are_found_out(writing: Run) -> None:
    """Items that no filter chose, and a text that names one more: the judge has nothing to do with what makes them."""
    export = Export.load(writing.folder / "export")
    catalogue, rng = export.catalogue, np.random.default_rng(0)
    scripts = [Scriptwriter(catalogue, rng, seed=0, held_out="values").conversation() for _ in range(60)]
    named: list[tuple[Query, int]] = []

    class Careless(Recommender):
        def chat(self, messages, history=(), *, understand=None):
            query = scripts[len(named)][-1].query
            first, other = rng.choice(len(catalogue), 2, replace=False)
            named.append((query, first))
            item = ChatItem(first, catalogue.item_ids[first], catalogue.titles[first], 0.0, "", False)
            text = f"These fit:\n1. {item.title} - or {catalogue.titles[other].upper()}?"
            return ChatReply(text, "stop", [item], query, [])

    found = judge_replies(Careless(export, TorchEngine(export)), scripts, [[] for _ in scripts])
    expected = [float(query.allowed(catalogue)[row]) for query, row in named]
    assert found[FITS].tolist() == expected
    assert 0 < found[FITS].mean() < 1
    assert (found[STRANGERS] == 1).mean() > 0.9  # a liked item may happen to be the other one


def test_subjects_were_never_written_about(writing: Run) -> None:
    space = writing.space
    apart = held_out_users(len(space.user_ids), space.recipe.seed)
    chosen = subjects(space, 25, 0)
    assert all(apart[space.user_ids.index(s.user)] for s in chosen)
    assert all(s.row not in s.history for s in chosen)


def test_perfect_texts_swap_and_deaf_ones_do_not(writing: Run) -> None:
    writer, chosen = writing.space.writer, subjects(writing.space, 30, 0)
    pairs = swap_pairs(writer, "describe", chosen)
    assert len(pairs) > 5
    perfect = [writer.write("describe", o.style, o.user, o.history, o.row) for _, o in pairs]
    deaf = [writer.write("describe", s.style, s.user, s.history, s.row) for s, _ in pairs]
    assert swap_values(writer, "describe", pairs, perfect).mean() == 1
    assert swap_values(writer, "describe", pairs, deaf).mean() == 0


def test_what_was_not_trained_is_not_measured(writing: Run, prepared: Run) -> None:
    with pytest.raises(ConfigError, match=r"set finetune\.mixture\.describe above 0"):
        measure(prepared, "describe")
    with pytest.raises(ConfigError, match="no task 'haiku' to evaluate; there are describe, explain, headline"):
        measure(writing, "haiku")


def test_distinct_counts_ngrams() -> None:
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct([], 1) == 0
