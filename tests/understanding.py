"""Understanding by rules, for the catalogue of `tests.export_fixture`: what the language model's is put in place of.

Colours and things are wanted, "not X" is not; "under N", "over N", "N items"; "like the second", "hate the first"; a
wish stands until "forget it". Only the user's own words count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from genrec.query import Fact, Query
from genrec.serving.chat import Message
from genrec.serving.engine import Engine
from genrec.serving.export import Export

ORDINALS = {"first": 0, "second": 1, "third": 2}


def understand(engine: Engine, export: Export, messages: Sequence[Message], shown: Sequence[Sequence[str]]) -> Query:
    """See the module."""
    facts = {value: ("colour", value) for of in export.catalogue.attributes for value in of.values()}
    facts |= {name: ("category", name) for name in export.catalogue.rows_of_category}
    found: dict = {}
    last: Sequence[str] = []
    for message, listed in zip(messages, shown, strict=True):
        last = listed or last
        if message["role"] != "user":
            continue
        text = message["content"].lower()
        if "forget it" in text:
            found = {}
        for no, word in re.findall(r"(not )?\b([a-z]+)\b", text):
            if word in facts:
                name, value = facts[word]
                field, other = ("unwanted", "wanted") if no else ("wanted", "unwanted")
                found.setdefault(field, {})[value] = Fact(name=name, value=value)
                found.get(other, {}).pop(value, None)
        for pattern, field in ((r"under (\d+)", "price_max"), (r"over (\d+)", "price_min")):
            if price := re.findall(pattern, text):
                found[field] = float(price[-1])
        if count := re.findall(r"(\d+) items", text):
            found["count"] = max(1, min(20, int(count[-1])))
        for verb, field in (("like", "liked"), ("hate", "disliked")):
            places = [ORDINALS[word] for word in re.findall(rf"{verb} the (first|second|third)", text)]
            found.setdefault(field, []).extend(last[place] for place in places if place < len(last))
    lists = {field: list(found.get(field, {}).values()) for field in ("wanted", "unwanted")}
    return Query(**{**found, **lists})
