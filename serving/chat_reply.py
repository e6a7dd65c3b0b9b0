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
            whole: say nothing before all reasons are there: a stop word may begin in one line and end in another, and
                an answer that is not streamed holds no item that was disabled while it waited.
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
        cut: Finish | None = None
        try:
            if self._whole:
                await asyncio.gather(*jobs)
            lines: list[Line] = [self._chat.opening(self._plan, sum(map(self._may_be_shown, self._ranked)))]
            for number in range(len(jobs) + 1):
                if number:
                    await self._add(lines, self._ranked[number - 1], jobs[number - 1])
                if cut is None and (not self._whole or number == len(jobs)):
                    text, cut = self._cutter.cut(lines)
                    more = text[len(self.text) :]
                    self.text += more
                    if more:
                        yield more
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        self.finish = cut or "stop"

    @property
    def tokens(self) -> int:
        """Of the text so far."""
        return self._cutter.count(self.text)

    async def _add(self, lines: list[Line], ranked: RankedItem, job: asyncio.Future[TextResult | None]) -> None:
        """Wait for an item's reason and add its line, unless the item was disabled meanwhile."""
        written = await job
        if self._may_be_shown(ranked):
            item = self._chat.item(self._plan, ranked, written)
            self.items.append(item)
            lines.append(self._chat.line(self._plan, len(self.items), item))

    def _may_be_shown(self, item: RankedItem) -> bool:
        """Whether an item of the list is still enabled."""
        return self._chat.export.catalogue.index[item.item_id] not in self._desk.switches.denied

    async def _written(self, http: Request, request: TextRequest, deadline: float) -> TextResult | None:
        try:
            return await self._desk.write(http, request, deadline)
        except (DataError, RefusalError):
            return None
