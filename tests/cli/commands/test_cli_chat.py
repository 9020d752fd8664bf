"""`fledge chat` through a pipe, and the same conversation with a person at the keyboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel
from rich.console import Console

from fledge.cli import terminal
from fledge.cli.options import ModelOptions
from fledge.cli.views.conversation import ChatSession
from fledge.engine import LLM, SamplingParams

TOKENIZER = ByteTokenizer(b"Assistant:")
CUE = TOKENIZER.get_id(b"Assistant:")
REPLIES = (b" One.\n\nUser: not said", b" Two.\n\n", b" Three.\n\n")


def model_of(replies: Sequence[bytes] = REPLIES) -> FakeModel:
    return FakeModel([TOKENIZER.encode(reply) for reply in replies], CUE, TOKENIZER.vocab_size)


@pytest.fixture
def talk(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `fledge chat ARGUMENTS` with these lines on standard input."""

    def run(
        *lines: str, arguments: Sequence[str] = (), model: FakeModel | None = None, tuned: str | None = None
    ) -> Any:
        llm = LLM(model or model_of(), TOKENIZER, "fake", template=tuned)
        monkeypatch.setattr(ModelOptions, "load", lambda _self: llm)
        return fledge("chat", *arguments, stdin="".join(f"{line}\n" for line in lines).encode())

    return run


def test_answers_with_a_blank_line_between(talk: Any) -> None:
    result = talk("Hello", "", "And?", "/quit", "never asked")
    assert (result.code, result.text, result.messages) == (0, "One.\n\nTwo.\n", "")


def test_undo_and_retry(talk: Any) -> None:
    result = talk("Hello", "/undo", "/history", "Again", "/retry", "/history")
    assert result.text == "One.\n\nOne.\n\nOne.\n"
    assert result.messages.splitlines() == ["this branch has no messages", "User: Again", "Assistant: One."]


def test_branches(talk: Any) -> None:
    result = talk("a", "/branch side", "b", "/switch main", "c", "/branch", "/history")
    assert result.text == "One.\n\nTwo.\n\nTwo.\n"
    expected = ["branches: main (current), side", "User: a", "Assistant: One.", "User: c", "Assistant: Two."]
    assert result.messages.splitlines() == expected


def test_continued_lines_and_lines_that_start_with_a_slash(talk: Any) -> None:
    result = talk("one\\", "two", "//undo", "/history", "cut\\")
    assert result.messages.splitlines()[:3] == ["User: one", "two", "Assistant: One."]
    assert "User: /undo" in result.messages and result.text.count("\n\n") == 2


def test_help_lists_every_command(talk: Any) -> None:
    messages = talk("/help").messages
    assert all(f"/{name}" in messages for name in (*ChatSession(None, interactive=False)._commands, "quit"))  # type: ignore[arg-type]


def test_system_text_and_settings(talk: Any) -> None:
    result = talk("x", "/history", arguments=["--system", "Be brief.", "--max-tokens", "2"])
    assert result.text == "O\n" and result.messages.startswith("System: Be brief.\nUser: x\n")


@pytest.mark.parametrize(
    ("arguments", "tuned", "label", "words"),
    [
        ([], None, "User: x", "template world. "),
        ([], "qa", "Question: x", "template qa. "),
        (["--template", "world"], "qa", "User: x", "template world (tuned with qa). "),
        (["--template", "qa"], None, "Question: x", "template qa. "),
    ],
)
def test_the_template_is_the_one_of_the_tuning(
    talk: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tuned: str | None, label: str, words: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr("fledge.cli.commands.chat.print_terminal_note", said.append)
    result = talk("x", "/history", arguments=arguments, tuned=tuned)
    assert result.messages.startswith(f"{label}\n") and words in said[0]


@pytest.mark.parametrize(
    ("lines", "arguments", "words"),
    [
        (["/foo"], [], ["there is no command /foo"]),
        (["/undo"], [], ["nothing to undo"]),
        (["/switch nowhere"], [], ["no branch 'nowhere'"]),
        (["/switch"], [], ["needs the name"]),
        ([], ["--template", "odd"], ["chat template 'odd' is unknown"]),
        ([], ["--template", "qa", "--system", "x"], ["role 'system'"]),
        ([], ["--temperature", "-1"], ["temperature is -1"]),
    ],
)
def test_the_first_error_ends_a_script(talk: Any, lines: list[str], arguments: list[str], words: list[str]) -> None:
    talk(*lines, "never asked", arguments=arguments).check_error(2, *words)


def test_an_interrupt_ends_a_script(talk: Any) -> None:
    model = model_of()
    model.fail_after = 3
    result = talk("Hello", "never asked", model=model)
    assert (result.code, result.text) == (130, "On\n")


class Person:
    """Types the given lines; an exception among them is raised instead."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines, self.prompts = list(lines), list[str]()

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def at_keyboard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A conversation with a `Person`: what was shown on both streams, as one text."""
    monkeypatch.setattr(
        terminal, "message_console", lambda: Console(force_terminal=True, no_color=True, highlight=False)
    )

    def run(person: Person, model: FakeModel | None = None, **settings: Any) -> str:
        chat = LLM(model or model_of(), TOKENIZER).chat(params=SamplingParams(**settings))
        monkeypatch.setattr("builtins.input", person)
        ChatSession(chat, interactive=True).run()
        return capsys.readouterr().out

    return run


def test_errors_do_not_end_a_conversation(at_keyboard: Any) -> None:
    person = Person("/undo", "/foo", "Hello", "/branch b", "/quit")
    shown = at_keyboard(person)
    assert "nothing to undo" in shown and "no command /foo" in shown and "One.\n\n" in shown
    assert person.prompts == ["> ", "> ", "> ", "> ", "b> "]


def test_ctrl_c_at_the_prompt_and_ctrl_d(at_keyboard: Any) -> None:
    person = Person("half\\", KeyboardInterrupt(), "Hello")
    shown = at_keyboard(person)
    assert (
        person.prompts == ["> ", "... ", "> ", "> "]
        and "Ctrl-D or /quit ends the conversation" in shown
        and "One." in shown
    )


def test_ctrl_c_ends_an_answer_and_keeps_the_state(at_keyboard: Any) -> None:
    model = model_of()

    class Recovering(Person):
        def __call__(self, prompt: str) -> str:
            model.fail_after = 3 if len(self.prompts) == 0 else None
            return super().__call__(prompt)

    shown = at_keyboard(Recovering("Hello", "And?", "/history"), model)
    assert "stopped" in shown and "Two." in shown
    places = [shown.index(text) for text in ("User: Hello", "Assistant: On\x1b", "User: And?", "Assistant: Two.")]
    assert places == sorted(places)


def test_empty_answer_is_reported(at_keyboard: Any) -> None:
    assert "the answer is empty" in at_keyboard(Person("Hello"), model_of([b"\n\n"]))
    assert "the answer is empty" not in at_keyboard(Person("Hello"))


def test_truncated_answer_is_reported(at_keyboard: Any) -> None:
    assert "stopped by --max-tokens" not in at_keyboard(Person("Hello"))
    assert "On\n" in (shown := at_keyboard(Person("Hello"), max_tokens=3)) and "stopped by --max-tokens" in shown
