"""`fledge ask`: a text is read once, every question begins after it, and an interrupt loses nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fledge.engine import load
from fledge.engine.generation import PREFILL_CHUNK
from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.states import read_document

TEXT = "It was a dark night.\n\nThe ship had lost its way.\n\n"
SAMPLING = ["--seed", "3", "--max-tokens", "9"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fledge" / "books"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def expected(model: Path, question: str, template: str = "world") -> str:
    """What an answer is: the text, a blank line, the question in the template."""
    llm = load(model)
    params = CHAT_PARAMS.with_overrides({"seed": 3, "max_tokens": 9})
    chat = llm.chat(template=template, params=params, state=llm.read(f"{TEXT.rstrip()}\n\n"))
    return "".join(chat.say(question)).lstrip() + "\n"


def test_every_question_starts_from_the_state_of_the_text(fledge: Any, byte_model: Path, book: Path) -> None:
    done = fledge("ask", book, "Who was lost?", "Was it dark?", "-m", byte_model, *SAMPLING)
    answers = [expected(byte_model, question) for question in ("Who was lost?", "Was it dark?")]
    assert done.code == 0 and done.text == "\n".join(answers)
    assert done.messages.startswith("read 50 tokens in ")


def test_second_run_uses_the_saved_state(fledge: Any, byte_model: Path, book: Path, cache: Path) -> None:
    first = fledge("ask", book, "Who?", "-m", byte_model, *SAMPLING)
    (kept,) = cache.iterdir()
    again = fledge("ask", "-", "Who?", "-m", byte_model, *SAMPLING, stdin=TEXT.encode())
    assert again.messages == "cached: 50 tokens\n" and again.text == first.text
    assert fledge("ask", book, "Who?", "-m", byte_model, "--template", "qa", *SAMPLING).text == expected(
        byte_model, "Who?", "qa"
    )
    assert [kept] == list(cache.iterdir())
    book.write_text(TEXT + "More.", encoding="utf-8")
    assert "read 57 tokens" in fledge("ask", book, "Who?", "-m", byte_model, *SAMPLING).messages


def test_interrupted_read_is_saved(fledge: Any, byte_model: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book.write_bytes(b"x" * (PREFILL_CHUNK + 20))
    chunks = read_document.prefill_chunks

    def interrupted(*arguments: Any) -> Any:
        for found in chunks(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(read_document, "prefill_chunks", interrupted)
        cut = fledge("ask", book, "Who?", "-m", byte_model)
    assert (cut.code, cut.text) == (
        130,
        "",
    ) and f"{PREFILL_CHUNK} of {PREFILL_CHUNK + 22} tokens are read and saved" in cut.messages
    done = fledge("ask", book, "Who?", "-m", byte_model, *SAMPLING)
    assert (
        done.code == 0
        and done.messages.startswith("read 22 tokens in ")
        and f"{PREFILL_CHUNK} were cached" in done.messages
    )


def test_answer_does_not_need_a_writable_folder(fledge: Any, byte_model: Path, book: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"no folder")
    done = fledge("ask", book, "Who was lost?", "-m", byte_model, *SAMPLING)
    assert (done.code, done.text) == (0, expected(byte_model, "Who was lost?"))
    assert "cannot be saved" in done.messages


def test_usage_errors_are_reported_before_the_text_is_read(
    fledge: Any, byte_model: Path, book: Path, cache: Path
) -> None:
    fledge("ask", book, " ", "-m", byte_model).check_error(2, "question is empty")
    fledge("ask", book, "Who?", "-m", byte_model, "--template", "x").check_error(2, "'x' is unknown")
    fledge("ask", book, "Who?", "-m", byte_model, "--top-p", "7").check_error(2, "top_p")
    fledge("ask", book).check_error(2, "QUESTION")
    fledge("ask", "-", "Who?", "-m", byte_model).check_error(2, "standard input is empty")
    fledge("ask", book.with_name("no.txt"), "Who?").check_error(1, "no.txt: No such file")
    assert not cache.exists()
