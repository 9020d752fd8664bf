"""Streams: text and state agree after every kind of end: tokens, interrupts and cuts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch
from hypothesis import given
from hypothesis import strategies as st

from fledge.engine.generation import advance_state, generate_tokens, prefill
from fledge.engine.llm.stream import Completion, Stream
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.models import State

TOKENIZER = ByteTokenizer("\n\n", "\u3002\n", "\nUs", "ser:", "\u3002", "lo", b"\xe5\xa5")
PROMPT = TOKENIZER.encode("ask:")
COLON = TOKENIZER.get_id(":")


def fake(*reply: str | bytes) -> FakeModel:
    """A model that generates these pieces, each encoded separately, and then the eos id."""
    return FakeModel([[token for piece in reply for token in TOKENIZER.encode(piece)]], COLON, TOKENIZER.vocab_size)


def stream_of(model: FakeModel, prompt: list[int] = PROMPT, show_held: bool = True, **settings: object) -> Stream:
    params = SamplingParams(temperature=0.0).with_overrides(settings)
    return Stream(model, TOKENIZER, prompt, model.initial_state(1), params, show_held=show_held)


def read(model: FakeModel, ids: list[int]) -> State:
    return advance_state(model, ids, model.initial_state(1))


def check(model: FakeModel, done: Completion, pieces: list[str], prompt: list[int] = PROMPT) -> None:
    """Check that pieces, text, ids and state of a completion agree."""
    model.fail_after = None
    assert "".join(pieces) == done.text
    assert TOKENIZER.decode(done.ids) == done.text
    assert equal_states(done.state, read(model, [*prompt[: done.prompt_tokens], *done.ids]))
    assert done.timings.prefill_s >= 0 and done.timings.decode_s >= 0


def test_text_that_ends_with_the_eos_id() -> None:
    model = fake("hello")
    stream = stream_of(model)
    assert list(stream) == ["h", "e", "l", "lo"]
    check(model, stream.completion, ["hello"])
    assert (stream.completion.finish_reason, stream.completion.stop) == ("eos", None)
    assert next(stream, None) is None


def test_empty_text() -> None:
    model = fake()
    stream = stream_of(model)
    assert list(stream) == []
    check(model, stream.completion, [])
    assert stream.completion.finish_reason == "eos" and stream.completion.ids == ()


def test_state_has_read_the_last_token_at_max_tokens() -> None:
    model = fake("hello")
    stream = stream_of(model, max_tokens=3)
    pieces = list(stream)
    assert stream.completion.finish_reason == "length" and stream.completion.text == "hel"
    check(model, stream.completion, pieces)


def test_stop_string_across_tokens_is_neither_emitted_nor_read() -> None:
    model = fake("he", "lo", "\n", "\nUs", "ser:", "more")
    stream = stream_of(model, stop=("\n\nUs", "never"))
    pieces = list(stream)
    assert pieces == ["h", "e", "lo"]
    check(model, stream.completion, pieces)
    assert (stream.completion.finish_reason, stream.completion.stop) == ("stop", "\n\nUs")
    assert stream.completion.ids == tuple(TOKENIZER.encode("helo"))


def test_cut_inside_a_token_keeps_its_first_part() -> None:
    model = fake("\u597d", "\u3002\n", "\n")
    stream = stream_of(model, stop="\n\n")
    pieces = list(stream)
    assert stream.completion.text == "\u597d\u3002"
    assert stream.completion.ids[-1] == TOKENIZER.get_id("\u3002") != TOKENIZER.get_id("\u3002\n")
    check(model, stream.completion, pieces)


def test_stop_string_in_the_first_token() -> None:
    model = fake("\n\n", "more")
    stream = stream_of(model, stop="\n\n")
    assert list(stream) == []
    check(model, stream.completion, [])
    assert stream.completion.finish_reason == "stop" and stream.completion.ids == ()


def test_held_text_is_emitted_or_dropped_at_the_end() -> None:
    for show_held, text in ((True, "no\n"), (False, "no")):
        model = fake("no", "\n")
        stream = stream_of(model, stop="\n\n", show_held=show_held)
        pieces = list(stream)
        assert stream.completion.text == text
        check(model, stream.completion, pieces)


def test_incomplete_characters_wait_and_invalid_bytes_are_replaced() -> None:
    model = fake(b"\xe5\xa5", b"\xbd", b"\xff", "a", b"\xe5")
    stream = stream_of(model)
    assert list(stream) == ["\u597d", "\ufffd", "a", "\ufffd"]
    check(model, stream.completion, ["\u597d\ufffda\ufffd"])


def test_stopping_at_any_piece_keeps_the_emitted_text() -> None:
    reply = ("h\u597d", b"\xe5\xa5", b"\xbd", "\u3002\n", "User:", "lo")
    total = len(list(stream_of(fake(*reply), stop="\nUse!")))
    for taken in range(total):
        model = fake(*reply)
        stream = stream_of(model, stop="\nUse!")
        pieces = [next(stream) for _ in range(taken)]
        done = stream.completion
        check(model, done, pieces)
        assert done.finish_reason == "interrupted" and next(stream, None) is None
        assert stream.completion is done


def test_interrupt_in_any_model_call_keeps_the_emitted_text() -> None:
    reply = ("h\u597d", b"\xe5\xa5", b"\xbd", "\u3002\n", "\n", "lo")
    calls, reached = 0, set[str]()
    while True:
        model, pieces = fake(*reply), list[str]()
        model.fail_after = calls
        stream = stream_of(model, stop="\n\n")
        try:
            for piece in stream:
                pieces.append(piece)
        except KeyboardInterrupt:
            model.fail_after = None
            check(model, stream.completion, pieces)
            reached.add(stream.completion.finish_reason)
        else:
            break
        calls += 1
    assert calls == 8 and reached == {"interrupted", "stop"}, "the last interrupt comes after the end of the text"


def test_interrupt_at_any_line_keeps_text_ids_and_state_consistent() -> None:
    """Ctrl-C may come at any time. Here it comes at the n-th line that the engine executes, for every n."""
    reply = ("h\u597d", b"\xe5\xa5", b"\xbd", "\u3002\n", "\n", "lo")
    lines, ended = 0, False
    while not ended:
        model = fake(*reply)
        stream = stream_of(model, stop="\n\n")
        with contextlib.suppress(KeyboardInterrupt), interrupt_after(lines):
            for _ in stream:
                pass
            ended = True
        done = stream.completion
        check(model, done, [done.text])
        assert "h\u597d\u597d\u3002".startswith(done.text)
        lines += 1
    assert lines > 300


@contextlib.contextmanager
def interrupt_after(lines: int) -> Iterator[None]:
    """Raise KeyboardInterrupt after this many lines of fledge.engine."""
    left, before = lines, sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if "/fledge/engine/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(before)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # an interrupt just before torch.no_grad ends leaves gradients disabled


def test_interrupt_while_reading_the_prompt_keeps_the_part_read() -> None:
    model, prompt = fake("hello"), TOKENIZER.encode("x" * 1200 + ":")

    def stop_after_two(done: int, total: int) -> None:
        assert total == len(prompt)
        if done >= 1000:
            raise KeyboardInterrupt

    start = model.initial_state(1)
    stream = Stream(model, TOKENIZER, prompt, start, SamplingParams(), progress=stop_after_two)
    with contextlib.suppress(KeyboardInterrupt):
        next(stream)
    assert stream.prompt_output is None
    assert (stream.completion.prompt_tokens, stream.completion.text) == (1024, "")
    check(model, stream.completion, [], prompt)
    rest = Stream(model, TOKENIZER, prompt[1024:], stream.completion.state, SamplingParams(temperature=0.0))
    assert "".join(rest) == "hello"


def test_unused_stream_has_read_nothing() -> None:
    model = fake("hello")
    done = stream_of(model).completion
    assert (done.finish_reason, done.prompt_tokens, model.calls) == ("interrupted", 0, [])
    check(model, done, [])


def test_only_necessary_states_are_kept() -> None:
    model = fake("abc" * 200)
    stream = stream_of(model, stop="abcd", max_tokens=600)
    for _ in range(100):
        next(stream)
        assert len(stream._detokenizer._history._entries) <= 5


@given(
    st.lists(st.sampled_from(["a", "\n", "\n\n", "\u3002\n", "\u3002", "\nUs", "ser:", "\u597d"]), max_size=8),
    st.lists(st.sampled_from(["\n\n", "\nUser", "\u3002\n\n", "a\u3002", "s"]), max_size=2),
    st.integers(1, 9),
    st.booleans(),
)
def test_text_ids_and_state_agree_for_any_reply(words: list[str], stops: list[str], most: int, held: bool) -> None:
    model = fake(*(word for word in words if word != "ser:"))
    stream = stream_of(model, stop=tuple(stops), max_tokens=most, show_held=held)
    pieces = list(stream)
    assert all(pieces)
    check(model, stream.completion, pieces)
    assert not any(stop in stream.completion.text for stop in stops)


def test_state_of_a_real_model_is_that_of_reading_its_text() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    start = model.initial_state(1)
    for seed in range(2):
        params = SamplingParams(top_p=1.0, seed=seed, max_tokens=25, stop=("e", "\n"))
        stream = Stream(model, TOKENIZER, PROMPT, start, params)
        pieces = list(stream)
        done = stream.completion
        assert "".join(pieces) == done.text
        again = advance_state(model, [*PROMPT, *done.ids], start)
        for name, tensor in again.tensors().items():
            assert_close_relative(getattr(done.state, name), tensor, MODEL_TOLERANCE, name)
        assert "".join(Stream(model, TOKENIZER, PROMPT, start, params)) == done.text


@pytest.mark.parametrize("length", [1, 4, 1200])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"seed": 3, "top_p": 1.0, "temperature": 1.5},
        {"seed": 4, "top_k": 9, "presence_penalty": 0.5, "frequency_penalty": 0.7, "ban": (0, 5)},
    ],
)
def test_stream_samples_the_tokens_of_the_reference_loop(length: int, settings: dict[str, Any]) -> None:
    model = random_finch(TOKENIZER.vocab_size)
    prompt = [1 + place * 7 % 256 for place in range(length)]
    params = SamplingParams(max_tokens=20).with_overrides(settings)
    stream = Stream(model, TOKENIZER, prompt, model.initial_state(1), params)
    list(stream)
    output = prefill(model, prompt, model.initial_state(1))
    steps = list(generate_tokens(model, *output, Sampler(params), params.max_tokens))
    ids = [step.id for step in steps]
    if TOKENIZER.eos_id in ids:
        ids = ids[: ids.index(TOKENIZER.eos_id)]
    assert list(stream.completion.ids) == ids
    state = advance_state(model, ids[-1:], steps[len(ids) - 1].state_before) if ids else output.state
    assert equal_states(stream.completion.state, state)
    assert stream.prompt_output is not None and torch.equal(stream.prompt_output.logits, output.logits)
