"""Chat templates: the exact texts, and the traps in them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import UsageError
from fledge.tokenizer import TEMPLATES, load_world, render, render_segments, template_named


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        ("world", [("user", "q")], "User: q\n\nAssistant:"),
        ("world", [{"role": "user", "content": "q", "name": "x"}], "User: q\n\nAssistant:"),
        (
            "world",
            [("user", "q1"), ("assistant", "a1"), ("user", "q2")],
            "User: q1\n\nAssistant: a1\n\nUser: q2\n\nAssistant:",
        ),
        ("world", [("system", "s"), ("user", "q")], "System: s\n\nUser: q\n\nAssistant:"),
        ("world", [("user", "q"), ("assistant", "It is ")], "User: q\n\nAssistant: It is"),
        ("world", [("user", "q"), ("assistant", "")], "User: q\n\nAssistant:"),
        ("world", [("user", "")], "User:\n\nAssistant:"),
        ("world", [("user", " \r\na\r\n\r\n\nb\rc \n")], "User: a\nb\nc\n\nAssistant:"),
        ("instruct", [("user", "i"), ("input", "x")], "Instruction: i\n\nInput: x\n\nResponse:"),
        ("instruct", [("user", "i"), ("input", " \n")], "Instruction: i\n\nResponse:"),
        ("instruct", [("user", "i")], "Instruction: i\n\nResponse:"),
        ("qa", [("user", "q")], "Question: q\n\nAnswer:"),
    ],
)
def test_exact_texts(template: str, messages: list[Any], text: str) -> None:
    assert render(messages, template) == text
    assert render(messages, TEMPLATES[template]) == text


def test_finished_conversation_has_no_answer() -> None:
    messages = [("user", "q"), ("assistant", "a"), ("user", "q2")]
    assert render(messages, answer=False) == "User: q\n\nAssistant: a\n\nUser: q2"


CONTENT = st.text(st.sampled_from("ab \t\r\n:"), max_size=12)


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5))
def test_blank_lines_separate_turns_and_nothing_else(name: str, contents: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    text = render(zip(roles, contents, strict=False), name)
    turns = len(contents) + len(contents) % 2
    assert text.count("\n\n") == turns - 1 and "\n\n\n" not in text and "\r" not in text
    assert text == text.rstrip()


@pytest.mark.parametrize("name", TEMPLATES)
@given(first=CONTENT, second=CONTENT)
def test_a_session_adds_up_to_the_whole_conversation(name: str, first: str, second: str) -> None:
    template = template_named(name)
    session = template.open_turn(first) + " an answer" + template.close_turn() + template.open_turn(second)
    assert session == render([("user", first), ("assistant", "an answer"), ("user", second)], template)


def test_session_can_start_with_a_system_turn() -> None:
    template = template_named("world")
    text = template.turn("system", "s") + template.close_turn() + template.open_turn("q")
    assert text == render([("system", "s"), ("user", "q")])


def test_stop_texts() -> None:
    assert all(template.stops == ("\n\n",) for template in TEMPLATES.values())
    assert TEMPLATES["world"].label_stops == ("\n\nSystem:", "\n\nUser:", "\n\nAssistant:")
    assert TEMPLATES["qa"].label_stops == ("\n\nQuestion:", "\n\nAnswer:")


def test_prompts_end_in_the_colon_the_models_know() -> None:
    # With a space after it the prompt ends in another token, and the answer cannot start with its own space.
    assert load_world().encode(render([("user", "q")]))[-3:] == [5585, 41693, 59]


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([("user", "q")], "chatml", "'chatml'.*world, instruct, qa"),
        ([("wizard", "q")], "world", "'wizard'.*system, user, assistant"),
        ([("system", "s"), ("user", "q")], "qa", "'system'.*user, assistant"),
        ([("user", "q"), ("tool", "")], "instruct", "'tool'.*user, input, assistant"),
        ([], "world", "at least one message"),
        ([("user", "q"), {"role": "user"}], "world", "message 1 .*NoneType"),
        ([{"content": "q"}], "world", "message 0 .*NoneType"),
        ([{"role": "user", "content": ["q"]}], "world", "message 0 .*list"),
    ],
)
def test_mistakes_are_named(messages: list[Any], template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(messages, template)


def test_templates_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TEMPLATES["mine"] = TEMPLATES["world"]  # type: ignore[index]


def test_pieces_are_the_text_cut_as_a_chat_reads_it() -> None:
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!\n\n there"), ("user", "Why?")]
    assert render_segments(messages) == [
        "System: Be brief.\n\n",
        "User: Hi\n\nAssistant:",
        " Hello!\n there",
        "\n\n",
        "User: Why?\n\nAssistant:",
    ]
    assert render_segments(messages[:3]) == ["System: Be brief.\n\n", "User: Hi\n\nAssistant:", " Hello!\n there"]
    assert render_segments([("user", "a"), ("user", "b")]) == ["User: a\n\n", "User: b\n\nAssistant:"]
    assert render_segments([("assistant", "")]) == ["Assistant:"]
    assert render_segments([("user", "a"), ("input", ""), ("assistant", "b"), ("assistant", "c")], "instruct") == [
        "Instruction: a\n\nResponse:",
        " b",
        "\n\n",
        "Response:",
        " c",
    ]


@pytest.mark.parametrize("answer", [True, False])
def test_pieces_together_are_the_rendered_text(answer: bool) -> None:
    roles = ["system", "user", "assistant"]
    for number in range(3**4):
        messages = [(roles[number // 3**place % 3], f"text {place}" * (place % 2)) for place in range(4)]
        joined = "\n\n".join(TEMPLATES["world"].turn(*message) for message in messages)
        if answer and messages[-1][0] != "assistant":
            joined += "\n\nAssistant:"
        assert render(messages, answer=answer) == joined
