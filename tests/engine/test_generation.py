"""The reference loop: chunks, progress, and states that never change."""

from __future__ import annotations

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch

from fledge.core.errors import UsageError
from fledge.engine.generation import advance_state, generate_tokens, make_initial_state, prefill
from fledge.engine.sampling import Sampler, SamplingParams

TOKENIZER = ByteTokenizer()
COLON = TOKENIZER.get_id(":")
GREEDY = SamplingParams(temperature=0.0)


def fake(reply: str = "hello") -> FakeModel:
    return FakeModel([TOKENIZER.encode(reply)], COLON, TOKENIZER.vocab_size)


@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_prefill_reads_chunks_and_reports_progress(chunk: int) -> None:
    model, reports = fake(), list[tuple[int, int]]()
    ids = TOKENIZER.encode("a prompt: ")
    logits, state = prefill(model, ids, chunk=chunk, progress=lambda done, total: reports.append((done, total)))
    assert sum(model.calls) == 10 and max(model.calls) <= chunk
    assert reports[-1] == (10, 10) and [done for done, _ in reports] == [*range(chunk, 10, chunk), 10]
    assert logits.shape == (TOKENIZER.vocab_size,)
    assert equal_states(state, model(torch.tensor([ids]))[1])


def test_prefill_of_no_tokens_and_empty_chunks() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        prefill(fake(), [])
    with pytest.raises(UsageError, match="chunk is 0"):
        prefill(fake(), [1], chunk=0)


def test_each_token_comes_with_the_state_before_it() -> None:
    model = fake("hello")
    prompt = TOKENIZER.encode("say:")
    logits, state = prefill(model, prompt)
    model.calls.clear()
    steps = list(generate_tokens(model, logits, state, Sampler(GREEDY), 5))
    assert TOKENIZER.decode(step.id for step in steps) == "hello"
    assert model.calls == [1] * 4, "the model does not read the last token"
    for index, step in enumerate(steps):
        ids = [*prompt, *(earlier.id for earlier in steps[:index])]
        assert equal_states(step.state_before, advance_state(model, ids, model.initial_state(1)))


def test_states_have_no_gradients_and_can_be_used_in_training() -> None:
    model = random_finch(97, tuned_state=True)
    states = [
        make_initial_state(model),
        prefill(model, [1, 2, 3]).state,
        *(step.state_before for step in generate_tokens(model, *prefill(model, [COLON]), Sampler(GREEDY), 3)),
    ]
    for state in states:
        assert torch.is_grad_enabled()
        assert not any(tensor.requires_grad for tensor in state.tensors().values())
        model.zero_grad()
        model(torch.tensor([[5]]), state)[0].sum().backward()
        assert model.head.weight.grad.abs().sum() > 0


def test_chunks_do_not_change_the_tokens() -> None:
    model = random_finch(97)
    ids = torch.randint(97, (23,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = prefill(model, ids)
    before = {name: tensor.clone() for name, tensor in whole.state.tensors().items()}
    split = prefill(model, ids, chunk=5)
    assert_close_relative(split.logits, whole.logits, MODEL_TOLERANCE, "logits")
    params = SamplingParams(seed=4, top_p=1.0)
    tokens_whole = [step.id for step in generate_tokens(model, *whole, Sampler(params), 12)]
    tokens_split = [step.id for step in generate_tokens(model, *split, Sampler(params), 12)]
    assert tokens_whole == tokens_split
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state.tensors().items())
