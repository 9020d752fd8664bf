"""`fledge state`: saved, told, gone on from and compared; and who may not go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import equal_states
from random_checkpoints import random_checkpoint

from fledge.engine import load
from fledge.engine.llm.chat import CHAT_PARAMS
from fledge.engine.states.state_file import read_state

TEXT = "It was a dark night.\n"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    path = tmp_path / "other.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=16, vocab_size=256, seed=1), path)
    return path


def test_state_of_a_text_continues_as_after_reading_it(
    fledge: Any, byte_model: Path, book: Path, tmp_path: Path
) -> None:
    path = tmp_path / "book.state"
    saved = fledge("state", "save", book, "--to", path, "-m", byte_model)
    assert saved.code == 0 and f"{path}: 21 tokens read, {path.stat().st_size:,} bytes\n" == saved.text
    state, card = read_state(path)
    assert (card.model, card.tokens, card.template, card.title) == ("bytes", 21, None, "book.txt")
    assert equal_states(state, load(byte_model).read(TEXT))
    sampling = ["-m", byte_model, "--seed", "3", "--max-tokens", "9"]
    gone_on = fledge("state", "load", path, "The ship", *sampling)
    assert gone_on.output == fledge("generate", f"{TEXT}The ship", *sampling).output and gone_on.code == 0
    assert fledge("state", "load", path, *sampling, stdin=b"The ship\n").output == gone_on.output


def test_with_a_template_a_question_follows(fledge: Any, byte_model: Path, book: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.state"
    assert fledge("state", "save", book, "--to", path, "--template", "qa", "-m", byte_model).code == 0
    answer = fledge("state", "load", path, "Was it dark?", "-m", byte_model, "--seed", "3", "--max-tokens", "9")
    llm = load(byte_model)
    params = CHAT_PARAMS.with_overrides({"seed": 3, "max_tokens": 9})
    chat = llm.chat(template="qa", params=params, state=llm.read(f"{TEXT.strip()}\n\n"))
    assert answer.text == "".join(chat.say("Was it dark?")).lstrip() + "\n"


def test_info_shows_the_model_of_a_state(fledge: Any, byte_model: Path, book: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.state"
    fledge("state", "save", "-", "--to", path, "--title", "Night", "-m", byte_model, stdin=b"It was")
    told = fledge("state", "info", path)
    assert told.code == 0
    for words in ("Night", "6 tokens", "a plain text", "bytes: RWKV-6 Finch, 6.0", "wkv 2 x 1 x 2 x 8 x 8, "):
        assert words in told.text, words


def test_diff_has_one_row_per_layer(
    fledge: Any, byte_model: Path, other_model: Path, book: Path, tmp_path: Path
) -> None:
    one, two, foreign = tmp_path / "one.state", tmp_path / "two.state", tmp_path / "foreign.state"
    fledge("state", "save", book, "--to", one, "-m", byte_model)
    fledge("state", "save", "-", "--to", two, "-m", byte_model, stdin=b"Another text")
    fledge("state", "save", book, "--to", foreign, "-m", other_model)
    same, apart = fledge("state", "diff", one, one), fledge("state", "diff", one, two)
    assert [line.split() for line in same.text.splitlines()] == [
        ["layer", "att_shift", "memory", "ffn_shift"],
        ["0", "0.0000", "0.0000", "0.0000"],
        ["1", "0.0000", "0.0000", "0.0000"],
    ]
    assert all(float(cell) > 0 for line in apart.text.splitlines()[1:] for cell in line.split()[1:])
    fledge("state", "diff", one, foreign).check_error(
        1, "made by bytes", "not by other", "only with the weights that made it"
    )


def test_unsupported_operation_is_one_line(
    fledge: Any, byte_model: Path, other_model: Path, book: Path, tmp_path: Path
) -> None:
    path = tmp_path / "book.state"
    fledge("state", "save", book, "--to", path, "-m", byte_model)
    fledge("state", "load", path, "x", "-m", other_model).check_error(1, "made by bytes", "not by other")
    fledge("state", "load", path, "", "-m", byte_model).check_error(2, "prompt is empty")
    fledge("state", "load", book, "x", "-m", byte_model).check_error(1, "book.txt is not a valid state file")
    fledge("state", "info", tmp_path / "missing").check_error(1, "missing cannot be read", "No such file")
    fledge("state", "save", book, "--to", path, "-m", byte_model).check_error(2, "book.state exists", "--force")
    assert fledge("state", "save", book, "--to", path, "-m", byte_model, "--force").code == 0
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"\n")
    fledge("state", "save", empty, "--to", tmp_path / "x", "-m", byte_model).check_error(2, "empty.txt is empty")
    fledge("state", "save", tmp_path / "no.txt", "--to", tmp_path / "x").check_error(1, "no.txt: No such file")
    fledge("state", "save", book, "--to", tmp_path / "x", "--template", "x", "-m", byte_model).check_error(2, "unknown")
