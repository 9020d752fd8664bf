"""The `LLM` class: inputs, results and errors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch

from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.engine import LLM, SamplingParams
from fledge.models import ModelConfig, build, zero_state
from fledge.tokenizer import byte_vocabulary, tokenizer_for

TOKENIZER = ByteTokenizer()
COLON = TOKENIZER.get_id(":")


def fake_llm(reply: str = "hello") -> LLM:
    return LLM(FakeModel([TOKENIZER.encode(reply)], COLON, TOKENIZER.vocab_size), TOKENIZER)


def random_llm() -> LLM:
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, name="random")


@pytest.mark.parametrize("prompt", ["say:", b"say:", TOKENIZER.encode("say:"), tuple(TOKENIZER.encode("say:"))])
def test_prompt_as_text_bytes_or_ids_gives_the_same_text(prompt: Any) -> None:
    done = fake_llm().generate(prompt, temperature=0.0)
    assert (done.text, done.finish_reason, done.prompt_tokens) == ("hello", "eos", 4)


def test_stream_and_generate_give_the_same_text() -> None:
    llm, params = random_llm(), SamplingParams(top_p=1.0, max_tokens=30, ban=(0,))
    done = llm.generate("Once", params=params)
    stream = llm.stream("Once", params=params, seed=done.seed)
    assert "".join(stream) == done.text == stream.completion.text
    assert stream.completion.ids == done.ids
    assert len(done.ids) == 30 and done.finish_reason == "length"


def test_continuing_a_state_equals_continuing_its_text() -> None:
    llm = random_llm()
    whole = llm.generate("A long text, and a question?", seed=3, max_tokens=12)
    state = llm.read("A long text,")
    part = llm.generate(" and a question?", state=state, seed=3, max_tokens=12)
    assert part.text == whole.text
    again = llm.generate(" and a question?", state=state, seed=3, max_tokens=12)
    assert again.ids == part.ids and equal_states(again.state, part.state), "the state has changed"


def test_read_continues_a_state_and_accepts_an_empty_text() -> None:
    llm = fake_llm()
    assert equal_states(llm.read("abc"), llm.read("c", llm.read("ab")))
    assert equal_states(llm.read(""), llm.read([]))
    state = llm.read("abc")
    assert equal_states(llm.read("", state), state)
    seen: list[tuple[int, int]] = []
    llm.read("x" * 600, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(512, 600), (600, 600)]


def test_overrides_replace_params() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2)
    assert fake_llm().generate("say:", params=params).text == "he"
    assert fake_llm().generate("say:", params=params, max_tokens=3).text == "hel"
    with pytest.raises(UsageError, match="did you mean 'max_tokens'"):
        fake_llm().stream("say:", max_token=3)


def test_logprobs_sum_to_the_probability_of_the_text() -> None:
    llm = random_llm()
    text = "A few bytes, scored in more than one chunk. " * 4
    scores = llm.logprobs(text)
    ids = [0, *TOKENIZER.encode(text)]
    with torch.no_grad():
        logits, _ = llm.model(torch.tensor([ids]))
    wanted = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [score.id for score in scores] == ids[1:] and b"".join(score.bytes for score in scores) == text.encode()
    assert_close_relative(torch.tensor([score.logprob for score in scores]), wanted, MODEL_TOLERANCE, "logprobs")
    assert scores.total == pytest.approx(float(wanted.sum()), rel=MODEL_TOLERANCE)
    assert scores.bits_per_byte == pytest.approx(-float(wanted.sum()) / math.log(2) / len(text), rel=MODEL_TOLERANCE)


def test_states_and_scores_leave_the_model_ready_for_training() -> None:
    llm = random_llm()
    state = llm.read("hello")
    llm.logprobs("scored", state, ":")
    llm.model(torch.tensor([[5]]), state)[0].sum().backward()
    done = llm.generate("hello", max_tokens=2, seed=1, ban=(0,))
    llm.model(torch.tensor([[5]]), done.state)[0].sum().backward()


def test_logprobs_after_a_state_require_a_context() -> None:
    llm = random_llm()
    cold = llm.logprobs("answer", context="text question: ")
    warm = llm.logprobs("answer", llm.read("text "), "question: ")
    assert warm.total == pytest.approx(cold.total, rel=MODEL_TOLERANCE)
    with pytest.raises(UsageError, match="context is empty"):
        llm.logprobs("answer", llm.read("text "))
    with pytest.raises(UsageError, match="context is empty"):
        llm.logprobs("answer", context="")
    assert llm.logprobs("") == []
    with pytest.raises(UsageError, match="at least one byte"):
        _ = llm.logprobs("").bits_per_byte


@pytest.mark.parametrize("prompt", ["", b"", []])
def test_empty_prompt_is_rejected_with_advice(prompt: Any) -> None:
    llm = fake_llm()
    with pytest.raises(UsageError, match=r"the prompt is empty; .*pass ids \[0\]"):
        llm.stream(prompt)
    with pytest.raises(UsageError, match="the prompt is empty; a state does not include"):
        llm.stream(prompt, state=llm.read("a"))


@pytest.mark.parametrize("token", [-1, 257])
def test_error_names_the_id_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {token} is outside"):
        fake_llm().generate([1, token])


@pytest.mark.parametrize("prompt", [None, 5, [None], [1.5]])
def test_prompts_of_other_types_are_rejected(prompt: Any) -> None:
    with pytest.raises(UsageError, match="a prompt is text, bytes or token ids"):
        fake_llm().generate(prompt)


def test_state_of_another_model_is_rejected() -> None:
    llm = random_llm()
    with pytest.raises(StateError, match="shape"):
        llm.generate("a", state=zero_state(ModelConfig.finch(3, 32, head_size=8), 1))
    with pytest.raises(StateError, match="2 sequences"):
        llm.read("a", zero_state(llm.config, 2))


def test_tokenizer_of_another_size_is_rejected() -> None:
    with pytest.raises(TokenizerError, match="300 token rows, but the tokenizer has 257"):
        LLM(random_finch(300), TOKENIZER)


def test_tokenizer_without_end_of_text_id() -> None:
    """The byte vocabulary of the tiny test models: id 0 is an ordinary byte."""
    model = build(ModelConfig.eagle(2, 32, vocab_size=256, head_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    llm = LLM(model, tokenizer_for(byte_vocabulary()))
    done = llm.generate("a", temperature=0.0, max_tokens=3)
    assert (done.ids, done.text, done.finish_reason) == ((0, 0, 0), "\0\0\0", "length")
    with pytest.raises(UsageError, match="at least one character"):
        llm.generate("")
    with pytest.raises(UsageError, match="context is empty"):
        llm.logprobs("abc")


def test_threads_may_share_an_llm() -> None:
    llm = random_llm()
    state = llm.read("Shared beginning.")
    prompts = [f"question {number}" for number in range(6)]

    def ask(prompt: str) -> str:
        return llm.generate(prompt, state=state, seed=1, max_tokens=12).text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, prompts)) == alone
