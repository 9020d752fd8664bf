"""Tool calls: the grammar allows only valid calls, and the text is parsed back into calls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from fakes import ByteTokenizer

from fledge.core.errors import UsageError
from fledge.engine.structured.grammar import Constraint, GrammarVocabulary
from fledge.engine.structured.tool_calls import (
    ParsedToolCall,
    compile_tool_calls,
    parse_tool_calls,
    render_tool_calls,
    render_tool_result,
    render_tools,
)
from fledge.tokenizer import render


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more} if parameters is None else {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": function}


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "東京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
            "required": ["kids"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    tool("weather", WEATHER, description="The weather.\n\nFor days."),
    tool("weather_now"),
    tool("tree", TREE, strict=True),
]
ROME = ParsedToolCall("weather", '{"city": "Rome", "days":3}')
NOW = ParsedToolCall("weather_now", "{}")


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer("<tool", "_call>", "<tool_call>\n{", "name", '": "', "weather", "}\n</tool_call>")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: ByteTokenizer) -> GrammarVocabulary:
    pytest.importorskip("llguidance", reason="needs llguidance")
    return GrammarVocabulary(tokenizer)


def accepted(constraint: Constraint, tokenizer: ByteTokenizer, text: str) -> str:
    """The prefix of `text` that the constraint accepts, with a full stop if it is the whole text and may end there."""
    ids = tokenizer.encode(text)
    for index, token in enumerate(ids):
        if not constraint.token_mask()[token]:
            # If only one text can follow, the mask has only one tokenization of it; `accept` allows the others too.
            try:
                constraint.fork().accept(token)
            except UsageError:
                return tokenizer.decode(ids[:index])
        constraint.accept(token)
    return text + "." * constraint.is_accepting


def test_choice_required(tokenizer: ByteTokenizer, vocabulary: GrammarVocabulary) -> None:
    start = compile_tool_calls(TOOLS, "required", vocabulary)
    for text in (render_tool_calls([ROME]), render_tool_calls([ROME, NOW, ROME]), " " + render_tool_calls([NOW])):
        assert accepted(start.fork(), tokenizer, text) == text + "."
    assert accepted(start.fork(), tokenizer, "Hello") == ""
    assert accepted(start.fork(), tokenizer, render_tool_calls([NOW]) + "\nHello") == render_tool_calls([NOW]) + "\n"
    oslo = render_tool_calls([ParsedToolCall("weather", '{"city": "Oslo"')])
    assert accepted(start.fork(), tokenizer, oslo) == oslo[: oslo.index("Oslo")]
    assert accepted(start.fork(), tokenizer, render_tool_calls([ParsedToolCall("wind", "{}")])).endswith('"name": "w')
    kids = render_tool_calls([ParsedToolCall("tree", '{"kids": [{"kids": []},{"kids":[]}]}')])
    assert accepted(start.fork(), tokenizer, kids) == kids + "."


def test_one_call_only(tokenizer: ByteTokenizer, vocabulary: GrammarVocabulary) -> None:
    choice = {"type": "function", "function": {"name": "weather_now"}}
    start = compile_tool_calls(TOOLS, choice, vocabulary)
    for constraint in (start.fork(), compile_tool_calls(TOOLS, "required", vocabulary, parallel=False)):
        assert (
            accepted(constraint, tokenizer, render_tool_calls([NOW])) == render_tool_calls([NOW]) + "."
            and constraint.is_complete
        )
        assert np.flatnonzero(constraint.token_mask()).tolist() == [tokenizer.eos_id]
    assert accepted(start.fork(), tokenizer, render_tool_calls([ROME])).endswith('"weather')
    several = compile_tool_calls(TOOLS, "required", vocabulary)
    accepted(several, tokenizer, render_tool_calls([NOW]))
    assert several.is_accepting and not several.is_complete


def test_choice_auto(tokenizer: ByteTokenizer, vocabulary: GrammarVocabulary) -> None:
    start = compile_tool_calls(TOOLS, "auto", vocabulary)
    for text in ("Hello <tool> & <tool_c 🙂\n\n", " I look.\n" + render_tool_calls([ROME, NOW])):
        assert accepted(start.fork(), tokenizer, text) == text + "."
    assert accepted(start.fork(), tokenizer, "So <tool_call> is").startswith("So <tool_call>")
    assert not accepted(start.fork(), tokenizer, "So <tool_call> is").endswith("is.")
    assert accepted(start.fork(), tokenizer, render_tool_calls([NOW]) + " And").endswith("</tool_call>")


def test_random_calls_are_parsed(tokenizer: ByteTokenizer, vocabulary: GrammarVocabulary) -> None:
    start, random, names = compile_tool_calls(TOOLS, "required", vocabulary), np.random.default_rng(7), set[str]()
    for _ in range(50):
        constraint, ids = start.fork(), list[int]()
        while not ids or ids[-1] != tokenizer.eos_id:
            ids.append(int(random.choice(np.flatnonzero(constraint.token_mask()))))
            constraint.accept(ids[-1])
        content, calls = parse_tool_calls(tokenizer.decode(ids))
        assert content == "" and calls and parse_tool_calls(render_tool_calls(calls)) == ("", calls)
        for call in calls:
            names.add(call.name)
            if call.name == "weather":
                arguments = json.loads(call.arguments)
                assert list(arguments) == ["city", "days"] and arguments["city"] in ("Rome", "東京")
                assert 1 <= arguments["days"] <= 9
    assert names == {"weather", "weather_now", "tree"}


HARD = ParsedToolCall("say", '{"text": "</tool_call> } \\" <tool_call>", "n": ' + "9" * 5_000 + "}")


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("Hello.\n", "Hello.\n", []),
        (render_tool_calls([HARD, NOW]), "", [HARD, NOW]),
        ("I look.\n" + render_tool_calls([ROME]) + "\nThere.", "I look.\n\nThere.", [ROME]),
        ('<tool_call>{"name":"a" , "arguments":{"b":[1]} }</tool_call>', "", [ParsedToolCall("a", '{"b":[1]}')]),
        (render_tool_calls([ROME])[:-3], render_tool_calls([ROME])[:-3], []),
        (
            '<tool_call>\n{"name": "a", "arguments": {]}}\n</tool_call>',
            '<tool_call>\n{"name": "a", "arguments": {]}}\n</tool_call>',
            [],
        ),
        (
            '<tool_call>\n{"name": "a", "arguments": 3}\n</tool_call>',
            '<tool_call>\n{"name": "a", "arguments": 3}\n</tool_call>',
            [],
        ),
    ],
)
def test_parsing(text: str, content: str, calls: list[ParsedToolCall]) -> None:
    assert parse_tool_calls(text) == (content, calls)


def test_an_incomplete_call_stays_in_the_text() -> None:
    cut = '<tool_call>\n{"name": "a", "arguments": {"b": ' + "[" * 100_000
    assert parse_tool_calls(cut) == (cut, [])
    assert parse_tool_calls(render_tool_calls([NOW]) + cut) == (cut, [NOW])


def test_rendered_texts_fit_into_turns() -> None:
    text = render_tools(TOOLS)
    assert "\n\n" not in text + render_tool_calls([ROME, NOW]) + render_tool_result("18 C")
    lines = [json.loads(line) for line in text.splitlines()[-3:]]
    assert [line["name"] for line in lines] == ["weather", "weather_now", "tree"]
    assert lines[0] == {"name": "weather", "description": "The weather.\n\nFor days.", "parameters": WEATHER}
    assert text in render([("system", text), ("user", "Rome?")])
    assert "18 C" in render([("user", render_tool_result("18 C"))])


@pytest.mark.parametrize(
    "tools, choice, words",
    [
        ([], "auto", "1 to 128"),
        ("tools", "auto", "1 to 128"),
        ([tool(f"t{index}") for index in range(129)], "auto", "1 to 128"),
        ([{"type": "retrieval"}], "auto", r"tools\[0\] must be"),
        ([NOW], "auto", r"tools\[0\] must be"),
        ([tool("a"), tool("b c")], "auto", r"tools\[1\] has the name 'b c'"),
        ([tool("a"), tool("a")], "auto", "two tools have the name 'a'"),
        ([tool("a", description=3)], "auto", "description 3"),
        ([tool("a", ["x"])], "auto", "parameters of tool 'a'"),
        ([tool("a", {"type": "array"})], "auto", "parameters of tool 'a'"),
        ([tool("a", {"properties": {"x": {"type": "strin"}}})], "auto", "Invalid type: strin"),
        ([tool("a", {"enum": ["x" * 70_000]})], "auto", "schema of tool 'a' has 70032 characters"),
        ([tool(f"t{index}", {"description": "x" * 30_000}) for index in range(5)], "auto", "the tools have 1"),
        (TOOLS, "none", "tool_choice is 'none'"),
        (TOOLS, {"type": "function"}, "tool_choice is"),
        (TOOLS, {"type": "function", "function": {"name": "rain"}}, "names 'rain'"),
    ],
)
def test_invalid_tools_and_choices(vocabulary: GrammarVocabulary, tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compile_tool_calls(tools, choice, vocabulary)
    assert "\n" not in str(caught.value)
