"""The shape of requests. Strict: a field that is unknown, or of another type, is refused and never guessed at.

Fields of OpenAI's protocol that change nothing here are listed all the same, so that its clients are not refused;
docs/server.md says which they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fledge.engine.sampling import MAX_SEED

MOST_STOPS = 16
MOST_CHOICES = 64
MOST_TOKENS = 1 << 20

ONLY_TEXT = "only_text"
"""The kind of the error of a message with something else in it."""

Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class StrictModel(BaseModel):
    """Base of all: no coercion, nothing unknown; null stands for a field that is left out, where one may be."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        free = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name not in free}


class FledgeOptions(StrictModel):
    """The field `fledge` of a request: what OpenAI's protocol has no words for."""

    state: Annotated[str, Field(min_length=1)] | None = None
    return_state: Literal["handle", "inline"] | None = None
    session: Name | None = None
    branch: Name | None = None
    template: str | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    penalty_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    ban: Annotated[list[int], Field(max_length=1024)] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    deadline: Annotated[float, Field(gt=0, le=86_400)] | None = None
    cache: bool = True


class StreamOptions(StrictModel):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationRequest(StrictModel):
    """What all requests for text have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    fledge: FledgeOptions = Field(default_factory=FledgeOptions)


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    """A call as the model wrote it."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """A call with the name by which its result is told."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(StrictModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "input"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, given: Any) -> Any:
        for part in given if isinstance(given, list) else ():
            kind = part.get("type") if isinstance(part, dict) else "text"
            if isinstance(kind, str) and kind != "text":
                what = "images are" if kind.startswith("image") else f"a part of type {kind[:40]!r} is"
                raise PydanticCustomError(ONLY_TEXT, f"{what} not supported; this model reads text only")
        return given


class JsonSchema(StrictModel):
    """A schema with its name."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """Free text, any JSON object, or one that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # Of no effect here, as `user` above.
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None


class EmbeddingRequest(StrictModel):
    """Body of /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class TokenizeRequest(StrictModel):
    """Body of /tokenize."""

    content: str


class DetokenizeRequest(StrictModel):
    """Body of /detokenize."""

    tokens: Annotated[list[int], Field(max_length=MOST_TOKENS)]


class ReadRequest(StrictModel):
    """Body of POST /v1/fledge/states: something to read and to remember."""

    text: str | None = None
    messages: list[ChatMessage] | None = None
    state: str | None = None
    name: Name | None = None
    template: str | None = None


class ViewRequest(StrictModel):
    """Body of /v1/fledge/view and /v1/fledge/render."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    state: str | None = None
    template: str | None = None
