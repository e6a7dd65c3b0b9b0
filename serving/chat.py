"""A conversation that recommends, step by step and without an engine: plan, ask, say. Who asks the engine drives it.

understand (the model) -> `Query` -> `plan` -> a list under its filters -> `reason_requests` -> `say` line by line
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.errors import DataError
from genrec.item_names import SEPARATOR, ItemNames, one_line
from genrec.prompts import plain_tokenizer
from genrec.query import Query
from genrec.relax import Relaxation, in_words, relaxations, wishes
from genrec.serving.engine import Engine, RankedItem, RecommendRequest, TextRequest, TextResult
from genrec.serving.export import Export
from genrec.serving.reasons import Reasons
from genrec.serving.reply_text import Finish, Line, ReplyText
from genrec.serving.resolve import item_rows
from genrec.writer import evidence_of

REASON_TOKENS = 48
MAX_REASONS_TOKENS = 448  # of all reasons of one reply
SHOWN_RELAXATIONS = 3
MAX_WISH_CHARS = 120
ROLES = ("system", "user", "assistant")


Message = Mapping[str, str]  # "role", one of `ROLES`, and "content"
# engine, export, the conversation, and for each of its messages the ids of the items that it lists
Understand = Callable[[Engine, Export, Sequence[Message], Sequence[Sequence[str]]], Query]


@dataclass(frozen=True)
class Plan:
    """What a query comes to for one user.

    Attributes:
        query: the wishes.
        history: item ids: the user's events, then what the conversation says they like.
        request: for the engine; None: nothing fits.
        relaxations: what to drop when nothing fits.
    """

    query: Query
    history: list[str]
    request: RecommendRequest | None
    relaxations: list[Relaxation]


@dataclass(frozen=True)
class ChatItem:
    """One recommended item as the reply names it.

    Attributes:
        row: of the catalogue.
        item_id: its id.
        title: its name in the reply.
        score: log P(item), see `RankedItem`.
        reason: one line; may be empty.
        written: whether the model wrote the reason.
    """

    row: int
    item_id: str
    title: str
    score: float
    reason: str
    written: bool


@dataclass(frozen=True)
class ChatReply:
    """An answer; ``str()`` is the text alone."""

    text: str
    finish_reason: Finish
    items: list[ChatItem]
    query: Query
    relaxations: list[Relaxation]

    def __str__(self) -> str:
        return self.text


class Chat:
    """What conversations about one export need; built once."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.names = ItemNames(export.catalogue)
        self.reasons = Reasons(export.catalogue, self.names)
        self.tokenizer = plain_tokenizer(export.tokenizer)

    def check(self, messages: Sequence[Message]) -> None:
        """Refuse what is no conversation.

        Raises:
            DataError: no message, an unknown role, no text, or nothing said by the user.
        """
        if not messages:
            raise DataError("messages: there are none; send at least one of role 'user'")
        for number, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                found = repr(role)[:50]
                raise DataError(f"messages.{number}.role: expected one of {', '.join(ROLES)}; found {found}")
            if not isinstance(content, str):
                raise DataError(f"messages.{number}.content: expected text; found {type(content).__name__}")
        if not any(message["role"] == "user" and message["content"].strip() for message in messages):
            raise DataError("messages: none of role 'user' says anything; add what the user wants")

    def shown(self, messages: Sequence[Message]) -> list[list[str]]:
        """For each message the ids of the items that it lists; only the assistant's list any."""
        ids = self.export.catalogue.item_ids
        rows = [self.names.listed(m["content"]) if m["role"] == "assistant" else [] for m in messages]
        return [[ids[row] for row in of] for of in rows]

    def plan(self, query: Query, history: Sequence[str], denied: Collection[int] = ()) -> Plan:
        """From wishes to a request, or to what to drop.

        Args:
            query: the wishes.
            history: the user's events, item ids of the catalogue, oldest first.
            denied: catalogue rows that nobody may be recommended; those of items that came later are passed over.

        Raises:
            DataError: unknown item ids in the history.
        """
        catalogue = self.export.catalogue
        events = [*history, *(item for item in query.liked if item in catalogue.index)]
        possible = np.ones(len(catalogue), bool)
        possible[[*item_rows(catalogue, events), *(row for row in denied if row < len(possible))]] = False
        fitting = possible & query.allowed(catalogue)
        if not fitting.any():
            return Plan(query, events, None, relaxations(catalogue, query, possible))
        narrow = bool(wishes(query) or query.disliked)
        allow = [catalogue.item_ids[row] for row in np.flatnonzero(fitting)] if narrow else None
        return Plan(query, events, RecommendRequest(events, min(query.count, int(fitting.sum())), allow=allow), [])

    def reason_requests(
        self, plan: Plan, ranked: Sequence[RankedItem], temperature: float = 0.0, seed: int = 0
    ) -> list[TextRequest]:
        """What to ask the engine about each item."""
        each = min(REASON_TOKENS, MAX_REASONS_TOKENS // max(1, len(ranked)))
        return [TextRequest(item.item_id, plan.history, each, temperature, seed, "explain") for item in ranked]

    def item(self, plan: Plan, ranked: RankedItem, written: TextResult | None) -> ChatItem:
        """An item with its reason.

        Args:
            plan: what was asked for.
            ranked: the item.
            written: the model's reason; None: there is none.
        """
        row = self.export.catalogue.index[ranked.item_id]
        history, evidence = self._past(plan, row)
        reason = self.reasons.choose(written, row, plan.query, history, evidence)
        return ChatItem(row, ranked.item_id, self.names.of(row), ranked.score, *reason)

    def line(self, plan: Plan, number: int, item: ChatItem) -> Line:
        """An item's line; `ItemNames.listed` reads it back."""
        _, evidence = self._past(plan, item.row)
        text = f"{number}. {item.title}" + (f"{SEPARATOR}{item.reason}" if item.reason else "")
        return Line(text, frozenset({item.row, *evidence}))

    def opening(self, plan: Plan, n_items: int) -> Line:
        """The first line of a reply: what follows, or that nothing fits and what to drop."""
        if n_items:
            return Line("These fit:" if n_items >= plan.query.count else "Fewer than you asked for fit:")
        said = []
        for one in plan.relaxations[:SHOWN_RELAXATIONS]:
            dropped = " and ".join(f'"{self._in_words(wish)}"' for wish in one.dropped)
            said.append(f"Without {dropped}: {one.items}.")
        if said:
            return Line(" ".join(["Nothing here fits all you wish. Which wish may go?", *said]))
        if wishes(plan.query):
            return Line("Nothing here fits, not even without any two of your wishes. Please begin anew with fewer.")
        return Line("Nothing is left to recommend.")

    def text(self, stop: Sequence[str] = (), max_tokens: int | None = None) -> ReplyText:
        """How a reply is cut."""
        return ReplyText(self.tokenizer, self.names, stop, max_tokens)

    def _past(self, plan: Plan, row: int) -> tuple[list[int], list[int]]:
        """The history as rows, and those of it that an explanation of the item may name."""
        rows = item_rows(self.export.catalogue, plan.history)
        return rows, evidence_of(self.export.catalogue, rows, row)

    def _in_words(self, wish: Query) -> str:
        """A wish; by its attribute alone where its value is some item's title."""
        text = one_line(in_words(wish))[:MAX_WISH_CHARS]
        fact = next(iter([*wish.wanted, *wish.unwanted]), None)
        return fact.name if fact is not None and self.names.strangers(text, ()) else text


def answer(
    chat: Chat, engine: Engine, understand: Understand, messages: Sequence[Message], history: Sequence[str]
) -> ChatReply:
    """One whole reply, by an engine that nobody else asks meanwhile.

    Args:
        chat: of the engine's export.
        engine: asked from this thread.
        understand: finds the wishes.
        messages: the conversation, oldest first.
        history: item ids, oldest first.

    Raises:
        DataError: no conversation, or unknown item ids.
    """
    chat.check(messages)
    item_rows(chat.export.catalogue, history)
    query = understand(engine, chat.export, messages, chat.shown(messages))
    plan = chat.plan(query, history)
    ranked = [] if plan.request is None else engine.recommend([plan.request])[0]
    written = engine.generate(chat.reason_requests(plan, ranked)) if ranked else []
    items = [chat.item(plan, *pair) for pair in zip(ranked, written, strict=True)]
    lines = [chat.opening(plan, len(items)), *(chat.line(plan, n, item) for n, item in enumerate(items, 1))]
    text, _ = chat.text().cut(lines)
    return ChatReply(text, "stop", items, query, plan.relaxations)
