"""Training samples of text: the mixture's share of descriptions, explanations, headlines, id <-> text, and chat."""

from __future__ import annotations

from itertools import islice

import numpy as np

from genrec.prompts import Prompt
from genrec.query_schema import answers, questions
from genrec.training.conversations import Scriptwriter
from genrec.workspace import Workspace
from genrec.writer import TASKS

OWN_SHARE = 0.5  # of the items written about, those the user took next; the rest is any known item
NEW_SHARE = 0.3  # of the texts, those for a user of whom nothing is known
HELD_OUT = 0.1  # of the users, whose texts are never trained: texts are measured on them


def held_out_users(n_users: int, seed: int) -> np.ndarray:
    """bool [n_users]: users of the log about whom no text is trained."""
    order = np.random.default_rng([seed, 1]).permutation(n_users)
    return order < round(HELD_OUT * n_users)


def text_samples(space: Workspace) -> list[Prompt]:
    """The mixture's samples: for each history a Poisson number of each kind, about known items only.

    Half of the items are those that the user took next, half any: a writer that has only seen the former would guess
    an item's attributes from the history. Some texts are for nobody in particular: gateways have new users, and where
    there is nothing else to read, a small model soon learns to read the item.
    """
    mixture, split, prompter = space.recipe.finetune.mixture, space.split, space.prompter
    rng = np.random.default_rng([space.recipe.seed, 2])
    known = np.flatnonzero(~split.cold)
    prompts: list[Prompt] = []
    writer, user_ids = space.writer, space.user_ids
    apart = held_out_users(len(user_ids), space.recipe.seed)
    for task in TASKS:
        weight = getattr(mixture, task)
        for user, history in zip(split.train_users, split.train, strict=True) if weight else ():
            for _ in range(rng.poisson(weight) if len(history) > 1 and not apart[user] else 0):
                at = int(rng.integers(1, len(history)))
                row = int(history[at] if rng.random() < OWN_SHARE else rng.choice(known))
                name, before = user_ids[user], history[: at if rng.random() >= NEW_SHARE else 0]
                style = writer.style(name, rng)
                text = writer.write(task, style, name, before, row)
                prompts.append(prompter.write(task, before, row, style=style, text=text))
    texts = space.catalogue.texts() if mixture.id_text else []
    for row in rng.choice(known, rng.poisson(mixture.id_text * len(split.train))):
        prompts.append(prompter.id_text(int(row), texts[row]))
    for row in rng.choice(known, rng.poisson(mixture.text_id * len(split.train))):
        prompts.append(prompter.text_id(int(row)))
    prompts += [prompter.chat_query(message, text) for message, text in chat_samples(space)]
    return prompts


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
