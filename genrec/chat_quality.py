"""genrec evaluate --task chat: how often the query of a scripted conversation is exactly right, on any catalogue.

Conversations name values that no training sample named, once in trained phrasings and once in others. Beside each
figure stand the controls that must lose it: a rule that gives every mention the commonest role of its kind, and the
model's own roles dealt out among the mentions at random; and the ceiling, the right role for every mention found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artefacts import key_at, run_stage, write_json
from genrec.catalog import Catalogue
from genrec.chat_replies import judge_replies
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.query import Query
from genrec.query_change import apply_change
from genrec.query_schema import Change, Role, question, roles_of
from genrec.query_turns import Piece
from genrec.recommender import Recommender
from genrec.serving.engine import Engine
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.understand import read_pieces
from genrec.text_quality import interval
from genrec.training.conversations import Scriptwriter, Turn
from genrec.training.texts import chat_samples

CONVERSATIONS = 500
REPLIES = 200
EXAMPLES = 10
SETS = {"values": "held-out values", "phrasings": "held-out values and phrasings"}
Script = list[Turn]


def same(a: Query, b: Query) -> bool:
    """Whether two queries wish for the same; the order of wishes does not matter."""

    def parts(query: Query) -> list[Any]:
        facts = [{(f.name, f.value) for f in of} for of in (query.wanted, query.unwanted)]
        rest = [query.price_min, query.price_max, query.count]
        return [*facts, set(query.liked), set(query.disliked), *rest]

    return parts(a) == parts(b)


def queries(scripts: Sequence[Script], changes: Sequence[Change], catalogue: Catalogue) -> list[Query]:
    """The query after each conversation, from the changes of all their messages in order."""
    rest = iter(changes)
    found = []
    for script in scripts:
        query = Query()
        for turn in script:
            query = apply_change(query, next(rest), catalogue, turn.shown)
        found.append(query)
    return found


def commonest_roles(changes: Sequence[Change]) -> dict[tuple[str, ...], Role]:
    """For each choice of roles the commonest one."""
    counts: dict[tuple[str, ...], Counter[Role]] = {}
    for change in changes:
        for mention, role in change.roles:
            counts.setdefault(tuple(roles_of(mention)), Counter())[role] += 1
    return {choice: of.most_common(1)[0][0] for choice, of in counts.items()}


def dealt(changes: Sequence[Change], rng: np.random.Generator) -> list[Change]:
    """The same roles, dealt out at random among the mentions that have the same choice; so with what is said beside."""
    hands: dict[tuple[str, ...], list[Any]] = {}
    for change in changes:
        for mention, role in change.roles:
            hands.setdefault(tuple(roles_of(mention)), []).append(role)
    for hand in hands.values():
        rng.shuffle(hand)
    wholes: list[Any] = list(rng.permutation([change.whole for change in changes]))
    return [
        Change([(mention, hands[tuple(roles_of(mention))].pop()) for mention, _ in change.roles], str(whole))  # type: ignore[arg-type]
        for change, whole in zip(changes, wholes, strict=True)
    ]


def measure_chat(run: Run, n: int = CONVERSATIONS) -> dict[str, Any]:
    """texts/chat/: read conversations and compare the queries; returns texts.json.

    Args:
        run: a run with an export.
        n: conversations in each set.

    Returns:
        {"task", "texts", "metrics": {name: {"mean", "ci95"}}, "examples"}: shares of conversations whose last query is
        exactly right, and of messages; and what `genrec.chat_replies` says of the replies to the first `REPLIES`.

    Raises:
        ConfigError: a recipe that did not train it.
    """
    if run.recipe.finetune.mixture.chat == 0:
        raise ConfigError(f"{run.folder}: chat was not trained; set finetune.mixture.chat above 0 and run again")
    settings = {"texts": n, "replies": REPLIES, "seed": run.recipe.seed}
    folder = run_stage(
        run.folder, "texts/chat", settings, {"export": key_at(run.folder / "export")},
        lambda out: _measure(run, n, out), run.force,
    )  # fmt: skip
    result: dict[str, Any] = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return result


def _measure(run: Run, n: int, out: Path) -> dict[str, Any]:
    export = Export.load(run.folder / "export")
    engine = TorchEngine(export)
    trained = {message for message, _ in chat_samples(run.space)}
    all_values: dict[str, np.ndarray] = {}
    examples: list[dict[str, Any]] = []
    for number, (held_out, name) in enumerate(SETS.items()):
        rng = np.random.default_rng([run.recipe.seed, 9, number])
        writer = Scriptwriter(run.space.catalogue, rng, seed=run.recipe.seed, held_out=held_out)
        scripts = [writer.conversation() for _ in range(n)]
        values, found = _compare(engine, writer, scripts, trained, rng)
        all_values |= {", ".join(filter(None, (name, kind))): of for kind, of in values.items()}
        for script, query in list(zip(scripts, found, strict=True))[:EXAMPLES]:
            examples.append(
                {
                    "messages": [turn.text for turn in script],
                    "query": query.model_dump(exclude_defaults=True),
                    "expected": script[-1].query.model_dump(exclude_defaults=True),
                }
            )
        if held_out == "values":
            tests, ids = run.space.split.test.histories, export.catalogue.item_ids
            histories = [[ids[row] for row in tests[i % len(tests)]] for i in range(min(n, REPLIES))]
            all_values |= judge_replies(Recommender(export, engine), scripts[:REPLIES], histories)
    engine.close()
    metrics = {name: interval(of, run.recipe.seed) for name, of in all_values.items() if not np.isnan(of).all()}
    np.savez_compressed(out / "values.npz", allow_pickle=False, **all_values)
    write_json(out / "texts.json", {"task": "chat", "texts": n, "metrics": metrics, "examples": examples})
    return {"texts": n}


def _compare(
    engine: Engine, writer: Scriptwriter, scripts: Sequence[Script], trained: set[str], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[Query]]:
    """1 where a conversation's query is exactly right, else 0, by the model and its controls; and the model's queries.

    Args:
        engine: of the export.
        writer: who wrote the scripts.
        scripts: the conversations.
        trained: the questions of the training samples.
        rng: of the control.
    """
    turns = [turn for script in scripts for turn in script]
    wanted = [turn.target(writer.finder) for turn in turns]
    pieces = [Piece(t.text, [m for m, _ in change.roles], t.shown) for t, change in zip(turns, wanted, strict=True)]
    read = read_pieces(engine, pieces)
    rule = commonest_roles(wanted)
    ruled = [Change([(m, rule[tuple(roles_of(m))]) for m, _ in change.roles]) for change in wanted]
    truth = [script[-1].query for script in scripts]

    def right(changes: Sequence[Change]) -> np.ndarray:
        found = queries(scripts, changes, writer.catalogue)
        return np.array([float(same(a, b)) for a, b in zip(found, truth, strict=True)])

    own = right(read)
    values = {
        "": own,
        "majority rule": right(ruled),
        "roles dealt at random": right(dealt(read, rng)),
        "right roles": right(wanted),
    }
    new = [question(piece.text, piece.mentions) not in trained for piece in pieces]
    first = np.cumsum([0, *map(len, scripts)])  # of each conversation's messages, and the end
    kinds = {
        "new sentences": [any(new[a:b]) for a, b in pairwise(first)],
        "three turns or more": [len(script) > 2 for script in scripts],
        "impossible wishes": [not query.allowed(writer.catalogue).any() for query in truth],
    }
    values |= {kind: np.where(chosen, own, np.nan) for kind, chosen in kinds.items()}
    values["messages"] = np.array([float(a == b) for a, b in zip(read, wanted, strict=True)])
    return values, queries(scripts, read, writer.catalogue)
