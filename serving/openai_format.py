"""OpenAI's chat completions as this gateway reads and writes them, with one field more: `genrec`.

What is not here is refused, not ignored: a client that asks for tools or several choices learns that there are none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from genrec.query import Query
from genrec.serving.bodies import MAX_TIMEOUT_MS, Body, History, Milliseconds, Name, Origin
from genrec.serving.chat import Message

CHAT_PATH = "/v1/chat/completions"
MAX_MESSAGES = 200
MAX_CONTENT_CHARS = 20_000
NO_TOOLS, TEXT_ONLY = "no tools are called here", "replies are text; the items are in the field `genrec`"
NO_PENALTY = "tokens cannot be weighed"
UNSUPPORTED = {
    "tools": NO_TOOLS,
    "tool_choice": NO_TOOLS,
    "parallel_tool_calls": NO_TOOLS,
    "functions": NO_TOOLS,
    "function_call": NO_TOOLS,
    "response_format": TEXT_ONLY,
    "modalities": TEXT_ONLY,
    "audio": TEXT_ONLY,
    "logprobs": "no log-probabilities of tokens are given",
    "top_logprobs": "no log-probabilities of tokens are given",
    "logit_bias": NO_PENALTY,
    "frequency_penalty": NO_PENALTY,
    "presence_penalty": NO_PENALTY,
}
REFUSALS = {**UNSUPPORTED, "n": "only one choice is made"}
Content = Annotated[str, Field(max_length=MAX_CONTENT_CHARS)]
StopWord = Annotated[str, Field(min_length=1, max_length=100)]


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: Content


class ChatMessage(BaseModel):
    """One message; a reply's message can be sent back as it came, so its other fields are not read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[list[TextPart], Field(min_length=1, max_length=50)]

    def plain(self) -> Message:
        """Role and text; a developer is the system."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool | None = Field(None, description="a last chunk with the usage and no choice")


class Extension(Body):
    """What this gateway's other routes take as well."""

    history: History = Field([])
    timeout_ms: Milliseconds = MAX_TIMEOUT_MS


class ChatBody(Body):
    """POST /v1/chat/completions."""

    model: Name = Field(description="any name: there is one model")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, description="all of them, oldest first")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1, description="choices")
    stop: StopWord | Annotated[list[StopWord], Field(max_length=4)] | None = Field(
        None, description="the text ends before the first of these"
    )
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="of the text, in the model's own tokens")
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000, description="the same by its newer name")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="of the reasons; default 0")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="taken, without effect")
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the reasons")
    user: Name | None = Field(None, description="take the history from the user store; `genrec.history` follows it")
    genrec: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, body: Any) -> Any:
        """Fields that are not supported but ask for nothing, such as `tools: null`, are as good as absent."""
        return {k: v for k, v in body.items() if k not in UNSUPPORTED or v} if isinstance(body, dict) else body

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only with `stream`: true")
        return options

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        if tokens is not None and info.data.get("max_tokens") is not None:
            raise ValueError("give this or `max_tokens`, not both")
        return tokens


class ShownItem(BaseModel):
    """One recommended item."""

    id: str
    title: str = Field(description="as the text names it")
    image: str | None = Field(description="path of its picture on this server")
    score: float = Field(description="log P(item)")
    reason: str
    provenance: Origin | None = Field(description="where the reason comes from; null: from the catalogue")


class Dropped(BaseModel):
    """Wishes to drop when nothing fits, and how many items then do."""

    drop: list[Query]
    items: int


class Recommendation(BaseModel):
    """The field `genrec`: what the text is about."""

    items: list[ShownItem]
    query: Query = Field(description="what was understood")
    relax: list[Dropped] = Field(description="empty unless nothing fits")
    fallback: bool = Field(description="true: most popular items, because the engine gave no list in time")


class Usage(BaseModel):
    """Tokens of the messages' and the reply's text."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(BaseModel):
    """The reply."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answer of /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="first letters of the export's key")
    choices: list[Choice]
    usage: Usage
    genrec: Recommendation


class ErrorDetail(BaseModel):
    """What was wrong, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ChatProblem(BaseModel):
    """Every error of the route."""

    error: ErrorDetail


KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def error_object(status: int, text: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind, code = KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    return ChatProblem(error=ErrorDetail(message=text, type=kind, param=param, code=code)).model_dump()
