"""The OpenAI types that the server speaks: what a request may say, checked field by field, and what is sent back.

Fields that are not listed are refused by name, never ignored; null is the same as nothing. Limits stand in the types,
so that /openapi.json shows them. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import to_json

from persimmon.errors import InputError
from persimmon.infer.constraint import Grammar, choice, json_schema
from persimmon.infer.params import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_MESSAGES = 2_048
MAX_BIASES = 1_024

# What clients of the original interface may send and this server does not do, with the reason.
UNSUPPORTED = {
    "tools": "the model was not trained to call tools; ask for JSON of your schema with response_format instead",
    "tool_choice": "the model was not trained to call tools; use response_format",
    "functions": "the model was not trained to call tools; use response_format",
    "function_call": "the model was not trained to call tools; use response_format",
    "parallel_tool_calls": "the model was not trained to call tools; use response_format",
    "suffix": "the model only continues texts",
    "store": "answers are not kept",
    "metadata": "answers are not kept",
    "modalities": "the model reads and writes text only",
    "audio": "the model reads and writes text only",
    "max_new_tokens": "the name here is max_tokens",
    "guided_json": "the name here is response_format",
    "guided_regex": "the name here is regex",
    "guided_choice": "the name here is choice",
    "context_overflow": "a prompt that does not fit is an error here",
}

# Values of them that ask for what happens anyway.
HARMLESS: dict[str, Any] = {
    "tool_choice": "none",
    "function_call": "none",
    "parallel_tool_calls": False,
    "store": False,
    "modalities": ["text"],
}

_EMPTY_IN_ANSWERS = frozenset({"refusal", "tool_calls", "function_call", "audio", "annotations"})
"""Fields of an assistant's message that clients send back as they got them: with nothing in them."""


class Body(BaseModel):
    """A request body: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    """One more chunk with the token counts before `[DONE]`."""
    include_progress: bool = False
    """Chunks without choices and with `progress`: tokens read of the prompt, tokens per second, zeros in the MLPs."""


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is the same as system.")
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=64, description="Accepted and not shown to the model.")

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_answered(cls, value: Any) -> Any:
        """Leave out what an answer says it has none of, so that it can be sent back as history."""
        if not isinstance(value, dict):
            return value
        return {name: part for name, part in value.items() if name not in _EMPTY_IN_ANSWERS or part not in (None, [])}

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        """Name the first part that is not text."""
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in (None, "text"):
                raise ValueError(f"only parts of type 'text' can be read, got {str(part['type'])[:40]!r}")
        return content

    @property
    def speaker(self) -> str:
        """The role as the model knows it."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(Body):
    """A named schema."""

    name: str = Field("answer", max_length=64)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type 'json_schema', and only then")
        return self


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Sampling(Body):
    """What chats and completions have in common."""

    model: str | None = Field(None, max_length=256, description="A name from /v1/models; default: the one served.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, le=2**31)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS - 1)] | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, max_length=8_192, description="The answer matches this regular expression.")
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=256, description="The answer is one of these."
    )
    user: str | None = Field(None, max_length=256, description="Accepted and not used.")
    prompt_cache_key: str | None = Field(
        None, max_length=256, description="Requests with the same key go to the same replica, where there are several."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_with_reasons(cls, value: Any) -> Any:
        """Say why, for what is known and not supported; leave out what is null or changes nothing."""
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, part in value.items():
            if name not in cls.model_fields:
                if part is None or (name in HARMLESS and part == HARMLESS[name]):
                    continue
                if name in UNSUPPORTED:
                    raise UnsupportedField(name, UNSUPPORTED[name])
            kept[name] = part
        return kept

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    def sampling_params(self, max_tokens: int, logprobs: int | None, seed: int | None) -> SamplingParams:
        """The parameters of one choice. InputError where a value is out of its limits."""
        stop = () if not self.stop else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        settings = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }  # fmt: skip
        return SamplingParams.of(
            max_tokens=max_tokens, stop=stop, logprobs=logprobs, seed=seed, logit_bias=self._biases(),
            **{name: value for name, value in settings.items() if value is not None},
        )  # fmt: skip

    def _biases(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        for name in biases:
            if not (name.isascii() and name.isdigit() and len(name) < 10):
                raise InputError(f"logit_bias: {name!r} is not a token id")
        return {int(name): value for name, value in biases.items()}

    def grammar(self) -> Grammar | None:
        """What the answer must match; InputError for more than one demand."""
        found: list[Grammar] = []
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            found.append(json_schema(schema.schema_ if schema is not None else {"type": "object"}))
        if self.regex is not None:
            found.append(Grammar("regex", self.regex))
        if self.choice is not None:
            found.append(choice(self.choice))
        if len(found) > 1:
            raise InputError("response_format, regex and choice exclude each other")
        return found[0] if found else None


class UnsupportedField(ValueError):
    """A field that is known and not supported."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is not supported: {reason}")
        self.name = name


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def conversation(self) -> str:
        """The same for all turns of a conversation: its messages up to the first question."""
        if self.prompt_cache_key is not None:
            return self.prompt_cache_key
        questions = [place for place, message in enumerate(self.messages) if message.role == "user"]
        head = self.messages[: questions[0] + 1] if questions else self.messages
        content = json.dumps([[message.speaker, message.text] for message in head])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    add_special_tokens: bool = Field(True, description="Put begin-of-text before text prompts; never before ids.")

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        first = self.prompt[0] if isinstance(self.prompt, list) else None
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(first, int) else list(self.prompt)  # type: ignore[list-item, arg-type]


class TokenizeRequest(Body):
    """Body of POST /tokenize: a text or a conversation."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = Field(None, max_length=256)
    tokens: list[Annotated[int, Field(ge=0, le=2**31)]]


# What is sent back. These describe the answers in /openapi.json; the answers themselves are built as plain dicts.


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorDetail


class UsageResponse(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ChatResponse(BaseModel):
    """Answer of POST /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: UsageResponse


class CompletionResponse(BaseModel):
    """Answer of POST /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: UsageResponse


class TokenizeResponse(BaseModel):
    """Answer of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(document: Mapping[str, Any]) -> bytes:
    """One event of a stream; JSON never holds a raw newline, so one data line is enough."""
    return b"data: " + to_json(document) + b"\n\n"
