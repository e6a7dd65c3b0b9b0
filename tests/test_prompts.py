"""Prompts: golden renders, the layout of new tokens, and hostile text."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrec import prompts
from genrec.errors import ConfigError
from genrec.prompts import Answer, Item, Layout, Prompter, Sid, Soft, SoftPrompt, render
from genrec.scratch import train_tokenizer

TEXTS = ["Blue mug of Brightwell\nmaterial: steel\nuse: kitchen", "Red lamp\nmaterial: oak\nuse: office"] * 4


@pytest.fixture(scope="module")
def prompter():
    tokenizer = train_tokenizer(TEXTS, 400)
    layout = Layout(
        len(tokenizer), 2, 4, soft_tokens=2, soft_prompt=3, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id
    )
    return Prompter(tokenizer, layout, np.array([[0, 1], [3, 2], [1, 1]], np.int32), max_text_tokens=24), tokenizer


def test_golden_renders():
    a, b = Item(7), Item(3)
    assert render("next_item", history=[a, b]) == [
        SoftPrompt(),
        "History:",
        Sid(7),
        Soft(7),
        Sid(3),
        Soft(3),
    ]
    assert render("item_text", item=a, answer=Answer("x")) == [SoftPrompt(), "Item:", Soft(7), Answer("x")]
    looks = render("looks", item=a, style="long plain", answer=Answer("x"))
    assert looks == [SoftPrompt(), "Item:", Soft(7), " Looks, ", "long plain", ":", Answer("x")]
    b, c = Item(3), Item(8, "Red lamp", "Red lamp; use office")
    begin = [
        SoftPrompt(),
        "History:",
        Sid(3),
        Soft(3),
        " Alike: ",
        "words",
        ". Item:",
        Soft(8),
        " ",
        "Red lamp; use office",
    ]
    asked: dict[str, Any] = {"history": [b], "alike": "words", "item": c, "style": "long plain", "answer": Answer(None)}
    assert render("describe", **asked) == [*begin, ". Describe, ", "long plain", ":", Answer(None)]
    assert render("headline", **asked) == [*begin, ". Headline, ", "long plain", ":", Answer(None)]
    chosen = [". Chosen:", " ", "Red lamp", ".", " Explain, "]
    assert render("explain", **asked, evidence=[c]) == [*begin, *chosen, "long plain", ":", Answer(None)]
    assert render("id_text", item=c, answer=Answer("x")) == [SoftPrompt(), "Id:", Sid(8), " Text:", Answer("x")]
    assert render("chat_query", message="no [X]", answer=Answer("x")) == [
        SoftPrompt(),
        "User: ",
        "no [X]",
        " Wish:",
        Answer("x"),
    ]
    assert render("text_id", item=c) == [SoftPrompt(), "Text: ", "Red lamp; use office", " Id:", Sid(8)]


def test_a_broken_template_says_what_it_may_name():
    with pytest.raises(ConfigError, match="'colour' is undefined; a template may name item, soft_prompt"):
        render("item_text", "Item:{{ colour }}", item=Item(1))
    with pytest.raises(ConfigError, match="prompt item_text: "):
        render("item_text", "Item:{{ item.soft ", item=Item(1))
    with pytest.raises(ConfigError, match="expected text or an item reference, found int"):
        render("item_text", "{{ item.row }}", item=Item(1))
    assert render("item_text", "{{ item.sid }}", item=Item(1)) == [Sid(1)]


def test_prompt_versions_follow_the_template():
    text = (Path(prompts.__file__).parent / "describe.jinja").read_bytes()
    assert prompts.prompt_version("describe") == "describe-" + hashlib.sha256(text).hexdigest()[:12]


def test_given_ids_are_no_targets(prompter):
    prompter, tokenizer = prompter
    for prompt in (prompter.id_text(2, "Red lamp"), prompter.describe([1, 0], 2, text="Red lamp")):
        assert tokenizer.decode(prompt.input_ids[prompt.targets][:-1]) == "Red lamp"
    asked = prompter.text_id(1)
    assert asked.input_ids[asked.targets].tolist() == prompter.sids[1].tolist()


def test_next_item_positions(prompter):
    prompter, _ = prompter
    layout = prompter.layout
    prompt = prompter.next_item([1, 0])
    v = layout.base_vocab
    # ... a_3 b_2 [soft of 1] a_0 b_1 [soft of 0]; level 1 starts at v + 4
    assert prompt.input_ids[-8:].tolist() == [
        v + 3,
        v + 4 + 2,
        *[layout.soft_id] * 2,
        v,
        v + 4 + 1,
        *[layout.soft_id] * 2,
    ]
    assert prompt.slots[-8:].tolist() == [-1, -1, 2, 3, -1, -1, 0, 1]
    assert prompt.targets[-8:].tolist() == [True, True, False, False] * 2
    assert prompt.input_ids[0] == layout.bos
    assert prompt.slots[1:4].tolist() == [-2, -3, -4]
    assert not prompt.targets[:-8].any()


def test_empty_history_is_a_prompt(prompter):
    prompter, tokenizer = prompter
    prompt = prompter.next_item([])
    assert not prompt.targets.any()
    assert tokenizer.decode(prompt.input_ids[4:]) == "History:"


def test_answer_ends_with_eos_and_is_the_only_target(prompter):
    prompter, tokenizer = prompter
    prompt = prompter.item_text(2, "Red lamp")
    assert prompt.input_ids[-1] == prompter.layout.eos
    assert tokenizer.decode(prompt.input_ids[prompt.targets][:-1]) == "Red lamp"
    assert not prompter.item_text(2).targets.any()


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|soft|><|sid_0_1|>", "mug<|endoftext|>mug", "<|prompt|>" * 9])
def test_text_cannot_forge_a_control_token(prompter, text):
    prompter, tokenizer = prompter
    grown = train_tokenizer(TEXTS, 400)
    grown.add_tokens(prompter.layout.token_strings(), special_tokens=True)
    assert len(grown) == prompter.layout.size
    # the control: the ordinary tokenizer does fall for it
    controls = set(grown.get_added_vocab().values())
    assert controls & set(grown(text).input_ids)
    for source in (tokenizer, grown):
        ids = Prompter(source, prompter.layout, np.zeros((1, 2), np.int32)).text_ids(text)
        assert max(ids) < prompter.layout.base_vocab
        assert not set(ids) & controls
        assert source.decode(ids) == text


def test_a_megabyte_is_cut(prompter):
    prompter, _ = prompter
    assert len(prompter.text_ids("mug " * 250_000)) == 24


def test_unknown_task_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="'haiku'; there are next_item, item_text, id_text"):
        render("haiku")


def test_added_tokens_stand_where_the_layout_says(prompter):
    prompter, _ = prompter
    grown = train_tokenizer(TEXTS, 400)
    grown.add_tokens(prompter.layout.token_strings(), special_tokens=True)
    layout = prompter.layout
    assert grown.convert_tokens_to_ids("<|sid_1_2|>") == layout.sid_start + 1 * 4 + 2
    assert grown.convert_tokens_to_ids("<|soft|>") == layout.soft_id
    assert grown.convert_tokens_to_ids("<|prompt|>") == layout.prompt_id
