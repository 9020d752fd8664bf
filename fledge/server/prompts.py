"""Messages to token ids, and what binds the answer: the template's stop text, a schema, the functions it may call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.sampling import SamplingParams
from fledge.engine.structured import tool_calls as calling
from fledge.engine.structured.grammar import (
    Constraint,
    GrammarVocabulary,
    compile_json_object,
    compile_json_schema,
    compile_regex,
)
from fledge.server.errors import ApiError, api_error
from fledge.server.schema import ChatMessage, ChatRequest, GenerationRequest, ResponseFormat
from fledge.tokenizer import ChatTemplate, Tokenizer, render_segments, template_named

NO_TOOLS = "none"


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids, and the places in them where messages end."""

    ids: tuple[int, ...]
    marks: tuple[int, ...] = ()


def template_of(name: str | None, standard: str, param: str = "fledge.template") -> ChatTemplate:
    """The template a request names, else the model's."""
    try:
        return template_named(name or standard)
    except UsageError as error:
        raise api_error(error, param) from None


def turns(
    messages: list[ChatMessage], template: ChatTemplate, tools: list[dict[str, Any]] | None = None
) -> list[tuple[str, str]]:
    """Messages of the protocol as the roles and texts of a template.

    Raises ApiError for a role that the template has not, a message without text, or tools that are none.
    """
    found = [_turn(message, number) for number, message in enumerate(messages)]
    if tools:
        try:
            text = calling.render_tools(tools)
        except FledgeError as error:
            raise api_error(error, "tools") from None
        first = found[0][1] if found[0][0] == "system" else ""
        found[: bool(first)] = [("system", f"{first}\n{text}" if first else text)]
    for number, (role, _) in enumerate(found):
        if role not in template.labels:
            raise ApiError(
                400,
                f"template {template.name!r} has no role {role!r}; it has {', '.join(template.labels)}",
                param="tools" if tools and not number else f"messages.{number}.role",
            )
    return found


def prompt(turns: list[tuple[str, str]], template: ChatTemplate, tokenizer: Tokenizer) -> ChatPrompt:
    """The ids of a conversation, up to where the model answers."""
    ids, marks = list[int](), list[int]()
    for piece in render_segments(turns, template):
        ids += tokenizer.encode(piece)
        marks.append(len(ids))
    return ChatPrompt(tuple(ids), tuple(marks))


def closing(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the state reads after an answer, so that a next message can follow."""
    return tuple(tokenizer.encode(template.close_turn()))


def chat_params(request: ChatRequest, template: ChatTemplate, most: int) -> SamplingParams:
    """The settings of a chat request; what it leaves open is as in `fledge chat`."""
    wanted = request.max_completion_tokens or request.max_tokens
    params = _params(request, replace(CHAT_PARAMS, max_tokens=most), wanted)
    return replace(params, stop=tuple(dict.fromkeys((*template.stops, *params.stop))))


def completion_params(request: GenerationRequest, most: int, wanted: int | None) -> SamplingParams:
    """The settings of a completion request; what it leaves open is as in `fledge generate`."""
    return _params(request, SamplingParams(max_tokens=most), wanted)


def _params(request: GenerationRequest, standard: SamplingParams, max_tokens: int | None) -> SamplingParams:
    options = request.fledge
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": options.top_k,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "penalty_decay": options.penalty_decay,
        "seed": request.seed,
        "max_tokens": max_tokens,
        "stop": tuple([request.stop] if isinstance(request.stop, str) else request.stop or ()),
        "ban": (*(options.ban or ()), *_banned(request.logit_bias)),
    }
    try:
        return standard.with_overrides({name: value for name, value in given.items() if value is not None})
    except UsageError as error:
        raise api_error(error, str(error).split(" ")[0]) from None


def _banned(bias: dict[str, float] | None) -> tuple[int, ...]:
    """The ids that a bias of -100 forbids; no other bias can be honoured."""
    for token, value in (bias or {}).items():
        if not token.isascii() or not token.isdigit() or value != -100:
            raise ApiError(400, f"logit_bias {token!r}: {value:g}; only token ids with -100, never, are supported",
                           param="logit_bias")  # fmt: skip
    return tuple(int(token) for token in bias or ())


def constraint_of(request: ChatRequest, vocabulary: GrammarVocabulary) -> Constraint | None:
    """What the answer must fit. Raises ApiError for two demands at once, and for a schema that cannot be met."""
    wishes = {
        "response_format": request.response_format is not None and request.response_format.type != "text",
        "tools": bool(request.tools) and request.tool_choice != NO_TOOLS,
        "fledge.regex": request.fledge.regex is not None,
    }
    chosen = [name for name, wished in wishes.items() if wished]
    if len(chosen) > 1:
        raise ApiError(400, f"{' and '.join(chosen)} cannot both bind one answer; give one of them", param=chosen[1])
    if not chosen:
        return None
    try:
        if request.fledge.regex is not None:
            return compile_regex(request.fledge.regex, vocabulary)
        if wishes["tools"]:
            parallel = request.parallel_tool_calls is not False
            return calling.compile_tool_calls(
                request.tools or [], request.tool_choice or "auto", vocabulary, parallel=parallel
            )
        assert request.response_format is not None
        return _format(request.response_format, vocabulary)
    except FledgeError as error:
        raise api_error(error, "tools" if wishes["tools"] else chosen[0]) from None


def _format(wanted: ResponseFormat, vocabulary: GrammarVocabulary) -> Constraint:
    if wanted.type == "json_object":
        return compile_json_object(vocabulary, leading_space=True)
    if wanted.json_schema is None:
        raise ApiError(
            400, "a response_format of type json_schema needs a json_schema", param="response_format.json_schema"
        )
    return compile_json_schema(wanted.json_schema.schema_, vocabulary, leading_space=True)


def _turn(message: ChatMessage, number: int) -> tuple[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if content is None and not message.tool_calls:
        raise ApiError(400, "a message needs content", param=f"messages.{number}.content")
    if message.tool_calls:
        if message.role != "assistant":
            raise ApiError(400, "only an assistant calls functions", param=f"messages.{number}.tool_calls")
        calls = [calling.ParsedToolCall(call.function.name, call.function.arguments) for call in message.tool_calls]
        text = "\n".join(filter(None, [text, calling.render_tool_calls(calls)]))
    if message.role == "tool":
        return "user", calling.render_tool_result(text)
    return ("system" if message.role == "developer" else message.role), text
