"""What the gateway reads and answers: every field has a limit, and nothing is converted."""

from __future__ import annotations

import base64
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genrec.errors import DataError
from genrec.serving.sent_item import SentItem
from genrec.serving.uploads import MAX_BYTES

MAX_HISTORY = 500  # events of a request, and of what is read from the store
MAX_BEAMS = 200
MAX_TEXT_TOKENS = 512
MAX_TIMEOUT_MS = 30_000
MAX_PICTURE_CHARS = -(-MAX_BYTES // 3) * 4

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
History = Annotated[list[ItemId], Field(max_length=MAX_HISTORY, description="item ids, oldest first")]
UserId = Annotated[Name, Field(description="take the history from the user store; `history` then follows it")]
Price = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Milliseconds = Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS, description="answer within so many milliseconds")]


class Body(BaseModel):
    """Base of every request body: no unknown field, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendBody(Body):
    """POST /v1/recommend; `history`, `user_id` or both."""

    user_id: UserId | None = None
    history: History | None = None
    k: int = Field(10, ge=1, le=100, description="items wanted")
    beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="beam width")
    exclude_seen: bool = Field(True, description="leave out the items of the history")
    categories: list[ItemId] | None = Field(None, max_length=1000, description="items in any of them")
    price_min: Price | None = None
    price_max: Price | None = None
    allow: list[ItemId] | None = Field(None, max_length=1000, description="only these item ids")
    timeout_ms: Milliseconds = 5_000

    @model_validator(mode="after")
    def _whose(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("give `history` (empty for a new user), `user_id`, or both")
        return self


class DescribeBody(Body):
    """POST /v1/describe; without `history` and `user_id` the text is for a new user."""

    item_id: ItemId
    user_id: UserId | None = None
    history: History = []
    max_tokens: int = Field(64, ge=1, le=MAX_TEXT_TOKENS)
    task: Literal["describe", "explain", "headline"] = Field("describe", description="what kind of text")
    style: Literal["short plain", "long plain", "short playful", "long playful"] = "short plain"
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)
    timeout_ms: Milliseconds = MAX_TIMEOUT_MS


class EventBody(Body):
    """A user met an item."""

    user_id: Name
    item_id: ItemId
    event_id: Name | None = Field(None, description="your name for this event: sent again, it is not stored again")
    timestamp: float | None = Field(
        None, ge=0, le=4_102_444_800, allow_inf_nan=False, description="seconds since 1970; default: now"
    )


class EventsBody(Body):
    """POST /v1/events; all of them are stored, or none."""

    events: list[EventBody] = Field(min_length=1, max_length=1000, description="in the order in which they happened")


class ItemBody(Body):
    """An item; a field that is not sent is unknown, but a picture that was sent before stays."""

    item_id: Name
    title: str = Field("", max_length=1000)
    description: str = Field("", max_length=10_000)
    categories: list[ItemId] = Field([], max_length=50)
    attributes: dict[ItemId, Annotated[str, Field(max_length=1000)]] = Field({}, max_length=50)
    price: Price | None = None
    available: bool = Field(True, description="false: no list holds it")
    picture: str | None = Field(
        None, max_length=MAX_PICTURE_CHARS, description=f"a JPEG or PNG of at most {MAX_BYTES} bytes, in base64"
    )

    def sent(self) -> SentItem:
        """
        Raises:
            DataError: the picture is not in base64.
        """
        try:
            picture = None if self.picture is None else base64.b64decode(self.picture, validate=True)
        except ValueError:
            raise DataError(
                f"item {self.item_id[:100]!r}: picture: not in base64; send the file's bytes as base64, without a "
                "data: address in front and without line breaks"
            ) from None
        fields = self.model_dump(exclude={"item_id", "picture"})
        return SentItem(self.item_id, fields, picture)


class ItemsBody(Body):
    """POST /v1/items; no list: just ask how many are disabled."""

    upsert: list[ItemBody] = Field([], max_length=100, description="items to add, or to replace by id")
    disable: list[ItemId] = Field([], max_length=10_000, description="item ids that nobody may be recommended")
    enable: list[ItemId] = Field([], max_length=10_000, description="item ids that were disabled")

    @model_validator(mode="after")
    def _once(self) -> Self:
        ids = [item.item_id for item in self.upsert]
        if len(set(ids)) < len(ids):
            twice = next(item for item in ids if ids.count(item) > 1)
            raise ValueError(f"{twice[:100]!r} is in `upsert` twice; send it once")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if both := sorted(set(self.disable) & set(self.enable)):
            raise ValueError(f"{both[0][:100]!r} is in `disable` and in `enable`; leave it in one")
        return self


class Shown(BaseModel):
    """One recommended item."""

    item_id: str
    title: str
    score: float
    rank: int


class Version(BaseModel):
    """What answered: the engine, the first letters of the export's key, the genrec that wrote the export."""

    engine: str
    export: str
    genrec: str


class Recommended(Version):
    """Answer of /v1/recommend."""

    items: list[Shown]
    fallback: bool = Field(False, description="true: most popular items, because the engine gave no list in time")
    reason: Literal["deadline", "engine_error", "engine_stalled"] | None = Field(None, description="of the fallback")


class Origin(BaseModel):
    """Where a generated text comes from; see genrec.serving.provenance.Provenance."""

    generated: Literal[True]
    model: str
    export: str
    genrec: str
    engine: str
    prompt: str = Field(description="the task and a hash of its prompt's template")
    style: str
    temperature: float
    seed: int
    time: str = Field(description="UTC")
    item_id: str
    user: str | None = Field(description="salted hash of `user_id`")


class Described(Version):
    """Answer of /v1/describe."""

    text: str
    finish_reason: str
    provenance: Origin


class Stored(BaseModel):
    """Answer of /v1/events: on disk."""

    stored: int
    duplicates: int


class Changed(BaseModel):
    """Answer of POST /v1/items: on disk, if there is a store."""

    added: int
    replaced: int
    disabled: int = Field(description="items that are disabled now")


class Health(Version):
    """Answer of /healthz: the process lives."""

    status: Literal["ok"]
    items: int
    tasks: list[str] = Field(description="texts that the model was trained to write; any other it writes blindly")


class Readiness(BaseModel):
    """Answer of /readyz."""

    ready: bool
    reasons: list[str]


class Problem(BaseModel):
    """What was wrong, and what to do."""

    error: str
