"""`fledge generate`: text as it comes, JSON, seeds, bytes, interrupts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel
from torch import Tensor

from fledge.cli.options import ModelOptions
from fledge.engine import LLM
from fledge.models import State

TOKENIZER = ByteTokenizer()
CUE = TOKENIZER.get_id("?")


class InterruptedOnce(FakeModel):
    """A model during whose work somebody presses Ctrl-C, once."""

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, State]:
        try:
            return super().forward(*arguments, **named)
        except KeyboardInterrupt:
            self.fail_after = None
            raise


def says(monkeypatch: pytest.MonkeyPatch, reply: bytes, fail_after: int | None = None) -> FakeModel:
    """Make the command load a model that answers a question mark with this reply."""
    model = InterruptedOnce([TOKENIZER.encode(reply)], CUE, TOKENIZER.vocab_size)
    model.fail_after = fail_after
    monkeypatch.setattr(ModelOptions, "load", lambda _self: LLM(model, TOKENIZER, "fake"))
    return model


def test_only_the_text_is_on_standard_output(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, b"Yes, na\xc3\xafve.\n")
    result = fledge("generate", "Well?")
    assert (result.code, result.text, result.messages) == (0, "Yes, naïve.\n", "")


def test_stop_string_and_token_limit_end_the_text(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, b"one two three")
    assert fledge("generate", "?", "--stop", "xx", "--stop", "two").text == "one "
    assert fledge("generate", "?", "--max-tokens", "4").text == "one "


def test_the_same_seed_gives_the_same_text(fledge: Any, byte_model: Path) -> None:
    arguments = ["generate", "Once", "--model", byte_model, "--max-tokens", "12", "--temperature", "2", "--seed"]
    first, second, other = (fledge(*arguments, seed) for seed in ("5", "5", "6"))
    assert first.code == 0 and first.output == second.output != other.output


def test_json_is_one_object(fledge: Any, byte_model: Path) -> None:
    result = fledge("generate", "Once", "-m", byte_model, "--max-tokens", "3", "--json", "--dtype", "float32")
    record = json.loads(result.text)
    assert result.code == 0 and result.text.count("\n") == 1
    assert len(record["ids"]) == 3 and record["finish_reason"] == "length" and record["prompt_tokens"] == 4
    assert (record["model"], record["weights"]) == ("bytes", "float32")
    assert record["timings"].keys() == {"load_s", "prefill_s", "decode_s"} and record["tokens_per_second"]["decode"] > 0
    again = fledge("generate", "Once", "-m", byte_model, "--max-tokens", "3", "--json", "--seed", record["seed"])
    assert json.loads(again.text)["ids"] == record["ids"]


def test_standard_input_is_bytes_less_one_line_end(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, read in ((b"\xff\xfe?", 3), (b"a?\n", 2), (b"a?\r\n", 2), (b"a?\n\n", 3), (b"a?\r", 3)):
        model = says(monkeypatch, b"ok")
        assert fledge("generate", "--max-tokens", "1", stdin=data).code == 0
        assert model.calls[0] == read


def test_argument_keeps_its_bytes(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = says(monkeypatch, b"ok")
    assert fledge("generate", "\udcff?", "--max-tokens", "1").code == 0
    assert model.calls[0] == 2


@pytest.mark.parametrize(("arguments", "stdin"), [([""], b""), ([], b""), ([], b"\n")])
def test_an_empty_prompt(fledge: Any, arguments: list[str], stdin: bytes) -> None:
    fledge("generate", *arguments, stdin=stdin).check_error(2, "the prompt is empty", "fledge generate")


def test_no_prompt_on_a_terminal(fledge: Any) -> None:
    fledge("generate", stdin=None).check_error(2, "there is no prompt", "pipe it in")


def test_interrupt_keeps_the_text_so_far(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, b"never to its end", fail_after=4)
    result = fledge("generate", "?")
    assert (result.code, result.text, result.messages) == (130, "neve", "")
    says(monkeypatch, b"never to its end", fail_after=4)
    result = fledge("generate", "?", "--json")
    assert result.code == 130 and json.loads(result.text)["finish_reason"] == "interrupted"


def test_interrupt_during_prefill_ends_the_command(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, b"ok", fail_after=0)
    result = fledge("generate", "?", "--json")
    record = json.loads(result.text)
    assert (result.code, record["text"], record["finish_reason"]) == (130, "", "interrupted")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-p", "2"], ["top_p is 2"]),
        (["--max-tokens", "0"], ["max_tokens is 0"]),
        (["--stop", ""], ["stop holds ''"]),
        (["--device", "tpu"], ["device 'tpu' is unknown"]),
        (["--dtype", "int4"], ["dtype 'int4' is unknown"]),
    ],
)
def test_bad_settings(fledge: Any, byte_model: Path, arguments: list[str], words: list[str]) -> None:
    fledge("generate", "Once", "-m", byte_model, *arguments).check_error(2, *words)
