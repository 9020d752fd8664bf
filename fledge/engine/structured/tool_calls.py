"""Tool calls for models without special tokens for them: rendering, the grammar, and parsing.

A call is text, in the form that several families of models were trained on:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

Several calls follow each other line by line, and nothing follows them. No text rendered here has a blank line, because
that ends a turn in the chat templates. Tools and choices have the shape of the OpenAI API, as Python values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fledge.core.errors import UsageError
from fledge.engine.structured.grammar import (
    MAX_SCHEMA_CHARACTERS,
    Constraint,
    GrammarVocabulary,
    compile_grammar,
    normalize_schema,
)

MAX_TOOLS = 128

ToolChoice = str | Mapping[str, Any]
"""`auto`, `required`, or {"type": "function", "function": {"name": ...}}. `none` needs no constraint."""

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CALL_START = re.compile(r'<tool_call>\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
CALL_END = re.compile(r"\s*\}\s*</tool_call>")
DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # only finds the end of JSON, so numbers may be of any size


@dataclass(frozen=True)
class ParsedToolCall:
    """A call that the model has generated; `arguments` is the generated text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolDefinition:
    """A tool that has been validated."""

    name: str
    definition: dict[str, Any]  # what the prompt says about the tool
    schema: str  # JSON Schema text of the arguments, for the grammar


def compile_tool_calls(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, vocabulary: GrammarVocabulary, *, parallel: bool = True
) -> Constraint:
    """The constraint for calls of `tools`: {"type": "function", "function": {"name", "description", "parameters"}}
    each.

    Choice `auto` allows any text, in which `<tool_call>` starts a call. `required` allows calls only, and the name of a
    function one call of that function. The arguments fit the parameters, a JSON Schema; see `compile_json_schema`.
    parallel: whether more than one call is allowed if the choice names no function.

    Raises UsageError for an invalid shape of the tools or the choice, and for parameters as `compile_json_schema` does.
    """
    bodies = [_call_rule(function) for function in _choose(_parse_tools(tools), choice)]
    more = ' ("\\n<tool_call>" body)*' if parallel and isinstance(choice, str) else ""
    first = "head" if choice == "auto" else '" "? "<tool_call>"'
    lines = [
        f"start: {'TEXT | ' if choice == 'auto' else ''}{first} body{more}",
        *(["head[lazy]: TEXT /<tool_call>/", "TEXT: /(?s:.*)/"] if choice == "auto" else []),
        f"body: {' | '.join(f'body{number}' for number in range(len(bodies)))}",
        *(f"body{number}: {body}" for number, body in enumerate(bodies)),
    ]
    source = "\n".join(lines)
    if len(source) > 2 * MAX_SCHEMA_CHARACTERS:
        raise UsageError(f"the tools have {len(source)} characters; at most {2 * MAX_SCHEMA_CHARACTERS} are allowed")
    return compile_grammar(source, vocabulary, "grammar of the tools")


def render_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text about `tools` for the system turn: how to call, then a line of JSON for each. Raises UsageError."""
    head = (
        "You can call functions. To call one, write its name and its arguments, a JSON object, in this form:\n"
        '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>\n'
        "These are the functions:"
    )
    return "\n".join([head, *(json.dumps(function.definition, ensure_ascii=False) for function in _parse_tools(tools))])


def render_tool_calls(calls: Iterable[ParsedToolCall]) -> str:
    """Calls as the model generates them, for an assistant turn in a prompt."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' for call in calls
    )


def render_tool_result(content: str) -> str:
    """The result of a call, for the turn after it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def parse_tool_calls(text: str) -> tuple[str, list[ParsedToolCall]]:
    """The text around the calls, and the calls, in order. Incomplete calls stay in the text.

    Without any complete call, the text is returned unchanged.
    """
    calls, parts, position = list[ParsedToolCall](), list[str](), 0
    while start := CALL_START.search(text, position):
        json_end = _find_json_end(text, start.end())
        end = CALL_END.match(text, json_end) if json_end else None
        if end:
            calls.append(ParsedToolCall(start[1], text[start.end() : json_end]))
        parts.append(text[position : start.start() if end else start.end()])
        position = end.end() if end else start.end()
    parts.append(text[position:])
    return ("".join(parts).strip(), calls) if calls else (text, [])


def _find_json_end(text: str, start: int) -> int | None:
    try:
        return DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _parse_tools(tools: Sequence[Mapping[str, Any]]) -> list[ToolDefinition]:
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence) or not 1 <= len(tools) <= MAX_TOOLS:
        raise UsageError(f"tools must be a list of 1 to {MAX_TOOLS} tools")
    functions = [_parse_tool(tool, index) for index, tool in enumerate(tools)]
    names = [function.name for function in functions]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two tools have the name {duplicates[0]!r}")
    return functions


def _parse_tool(tool: Any, index: int) -> ToolDefinition:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise UsageError(f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}')
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise UsageError(
            f"tools[{index}] has the name {name!r}; it must have 1 to 64 letters of A-Z, a-z, 0-9, _ and -"
        )
    if description is not None and not isinstance(description, str):
        raise UsageError(f"tool {name!r} has the description {description!r}; it must be text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise UsageError(f"the parameters of tool {name!r} must be a JSON Schema of type object")
    type_keywords = parameters.keys() & {"type", "$ref", "anyOf", "allOf", "oneOf"}
    schema = normalize_schema(
        dict(parameters) if type_keywords else {"type": "object", **parameters}, f"schema of tool {name!r}"
    )
    described = {} if description is None else {"description": description}
    return ToolDefinition(name, {"name": name, **described, "parameters": parameters}, schema)


def _choose(functions: list[ToolDefinition], choice: ToolChoice) -> list[ToolDefinition]:
    """The functions that the choice allows."""
    if choice in ("auto", "required"):
        return functions
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise UsageError(
            f"tool_choice is {choice!r}; it must be 'auto', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    chosen = [each for each in functions if each.name == function["name"]]
    if not chosen:
        raise UsageError(f"tool_choice names {function['name']!r}, which is not one of the tools")
    return chosen


def _call_rule(function: ToolDefinition) -> str:
    """The Lark rule for the text after `<tool_call>` in a call of `function`."""
    opening = json.dumps(f'\n{{"name": "{function.name}", "arguments": ')
    return f'{opening} %json {function.schema} "}}\\n</tool_call>"'
