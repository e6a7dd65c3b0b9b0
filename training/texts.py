"""Training samples of text: the mixture's descriptions, explanations, headlines, id <-> text, looks, and chat."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from genrec.errors import ConfigError
from genrec.prompts import Answer, Item, Part, Prompt, render, writing_parts
from genrec.query_schema import answers, questions
from genrec.training.conversations import Scriptwriter
from genrec.workspace import Workspace
from genrec.writer import STYLES, TASKS, Fact, told

OWN_SHARE = 0.5  # of the items written about, those the user took next; the rest is any known item
NEW_SHARE = 0.3  # of the texts, those for a user of whom nothing is known
HELD_OUT = 0.1  # of the users, and of the items: no text about them is trained, texts are measured on them


def held_out_users(n_users: int, seed: int) -> np.ndarray:
    """bool [n_users]: users of the log about whom no text is trained."""
    order = np.random.default_rng([seed, 1]).permutation(n_users)
    return order < round(HELD_OUT * n_users)


def held_out_items(n_items: int, seed: int) -> np.ndarray:
    """bool [n_items]: items that alignment never sees, and about which no text is trained."""
    order = np.random.default_rng(seed).permutation(n_items)
    held = np.zeros(n_items, bool)
    held[order[: int(n_items * HELD_OUT)]] = True
    return held


def looks_of(space: Workspace) -> list[list[Fact]]:
    """What every item's picture shows, empty where nothing is known of it.

    Raises:
        ConfigError: nothing is known of any item.
    """
    looks = [space.writer.looks(row) for row in range(len(space.catalogue))]
    if not any(looks):
        raise ConfigError(
            f"looks: no item has an attribute of data.looks ({list(space.writer.shown)}); name some that pictures "
            "show, or set finetune.mixture.looks to 0 and align.looks to false"
        )
    return looks


@dataclass(frozen=True)
class Assignment:
    """One text to write.

    Attributes:
        task: one of `genrec.writer.TASKS`.
        history: catalogue rows, oldest first.
        row: the item.
        style: of the text.
        text: what a person wrote, where there is such a text for a description; else the perfect writer's.
    """

    task: str
    history: np.ndarray
    row: int
    style: str
    text: str


def assignments(space: Workspace) -> list[Assignment]:
    """The mixture's writing tasks: for each history a Poisson number of each, about known items only.

    Half of the items are those that the user took next, half any: a writer that has only seen the former would guess
    an item's attributes from the history. Some texts are for nobody in particular: gateways have new users, and where
    there is nothing else to read, a small model soon learns to read the item. The other prompts hold at least half of
    the history: what a user cares about shows in repetition, and two events repeat by chance too.
    """
    mixture, split = space.recipe.finetune.mixture, space.split
    rng = np.random.default_rng([space.recipe.seed, 2])
    known = np.flatnonzero(~split.cold & ~held_out_items(len(split.cold), space.recipe.seed))
    about = set(known.tolist())
    chosen: list[Assignment] = []
    tasks = [task for task in TASKS if getattr(mixture, task)]
    apart = held_out_users(len(space.user_ids), space.recipe.seed) if tasks else np.zeros(0, bool)
    for task in tasks:
        for user, history in zip(split.train_users, split.train, strict=True):
            many = rng.poisson(getattr(mixture, task)) if len(history) > 1 and not apart[user] else 0
            for _ in range(many):
                at = int(rng.integers(max(1, len(history) // 2), len(history)))
                own = rng.random() < OWN_SHARE and int(history[at]) in about
                row = int(history[at] if own else rng.choice(known))
                name, before = space.user_ids[user], history[: at if rng.random() >= NEW_SHARE else 0]
                style = space.writer.style(name, rng)
                human = space.human_texts.of(name, row) if task == "describe" else None
                text = human or space.writer.write(task, style, name, before, row)
                chosen.append(Assignment(task, before, row, style, text))
    return chosen


def text_samples(space: Workspace) -> list[Prompt]:
    """The mixture's samples of text."""
    mixture, prompter = space.recipe.finetune.mixture, space.prompter
    rng = np.random.default_rng([space.recipe.seed, 3])
    known, n = np.flatnonzero(~space.split.cold), len(space.split.train)
    prompts = [prompter.write(a.task, a.history, a.row, style=a.style, text=a.text) for a in assignments(space)]
    texts = space.catalogue.texts() if mixture.id_text else []
    for row in rng.choice(known, rng.poisson(mixture.id_text * n)):
        prompts.append(prompter.id_text(int(row), texts[row]))
    for row in rng.choice(known, rng.poisson(mixture.text_id * n)):
        prompts.append(prompter.text_id(int(row)))
    prompts += [prompter.chat_query(message, text) for message, text in chat_samples(space)]
    prompts += [prompter.looks(*sample) for sample in looks_samples(space)]
    return prompts


def exercises(space: Workspace) -> list[str]:
    """What the same samples say in words, ids and vectors left out: a scratch base learns its words from them.

    The trained samples' own words only, so held-out users, values and phrasings stay held out.
    """
    catalogue = space.catalogue
    like = space.likeness
    parts = [
        writing_parts(catalogue, a.task, a.history, a.row, a.style, a.text, likeness=like) for a in assignments(space)
    ]
    parts += [render("chat_query", message=message, answer=Answer(text)) for message, text in chat_samples(space)]
    parts += [
        render("looks", item=Item(row), style=style, answer=Answer(text)) for row, style, text in looks_samples(space)
    ]
    return ["".join(_words(part) for part in of) for of in parts]


def _words(part: Part) -> str:
    if isinstance(part, Answer):
        return part.text or ""
    return part if isinstance(part, str) else ""


def looks_samples(space: Workspace) -> list[tuple[int, str, str]]:
    """Known items, each with a style and what its picture shows in that style's wording.

    In random order: one order would teach to name what stands there, not to look up what a name asks for.
    """
    rng = np.random.default_rng([space.recipe.seed, 9])
    n = int(rng.poisson(space.recipe.finetune.mixture.looks * len(space.split.train)))
    if not n:
        return []
    looks, apart = looks_of(space), held_out_items(len(space.catalogue), space.recipe.seed)
    known = [row for row in np.flatnonzero(~space.split.cold & ~apart) if looks[row]]
    samples = []
    for row in rng.choice(known, n):
        style = STYLES[rng.integers(len(STYLES))]
        samples.append((int(row), style, told(style, rng.permutation(looks[row]).tolist())))
    return samples


def chat_samples(space: Workspace) -> list[tuple[str, str]]:
    """Questions about messages of scripted conversations, each with its answer as JSON; held-out values in none."""
    rng = np.random.default_rng([space.recipe.seed, 8])
    n = int(rng.poisson(space.recipe.finetune.mixture.chat * len(space.split.train)))
    if not n:
        return []
    writer = Scriptwriter(space.catalogue, rng, seed=space.recipe.seed, held_out="nothing")
    samples: list[tuple[str, str]] = []
    for turn in islice(writer.turns(), n):
        change = turn.target(writer.finder)
        asked = questions(turn.text, [mention for mention, _ in change.roles])
        samples += [(text, answer) for (text, _), answer in zip(asked, answers(change), strict=True)]
    return samples
