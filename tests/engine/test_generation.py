"""The token loop: chunks, progress, and states that nobody writes to."""

from __future__ import annotations

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch

from fledge.core.errors import UsageError
from fledge.engine.generation import feed, fresh_state, prefill, tokens
from fledge.engine.sampling import Sampler, SamplingParams

TOKENIZER = ByteTokenizer()
COLON = TOKENIZER.id_of(":")
GREEDY = SamplingParams(temperature=0.0)


def fake(reply: str = "hello") -> FakeModel:
    return FakeModel([TOKENIZER.encode(reply)], COLON, TOKENIZER.vocab_size)


@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_prefill_reads_by_chunks_and_says_how_far_it_is(chunk: int) -> None:
    model, seen = fake(), list[tuple[int, int]]()
    ids = TOKENIZER.encode("a prompt: ")
    logits, state = prefill(model, ids, chunk=chunk, progress=lambda done, total: seen.append((done, total)))
    assert sum(model.calls) == 10 and max(model.calls) <= chunk
    assert seen[-1] == (10, 10) and [done for done, _ in seen] == [*range(chunk, 10, chunk), 10]
    assert logits.shape == (TOKENIZER.vocab_size,)
    assert equal_states(state, model(torch.tensor([ids]))[1])


def test_prefill_refuses_nothing_and_chunks_of_nothing() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        prefill(fake(), [])
    with pytest.raises(UsageError, match="chunk is 0"):
        prefill(fake(), [1], chunk=0)


def test_tokens_come_one_for_each_call_and_each_with_the_state_before_it() -> None:
    model = fake("hello")
    prompt = TOKENIZER.encode("say:")
    logits, state = prefill(model, prompt)
    model.calls.clear()
    steps = list(tokens(model, logits, state, Sampler(GREEDY), 5))
    assert TOKENIZER.decode(step.id for step in steps) == "hello"
    assert model.calls == [1] * 4, "the last token need not be read"
    for number, step in enumerate(steps):
        assert equal_states(
            step.before, feed(model, [*prompt, *(s.id for s in steps[:number])], model.initial_state(1))
        )


def test_what_the_loop_gives_is_without_gradients_and_can_take_part_in_training() -> None:
    model = random_finch(97, tuned_state=True)
    places = [
        fresh_state(model),
        prefill(model, [1, 2, 3]).state,
        *(step.before for step in tokens(model, *prefill(model, [COLON]), Sampler(GREEDY), 3)),
    ]
    for state in places:
        assert torch.is_grad_enabled()
        assert not any(tensor.requires_grad for tensor in state.tensors().values())
        model.zero_grad()
        model(torch.tensor([[5]]), state)[0].sum().backward()
        assert model.head.weight.grad.abs().sum() > 0


def test_a_real_model_split_anywhere_gives_the_same_tokens() -> None:
    model = random_finch(97)
    ids = torch.randint(97, (23,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = prefill(model, ids)
    before = {name: tensor.clone() for name, tensor in whole.state.tensors().items()}
    split = prefill(model, ids, chunk=5)
    assert_close_relative(split.logits, whole.logits, MODEL_TOLERANCE, "logits")
    params = SamplingParams(seed=4, top_p=1.0)
    one = [step.id for step in tokens(model, *whole, Sampler(params), 12)]
    two = [step.id for step in tokens(model, *split, Sampler(params), 12)]
    assert one == two
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state.tensors().items())
