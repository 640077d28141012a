"""What clients send, as OpenAI defines it. What is not known is refused, as is what would be ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, field_validator

#: Strings in `stop`, characters in each, choices for one prompt, prompts in one request, alternatives to a token.
MAX_STOPS, MAX_STOP_LENGTH, MAX_CHOICES, MAX_PROMPTS, MAX_LOGPROBS = 16, 1000, 16, 128, 20

#: What pydantic is told to call the forms of a value that has several.
FORMS = ("string", "strings", "tokens", "token lists", "list", "parts")

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _kind(value: Any) -> str:
    """Which of the forms of a value that has several is meant; errors are then about that one."""
    if not isinstance(value, list):
        return "string"
    first = value[0] if value else ""
    return "token lists" if isinstance(first, list) else "tokens" if isinstance(first, int) else "strings"


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
_Stops = Annotated[
    Annotated[_Stop, Tag("string")] | Annotated[list[_Stop], Field(max_length=MAX_STOPS), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "string"),
]
_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Prompts = Field(min_length=1, max_length=MAX_PROMPTS)


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = _STRICT
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(BaseModel):
    """What both kinds of request have; None is as if left out."""

    model_config = _STRICT

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, by the names that other servers give them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    # Taken only where they do nothing.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # They change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _no_penalty(cls, value: Any) -> Any:
        if value not in (None, 0) or isinstance(value, bool):
            raise ValueError("is not supported; repetition_penalty is")
        return value if value is None else 0

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[str], _Prompts, Tag("strings")]
        | Annotated[_Tokens, Tag("tokens")]
        | Annotated[list[_Tokens], _Prompts, Tag("token lists")],
        Discriminator(_kind),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> Iterable[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(BaseModel):
    """A part of a message's content; there is none but text."""

    model_config = _STRICT
    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """What an assistant called, its arguments as JSON."""

    model_config = _STRICT
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in a message of the assistant's."""

    model_config = _STRICT
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("string")] | Annotated[list[TextPart], Tag("parts")],
            Discriminator(lambda value: "parts" if isinstance(value, list) else "string"),
        ]
        | None
    ) = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class ResponseFormat(BaseModel):
    """The form of an answer: there is none but text."""

    model_config = _STRICT
    type: Literal["text"]


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
