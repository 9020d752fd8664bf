"""Prompts, sampling parameters and constraints of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.generation import check_token_ids
from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.llm.llm import LLM
from fledge.engine.sampling import SamplingParams
from fledge.engine.structured.grammar import (
    Constraint,
    GrammarVocabulary,
    compile_json_object,
    compile_json_schema,
    compile_regex,
)
from fledge.engine.structured.tool_calls import (
    ParsedToolCall,
    compile_tool_calls,
    render_tool_calls,
    render_tool_result,
    render_tools,
)
from fledge.server.concurrency import run_blocking
from fledge.server.errors import ApiError, to_api_error
from fledge.server.schema import ChatMessage, ChatRequest, GenerationRequest, ResponseFormat
from fledge.tokenizer import ChatTemplate, Tokenizer, render_segments, template_named


@dataclass(frozen=True)
class EncodedPrompt:
    """The token ids of a prompt, and the positions in them where messages end."""

    ids: tuple[int, ...]
    message_ends: tuple[int, ...] = ()


def find_template(name: str | None, default: str, param: str = "fledge.template") -> ChatTemplate:
    """The chat template with this name, or the default. Raises ApiError for an unknown name."""
    try:
        return template_named(name or default)
    except UsageError as error:
        raise to_api_error(error, param) from None


def to_turns(
    messages: Sequence[ChatMessage], template: ChatTemplate, tools: list[dict[str, Any]] | None = None
) -> list[tuple[str, str]]:
    """The roles and texts of messages, as the template expects them. Tools are added to the system message.

    Raises ApiError for a role that the template does not have, a message without text, and invalid tools.
    """
    turns = [_to_turn(message, index) for index, message in enumerate(messages)]
    if tools:
        try:
            tools_text = render_tools(tools)
        except FledgeError as error:
            raise to_api_error(error, "tools") from None
        system = turns[0][1] if turns[0][0] == "system" else ""
        turns[: bool(system)] = [("system", f"{system}\n{tools_text}" if system else tools_text)]
    for index, (role, _) in enumerate(turns):
        if role not in template.labels:
            raise ApiError(
                400,
                f"template {template.name!r} has no role {role!r}; its roles are {', '.join(template.labels)}",
                param="tools" if tools and not index else f"messages.{index}.role",
            )
    return turns


def encode_turns(turns: list[tuple[str, str]], template: ChatTemplate, tokenizer: Tokenizer) -> EncodedPrompt:
    """The prompt of a conversation, up to the label of the next answer."""
    ids, message_ends = list[int](), list[int]()
    for segment in render_segments(turns, template):
        ids += tokenizer.encode(segment)
        message_ends.append(len(ids))
    return EncodedPrompt(tuple(ids), tuple(message_ends))


async def encode_texts(llm: LLM, texts: Sequence[str | list[int]], param: str) -> list[tuple[int, ...]]:
    """The token ids of each text. Raises ApiError for ids outside the vocabulary."""

    def encode() -> list[tuple[int, ...]]:
        encoded = [tuple(llm.tokenizer.encode(text) if isinstance(text, str) else text) for text in texts]
        for ids in encoded:
            check_token_ids(ids, llm.config.vocab_size)
        return encoded

    try:
        return await run_blocking(sum(map(len, texts)), encode)
    except FledgeError as error:
        raise to_api_error(error, param) from None


def make_chat_params(request: ChatRequest, template: ChatTemplate, default_max_tokens: int) -> SamplingParams:
    """The sampling parameters of a chat request, with the defaults of `fledge chat`."""
    params = _make_params(request, replace(CHAT_PARAMS, max_tokens=default_max_tokens))
    return replace(params, stop=tuple(dict.fromkeys((*template.stops, *params.stop))))


def make_completion_params(request: GenerationRequest, default_max_tokens: int) -> SamplingParams:
    """The sampling parameters of a completion request, with the defaults of `fledge generate`."""
    return _make_params(request, SamplingParams(max_tokens=default_max_tokens))


def _make_params(request: GenerationRequest, default: SamplingParams) -> SamplingParams:
    options = request.fledge
    values = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": options.top_k,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "penalty_decay": options.penalty_decay,
        "seed": request.seed,
        "max_tokens": request.requested_max_tokens or None,  # 0: only read the prompt
        "stop": tuple([request.stop] if isinstance(request.stop, str) else request.stop or ()),
        "ban": (*(options.ban or ()), *_parse_logit_bias(request.logit_bias)),
    }
    try:
        return default.with_overrides({name: value for name, value in values.items() if value is not None})
    except UsageError as error:
        raise to_api_error(error, str(error).split(" ")[0]) from None


def _parse_logit_bias(logit_bias: dict[str, float] | None) -> tuple[int, ...]:
    """The token ids with a bias of -100, which bans them. No other bias is supported."""
    for token, bias in (logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or bias != -100:
            message = f"logit_bias {token!r}: {bias:g}; only token ids with a bias of -100 (banned) are supported"
            raise ApiError(400, message, param="logit_bias")
    return tuple(int(token) for token in logit_bias or ())


def compile_constraint(request: ChatRequest, vocabulary: GrammarVocabulary) -> Constraint | None:
    """The constraint of the answer. Raises ApiError for more than one, and for an unsupported schema."""
    has_constraint = {
        "response_format": request.response_format is not None and request.response_format.type != "text",
        "tools": request.uses_tools,
        "fledge.regex": request.fledge.regex is not None,
    }
    params = [name for name, is_present in has_constraint.items() if is_present]
    if len(params) > 1:
        raise ApiError(400, f"{' and '.join(params)} cannot be combined; give one of them", param=params[1])
    if not params:
        return None
    try:
        if request.fledge.regex is not None:
            return compile_regex(request.fledge.regex, vocabulary)
        if has_constraint["tools"]:
            parallel = request.parallel_tool_calls is not False
            return compile_tool_calls(request.tools or [], request.tool_choice or "auto", vocabulary, parallel=parallel)
        assert request.response_format is not None
        return _compile_response_format(request.response_format, vocabulary)
    except FledgeError as error:
        raise to_api_error(error, params[0]) from None


def _compile_response_format(response_format: ResponseFormat, vocabulary: GrammarVocabulary) -> Constraint:
    if response_format.type == "json_object":
        return compile_json_object(vocabulary, leading_space=True)
    if response_format.json_schema is None:
        message = "a response_format of type json_schema needs a json_schema"
        raise ApiError(400, message, param="response_format.json_schema")
    return compile_json_schema(response_format.json_schema.schema_, vocabulary, leading_space=True)


def _to_turn(message: ChatMessage, index: int) -> tuple[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if content is None and not message.tool_calls:
        raise ApiError(400, "a message needs content", param=f"messages.{index}.content")
    if message.tool_calls:
        if message.role != "assistant":
            raise ApiError(400, "only the assistant can call tools", param=f"messages.{index}.tool_calls")
        calls = [ParsedToolCall(call.function.name, call.function.arguments) for call in message.tool_calls]
        text = "\n".join(filter(None, [text, render_tool_calls(calls)]))
    if message.role == "tool":
        return "user", render_tool_result(text)
    return ("system" if message.role == "developer" else message.role), text
