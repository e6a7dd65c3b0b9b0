"""Whole replies of the chat on scripted conversations: do the items fit the wishes, are others mentioned?

Judged from the catalogue's own fields, by none of the code that makes lists and replies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from genrec.catalog import Catalogue
from genrec.query import Query
from genrec.recommender import Recommender
from genrec.training.conversations import Turn

FITS, STRANGERS = "returned items that fit", "items mentioned outside the list"


def judge_replies(
    recommender: Recommender, scripts: Sequence[Sequence[Turn]], histories: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Hold each conversation up to its last message, the assistant's lists between, and judge the reply to that.

    Args:
        recommender: with a model that was trained for conversations.
        scripts: the conversations.
        histories: item ids of the user of each.

    Returns:
        `FITS`: float64 [items], 1 where an item satisfies the query that the reply says it answers; `STRANGERS`:
        float64 [conversations], titles in the reply of items that are neither in its list nor known from the user.
    """
    catalogue = recommender.export.catalogue
    titles = {title.casefold() for title in catalogue.titles if title.strip()}
    longest_first = sorted(titles, key=len, reverse=True)
    title = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")
    fits, strangers = [], []
    for script, history in zip(scripts, histories, strict=True):
        messages = []
        for turn in script:
            if turn.shown:
                lines = (f"{n}. {catalogue.titles[catalogue.index[item]]}" for n, item in enumerate(turn.shown, 1))
                messages.append({"role": "assistant", "content": "\n".join(["These fit:", *lines])})
            messages.append({"role": "user", "content": turn.text})
        reply = recommender.chat(messages, history)
        fits += [float(satisfies(catalogue, item.item_id, reply.query)) for item in reply.items]
        known = {*(item.item_id for item in reply.items), *history, *reply.query.liked}
        named = {catalogue.titles[catalogue.index[item]].casefold() for item in known}
        strangers.append(float(len(set(title.findall(reply.text.casefold())) - named)))
    return {FITS: np.array(fits), STRANGERS: np.array(strangers)}


def satisfies(catalogue: Catalogue, item: str, query: Query) -> bool:
    """Whether an item may be listed, read off its fields one wish at a time."""
    row = catalogue.index[item]
    facts = {*catalogue.attributes[row].items(), *(("category", name) for name in catalogue.categories[row])}
    wanted: dict[str, set[str]] = {}
    for fact in query.wanted:
        wanted.setdefault(fact.name, set()).add(fact.value)
    price = catalogue.prices[row]
    return (
        bool(catalogue.available[row])
        and item not in {*query.liked, *query.disliked}
        and all(any((name, value) in facts for value in values) for name, values in wanted.items())
        and not any((fact.name, fact.value) in facts for fact in query.unwanted)
        and (query.price_min is None or price >= query.price_min)
        and (query.price_max is None or price <= query.price_max)
    )
