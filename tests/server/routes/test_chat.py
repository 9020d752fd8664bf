"""Tool calls in chat completions: complete calls are emitted, incomplete ones never, neither as calls nor as text."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel
from live_server import CHAT, HI, serving

from fledge.engine.llm.llm import LLM

CALL = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "a"}}]


def tool_calling_llm(text: str) -> LLM:
    """A model that answers with `text`, one byte per token."""
    tokenizer = ByteTokenizer("\n\n", "Assistant:")
    model = FakeModel([tokenizer.encode(text)], tokenizer.get_id("Assistant:"), tokenizer.vocab_size)
    return LLM(model, tokenizer, "fake")


def test_a_tool_call_is_text_if_no_call_is_allowed() -> None:
    with serving(tool_calling_llm(CALL + "\n\n")) as server:
        for tool_choice, is_call in (("auto", True), ("none", False)):
            choice = server.ask("Hi", temperature=0, tools=TOOLS, tool_choice=tool_choice)["choices"][0]
            assert choice["finish_reason"] == ("tool_calls" if is_call else "stop")
            assert choice["message"]["content"] == (None if is_call else CALL)
            assert ("tool_calls" in choice["message"]) is is_call


@pytest.mark.parametrize(
    ("max_tokens", "tool_choice", "num_calls", "content", "reason"),
    [
        (1, "required", 0, "", "length"),
        (1, "auto", 0, "<", "length"),  # a single "<" may be text
        (10, "auto", 0, "", "length"),
        (len(CALL) - 1, "required", 0, "", "length"),
        (len(CALL), "required", 1, None, "tool_calls"),
        (len(CALL) + 1, "required", 1, None, "tool_calls"),
        (len(CALL) + 2, "required", 1, None, "length"),
        (len(CALL) + 20, "auto", 1, None, "length"),
        (2 * len(CALL) + 1, "auto", 2, None, "tool_calls"),
        (200, {"type": "function", "function": {"name": "a"}}, 1, None, "tool_calls"),
    ],
)
def test_an_incomplete_tool_call_is_not_emitted(
    max_tokens: int, tool_choice: Any, num_calls: int, content: str | None, reason: str
) -> None:
    fields = {"temperature": 0, "tools": TOOLS, "tool_choice": tool_choice, "max_tokens": max_tokens}
    with serving(tool_calling_llm(f"{CALL}\n{CALL}")) as server:
        choice = server.ask("Hi", **fields)["choices"][0]
    with serving(tool_calling_llm(f"{CALL}\n{CALL}")) as server:
        chunks = [event["choices"][0] for event in server.stream(CHAT, {"messages": HI, **fields})]
    assert choice["message"]["content"] == content and choice["finish_reason"] == reason
    assert len(choice["message"].get("tool_calls", [])) == num_calls
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == (content or "")
    assert sum(len(chunk["delta"].get("tool_calls", [])) for chunk in chunks) == num_calls
    assert chunks[-1]["finish_reason"] == reason
