"""A reply of the gateway on its way: reasons asked for together, lines said one by one as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request

from genrec.errors import DataError
from genrec.serving.chat import Chat, ChatItem, Plan
from genrec.serving.desk import Desk
from genrec.serving.engine import RankedItem, TextRequest, TextResult
from genrec.serving.problems import RefusalError
from genrec.serving.reply_text import Finish, Line, ReplyText


class Reply:
    """One reply.

    Attributes:
        text: what has been said so far.
        finish: why it ended.
        items: those that the lines so far are about.
    """

    def __init__(
        self, desk: Desk, chat: Chat, plan: Plan, ranked: Sequence[RankedItem], cutter: ReplyText, *, whole: bool
    ) -> None:
        """
        Args:
            desk: asks the engine.
            chat: of its export.
            plan: what was asked for.
            ranked: the items, best first.
            cutter: stop words and `max_tokens`.
            whole: say nothing before the last line is there: a stop word may begin in one line and end in another.
        """
        self._desk, self._chat, self._plan, self._ranked = desk, chat, plan, ranked
        self._cutter, self._whole = cutter, whole
        self.text = ""
        self.finish: Finish = "stop"
        self.items: list[ChatItem] = []

    async def deltas(self, http: Request, requests: Sequence[TextRequest], deadline: float) -> AsyncGenerator[str]:
        """The text piece by piece, each checked before it leaves.

        A reason that is late, or that the engine fails at, is a plain one: a reply has its items whatever happens.

        Args:
            http: whose reply it is.
            requests: one for the reason of each item.
            deadline: of `time.monotonic`, for the reasons.

        Raises:
            ClientLeftError: nobody waits for it.
        """
        jobs = [asyncio.ensure_future(self._written(http, request, deadline)) for request in requests]
        lines: list[Line] = [self._chat.opening(self._plan, len(self._ranked))]
        cut: Finish | None = None
        try:
            for number in range(len(jobs) + 1):
                if number and not await self._add(lines, number - 1, jobs[number - 1]):
                    continue
                if cut is None and (not self._whole or number == len(jobs)):
                    text, cut = self._cutter.cut(lines)
                    more = text[len(self.text) :]
                    self.text += more
                    if more:
                        yield more
        finally:
            for job in jobs:
                job.cancel()
        self.finish = cut or "stop"

    @property
    def tokens(self) -> int:
        """Of the text so far."""
        return self._cutter.count(self.text)

    async def _add(self, lines: list[Line], place: int, job: asyncio.Future[TextResult | None]) -> bool:
        """Wait for an item's reason and add its line; False if the item was disabled meanwhile."""
        written = await job
        item = self._chat.item(self._plan, self._ranked[place], written)
        if item.row in self._desk.switches.denied:
            return False
        self.items.append(item)
        lines.append(self._chat.line(self._plan, len(self.items), item))
        return True

    async def _written(self, http: Request, request: TextRequest, deadline: float) -> TextResult | None:
        try:
            return await self._desk.write(http, request, deadline)
        except (DataError, RefusalError):
            return None
