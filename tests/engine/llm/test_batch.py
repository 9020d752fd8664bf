"""Batches: each text of a list is what its prompt gives alone, and an interrupt or an error ends all of them."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch

from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.engine import LLM, Completion
from fledge.models import ModelConfig, zero_state

TOKENIZER = ByteTokenizer("\n\n", "lo", "\u3002\n")
PROMPTS = ["Once", "Upon a time:", "x" * 700, "The end\n\n", "\u597d"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "random")


def fake_llm(reply: str = "hello") -> LLM:
    return LLM(FakeModel([TOKENIZER.encode(reply)], TOKENIZER.get_id(":"), TOKENIZER.vocab_size), TOKENIZER)


def check_same(one: Completion, other: Completion) -> None:
    for name in ("text", "ids", "finish_reason", "stop", "prompt_tokens", "seed"):
        assert getattr(one, name) == getattr(other, name), name
    # The sums of a torch model depend on the batch size.
    for name, tensor in one.state.tensors().items():
        assert tensor.allclose(getattr(other.state, name), atol=1e-4), name


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3, "top_p": 1.0, "max_tokens": 12},
        {"seed": 4, "max_tokens": 30, "stop": ("e", "\n\n")},
        {"seed": 5, "max_tokens": 1},
    ],
)
def test_list_of_prompts_gives_the_same_texts_as_single_prompts(llm: LLM, settings: dict[str, Any]) -> None:
    completions = llm.generate(PROMPTS, **settings)
    assert len(completions) == len(PROMPTS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        check_same(completion, llm.generate(prompt, **settings))
        assert completion.timings.prefill_s > 0 and completion.timings.decode_s >= 0


def test_more_prompts_than_the_engine_runs_in_one_step() -> None:
    completions = fake_llm().generate([f"{number}:" for number in range(150)], temperature=0.0)
    assert [completion.text for completion in completions] == ["hello"] * 150


def test_prompts_may_be_bytes_or_token_ids() -> None:
    llm = fake_llm()
    ids = TOKENIZER.encode("say:")
    for prompts in (["say:"], [b"say:"], [ids], [tuple(ids)], (ids, ids)):
        assert {done.text for done in llm.generate(prompts, temperature=0.0)} == {"hello"}
    assert isinstance(llm.generate(ids, temperature=0.0), Completion)


def test_one_state_for_all_prompts_or_one_for_each(llm: LLM) -> None:
    states = [llm.read("A long text, "), llm.read("Another one, ")]
    for state in (states[0], states):
        expected = [states[0], states[0]] if state is states[0] else states
        completions = llm.generate(["and", "then"], state=state, seed=1, max_tokens=8)
        for prompt, before, completion in zip(("and", "then"), expected, completions, strict=True):
            check_same(completion, llm.generate(prompt, state=before, seed=1, max_tokens=8))
    with pytest.raises(UsageError, match="there are 2 prompts and 1 states"):
        llm.generate(["and", "then"], state=states[:1])


def test_pieces_of_a_batch_join_to_the_texts() -> None:
    stream = fake_llm("h\u597dlo").stream_many(["a:", "bcd:"], temperature=0.0)
    texts = ["", ""]
    for index, piece in stream:
        assert piece
        texts[index] += piece
    assert texts == ["h\u597dlo"] * 2
    assert [done.text for done in stream.completions if done is not None] == texts


def test_unseeded_prompts_get_different_seeds(llm: LLM) -> None:
    one, other = llm.generate(["Once", "Once"], max_tokens=5)
    assert one.seed != other.seed
    check_same(one, llm.generate("Once", seed=one.seed, max_tokens=5))


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        (["a", ""], {}, UsageError, "the prompt is empty"),
        (["a", [1, 999]], {}, TokenizerError, "token id 999 is outside"),
        (["a", 5], {}, UsageError, "a prompt is text, bytes or token ids"),
        (["a"], {"temperature": -1}, UsageError, "temperature"),
        (["a", "b"], {"ban": tuple(range(TOKENIZER.vocab_size))}, UsageError, "ban"),
    ],
)
def test_invalid_prompts_and_settings(prompts: Any, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fake_llm().generate(prompts, **settings)


def test_state_of_another_model_is_rejected(llm: LLM) -> None:
    with pytest.raises(StateError, match="shape"):
        llm.generate(["a", "b"], state=zero_state(ModelConfig.finch(3, 32, head_size=8), 1))


def test_closed_batch_keeps_finished_texts_only() -> None:
    llm = fake_llm()
    stream = llm.stream_many(["a:", "b:"], temperature=0.0, max_tokens=4)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.completions == [None, None]


def test_interrupt_in_any_model_call_ends_the_batch_and_leaves_the_model_usable() -> None:
    calls = 0
    while True:
        llm = fake_llm()
        assert isinstance(llm.model, FakeModel)
        state = llm.read("before ")
        llm.model.fail_after = calls
        stream = llm.stream_many(["a:", "b:"], state=state, temperature=0.0)
        try:
            list(stream)
        except KeyboardInterrupt:
            llm.model.fail_after = None
            assert list(stream) == []
            again = llm.generate(["a:", "b:"], state=state, temperature=0.0)
            assert [done.text for done in again] == ["hello", "hello"]
        else:
            break
        calls += 1
    assert calls > 5


def test_final_state_has_read_exactly_the_text() -> None:
    llm = fake_llm("he\n\nlo")
    for prompt, done in zip(("a:", "bc:"), llm.generate(["a:", "bc:"], temperature=0.0, stop="\n"), strict=True):
        assert (done.text, done.finish_reason, done.stop) == ("he", "stop", "\n")
        assert equal_states(done.state, llm.read(prompt + "he"))


def test_logprobs_of_several_texts_are_those_of_each_text(llm: LLM) -> None:
    texts = ["A few bytes, scored in more than one chunk. " * 6, "", "short"]
    several = llm.logprobs(texts, context="context: ")
    assert several == [llm.logprobs(text, context="context: ") for text in texts]
    assert [len(scores) for scores in several] == [len(TOKENIZER.encode(text)) for text in texts]
    state = llm.read("text ")
    assert llm.logprobs(["short"], state, ": ") == [llm.logprobs("short", state, ": ")]
