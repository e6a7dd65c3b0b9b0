"""POST /v1/chat/completions: OpenAI's format in front of `genrec.serving.chat`, streaming and not."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from genrec.errors import DataError
from genrec.serving.bodies import Origin
from genrec.serving.chat import Chat, Plan
from genrec.serving.chat_reply import Reply
from genrec.serving.desk import RESERVE_S, Desk
from genrec.serving.engine import RankedItem, TextRequest
from genrec.serving.openai_format import (
    CHAT_PATH,
    ChatBody,
    Choice,
    Completion,
    Dropped,
    Recommendation,
    ReplyMessage,
    ShownItem,
    Usage,
)
from genrec.serving.problems import CHAT_RESPONSES, ClientLeftError
from genrec.serving.provenance import provenance_of
from genrec.serving.resolve import beam_width, item_rows
from genrec.serving.thumbnails import image_path

UNDERSTAND_TOKENS = 64  # what reading a conversation costs a tenant; with all reasons no more than one largest request
PIECE = re.compile(r"\s*\S+|\s+$")
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@dataclass(frozen=True)
class Talk:
    """One request, ready to be answered."""

    body: ChatBody
    chat: Chat
    plan: Plan
    reply: Reply
    requests: list[TextRequest]
    deadline: float
    fallback: bool
    prompt_tokens: int
    engine: str
    user: str | None  # hashed


def add_chat(app: FastAPI, desk: Desk, engine: str) -> None:
    """Add the route; `engine` is the engine's name."""

    @app.post(
        CHAT_PATH,
        dependencies=[Security(HTTPBearer(auto_error=False))],
        response_model=Completion,
        responses={**CHAT_RESPONSES, **STREAM},
    )
    async def completions(body: ChatBody, http: Request) -> Any:
        """A reply about items that fit what the conversation asks for; with `stream` as server-sent events."""
        talk = await _prepare(desk, engine, body, http)
        deltas = talk.reply.deltas(http, talk.requests, talk.deadline)
        frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": str(talk.chat.export.manifest["key"])[:12],
        }
        if body.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            events = _events(desk, talk, deltas, frame)
            return StreamingResponse(events, 200, headers, "text/event-stream")
        async for _ in deltas:
            pass
        choice = Choice(message=ReplyMessage(content=talk.reply.text), finish_reason=talk.reply.finish)
        found = Completion(**frame, choices=[choice], usage=_usage(talk), genrec=_recommendation(talk))
        return Response(found.model_dump_json(), media_type="application/json")


async def _prepare(desk: Desk, engine: str, body: ChatBody, http: Request) -> Talk:
    """Everything that can be refused, before the first byte of an answer."""
    state = desk.now
    assert state.chat is not None
    chat = state.chat
    timeout_s = body.genrec.timeout_ms / 1000
    deadline = time.monotonic() + timeout_s
    messages = [message.plain() for message in body.messages]
    chat.check(messages)
    if body.user is not None and desk.store is None:
        raise DataError("user: this gateway keeps no histories; send `genrec.history`, or start it with --store")
    item_rows(chat.export.catalogue, body.genrec.history)
    caller = http.state.caller
    desk.charge(caller, "tokens", UNDERSTAND_TOKENS)
    history = await desk.history(http, body.user, body.genrec.history, deadline)
    list_deadline, charged = deadline - min(RESERVE_S, timeout_s / 10), False
    while True:  # items that change meanwhile make it begin again: all of a reply is about one state of them
        assert state.chat is not None
        chat = state.chat
        shown = await run_in_threadpool(chat.shown, messages)
        query = await desk.understand(http, state, messages, shown, deadline)
        plan = await run_in_threadpool(chat.plan, query, history, desk.switches.denied)
        ranked: list[RankedItem] = []
        reason = None
        if plan.request is None:
            break
        if not charged:
            desk.charge(caller, "beams", beam_width(plan.request, len(chat.export.catalogue)))
            charged = True
        ranked, reason, answered = await desk.rank(http, plan.request, list_deadline)
        if answered is state:
            break
        state = answered
    if plan.request is not None and not ranked:  # all that fitted were disabled meanwhile
        plan = await run_in_threadpool(chat.plan, query, history, desk.switches.denied)
    requests = chat.reason_requests(plan, ranked, body.temperature or 0.0, body.seed or 0)
    if requests:
        desk.charge(caller, "tokens", sum(request.max_tokens for request in requests))
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    cutter = chat.text(stop, body.max_tokens or body.max_completion_tokens)
    reply = Reply(desk, chat, plan, ranked, cutter, whole=bool(stop) or not body.stream)
    asked = await run_in_threadpool(lambda: sum(cutter.count(message["content"]) for message in messages))
    user = None if body.user is None else desk.user_hash(caller.tenant, body.user)
    return Talk(body, chat, plan, reply, requests, deadline, reason is not None, asked, engine, user)


async def _events(desk: Desk, talk: Talk, deltas: AsyncGenerator[str], frame: dict[str, Any]) -> AsyncIterator[str]:
    """The reply as server-sent events: words, then why it ended with the items, then the usage if it is wanted."""
    wants_usage = bool(talk.body.stream_options and talk.body.stream_options.include_usage)

    def event(delta: dict[str, str] | None, finish: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        usage = {"usage": None} if wants_usage else {}
        chunk = {**frame, "object": "chat.completion.chunk", "choices": choices, **usage, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        async with contextlib.aclosing(deltas):  # a client that leaves takes its reasons' places in the queue with it
            async for text in deltas:
                for piece in PIECE.findall(text):
                    yield event({"content": piece})
    except ClientLeftError:
        return
    yield event({}, talk.reply.finish, genrec=_recommendation(talk).model_dump())
    if wants_usage:
        yield event(None, usage=_usage(talk).model_dump())
    yield "data: [DONE]\n\n"


def _usage(talk: Talk) -> Usage:
    """Tokens of what was asked and said."""
    said = talk.reply.tokens
    return Usage(prompt_tokens=talk.prompt_tokens, completion_tokens=said, total_tokens=talk.prompt_tokens + said)


def _recommendation(talk: Talk) -> Recommendation:
    """The field `genrec`."""
    origins = {
        request.item_id: Origin(**provenance_of(talk.chat.export, talk.engine, request, talk.user).as_dict())
        for request in talk.requests
    }
    return Recommendation(
        items=[
            ShownItem(
                id=item.item_id,
                title=item.title,
                image=image_path(talk.chat.export.catalogue, item.row),
                score=item.score,
                reason=item.reason,
                provenance=origins[item.item_id] if item.written else None,
            )
            for item in talk.reply.items
        ],
        query=talk.plan.query,
        relax=[Dropped(drop=list(one.dropped), items=one.items) for one in talk.plan.relaxations],
        fallback=talk.fallback,
    )
