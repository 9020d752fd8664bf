"""Calls of functions by a model that has no tokens for them: how they are written, bound to a grammar, and read.

A call is text, in the form that several families of models were taught:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

Several calls follow each other line by line, and nothing follows them. No text made here has a blank line, because
that ends a turn in the chat templates.

Here: the functions as text for the system turn, the grammar, calls and results to text and back. Not here: running a
function, and HTTP; tools and choices have the shape of the OpenAI API, as Python values.
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

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HEAD = re.compile(r'<tool_call>\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
TAIL = re.compile(r"\s*\}\s*</tool_call>")
DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # only the end is asked for, so numbers may have any size


@dataclass(frozen=True)
class ParsedToolCall:
    """A function that the model asks for; `arguments` is the text of a JSON object, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolDefinition:
    """A tool that was found sound."""

    name: str
    definition: dict[str, Any]  # what the model is told
    schema: str  # of the arguments, for the grammar


def compile_tool_calls(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, vocabulary: GrammarVocabulary, *, parallel: bool = True
) -> Constraint:
    """Calls of `tools`, each {"type": "function", "function": {"name", "description", "parameters"}}.

    With choice `auto` any text, in which `<tool_call>` begins a call; with `required` calls only, and with a function's
    name one call of that one. The arguments fit the parameters, a JSON Schema, and are written as in `json_schema`.
    parallel: whether more than one call may come, where none is named.

    Raises UsageError for tools or a choice of another shape, and for parameters as `json_schema` does.
    """
    bodies = [_body(function) for function in _chosen(_functions(tools), choice)]
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
        raise UsageError(f"the tools have {len(source)} characters; at most {2 * MAX_SCHEMA_CHARACTERS} are taken")
    return compile_grammar(source, vocabulary, "grammar of the tools")


def render_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system turn says of `tools`: how to call, then a line of JSON for each. Raises UsageError."""
    head = (
        "You can call functions. To call one, write its name and its arguments, a JSON object, in this form:\n"
        '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>\n'
        "These are the functions:"
    )
    return "\n".join([head, *(json.dumps(function.definition, ensure_ascii=False) for function in _functions(tools))])


def render_tool_calls(calls: Iterable[ParsedToolCall]) -> str:
    """Calls as the model writes them, for an assistant's turn that is read again."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' for call in calls
    )


def render_tool_result(content: str) -> str:
    """What a function returned, for the turn after the call."""
    return f"<tool_response>\n{content}\n</tool_response>"


def parse_tool_calls(text: str) -> tuple[str, list[ParsedToolCall]]:
    """The text beside the calls, and the calls, in order. What is no whole call stays text; without any, all of it."""
    calls, pieces, place = list[ParsedToolCall](), list[str](), 0
    while head := HEAD.search(text, place):
        end = _end_of_json(text, head.end())
        tail = TAIL.match(text, end) if end else None
        if tail:
            calls.append(ParsedToolCall(head[1], text[head.end() : end]))
        pieces.append(text[place : head.start() if tail else head.end()])
        place = tail.end() if tail else head.end()
    pieces.append(text[place:])
    return ("".join(pieces).strip(), calls) if calls else (text, [])


def _end_of_json(text: str, start: int) -> int | None:
    try:
        return DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[ToolDefinition]:
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence) or not 1 <= len(tools) <= MAX_TOOLS:
        raise UsageError(f"tools must be a list of 1 to {MAX_TOOLS} tools")
    functions = [_function(tool, at) for at, tool in enumerate(tools)]
    names = [function.name for function in functions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two tools have the name {twice[0]!r}")
    return functions


def _function(tool: Any, at: int) -> ToolDefinition:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise UsageError(f'tools[{at}] must be {{"type": "function", "function": {{"name": ...}}}}')
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"tools[{at}] has the name {name!r}; it must have 1 to 64 letters of A-Z, a-z, 0-9, _ and -")
    if description is not None and not isinstance(description, str):
        raise UsageError(f"tool {name!r} has the description {description!r}; it must be text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise UsageError(f"the parameters of tool {name!r} must be a JSON Schema of type object")
    typed = parameters.keys() & {"type", "$ref", "anyOf", "allOf", "oneOf"}
    schema = normalize_schema(
        dict(parameters) if typed else {"type": "object", **parameters}, f"schema of tool {name!r}"
    )
    about = {} if description is None else {"description": description}
    return ToolDefinition(name, {"name": name, **about, "parameters": parameters}, schema)


def _chosen(functions: list[ToolDefinition], choice: ToolChoice) -> list[ToolDefinition]:
    """The functions that may be called."""
    if choice in ("auto", "required"):
        return functions
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise UsageError(
            f"tool_choice is {choice!r}; it must be 'auto', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    found = [one for one in functions if one.name == function["name"]]
    if not found:
        raise UsageError(f"tool_choice names {function['name']!r}, which is not among the tools")
    return found


def _body(function: ToolDefinition) -> str:
    """The Lark rule for what follows `<tool_call>` in a call of `function`."""
    opening = json.dumps(f'\n{{"name": "{function.name}", "arguments": ')
    return f'{opening} %json {function.schema} "}}\\n</tool_call>"'
