"""The engine against the plain loop: the same tokens for every request, whatever runs beside it."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import EOS, equal_states, random_finch
from native_library import needs_native
from random_checkpoints import VERSIONS, random_checkpoint
from torch import nn

from fledge.checkpoint import assemble, detect
from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.engine import engine as engine_module
from fledge.engine.engine import PROMPT_LOGPROBS_CHUNK, Engine, compute_prompt_logprobs
from fledge.engine.generation import ModelOutput, generate_tokens, make_initial_state, prefill
from fledge.engine.request import QueueFull, Request, TokenOutput
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.scheduler import Scheduler
from fledge.models.state import State

VOCAB = 77
PARAMS = SamplingParams(top_p=0.95, temperature=1.3, presence_penalty=0.3, frequency_penalty=0.2, seed=5, max_tokens=12)


def packed(version: str) -> nn.Module:
    """A small random model of the native library."""
    tensors = random_checkpoint(version, n_layer=2, n_embd=40, head_size=8, vocab_size=VOCAB, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, pack=True)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1, VOCAB), k=length))


def plain(model: nn.Module, request: Request, choice: int = 0) -> list[tuple[int, State]]:
    """The tokens of one continuation by the loop, each with the state before it."""
    start = request.start
    cursor = (
        start if isinstance(start, ModelOutput) else prefill(model, request.ids, start or make_initial_state(model))
    )
    assert request.params.seed is not None
    sampler = Sampler(replace(request.params, seed=request.params.seed + choice))
    found = []
    for step in generate_tokens(model, *cursor, sampler, request.params.max_tokens):
        found.append((step.id, step.state_before))
        if step.id == EOS:
            break
    return found


def run(engine: Engine, numbers: list[int] | None = None) -> dict[tuple[int, int], list[TokenOutput]]:
    """Step until nothing is left: the outputs of each continuation."""
    found = defaultdict(list)
    while engine.busy:
        for output in engine.step():
            found[output.request_id, output.choice].append(output)
    return found


def drawn(outputs: list[TokenOutput]) -> list[int]:
    return [output.token for output in outputs if output.token is not None]


def requests(count: int, seed: int) -> list[Request]:
    """Of all sorts: short and long prompts, other seeds and lengths, several continuations, states to begin with."""
    chooser = random.Random(seed)
    found = []
    for number in range(count):
        params = replace(PARAMS, seed=chooser.randrange(1000), max_tokens=chooser.randrange(1, 14))
        length = chooser.choice([1, 2, 17, 60, 300])
        found.append(Request(prompt(length, number), params, n=chooser.choice([1, 1, 1, 3])))
    return found


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_own_tokens_bit_for_bit(version: str, seed: int) -> None:
    """Requests arrive and are aborted at random moments; who is left has the tokens and states of the plain loop."""
    model, chooser = packed(version), random.Random(seed)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=7, prefill_chunk=64))
    waiting, asked, gone = requests(14, seed), dict[int, Request](), set[int]()
    found = defaultdict(list)
    while waiting or engine.busy:
        if waiting and chooser.random() < 0.5:
            request = waiting.pop()
            asked[engine.add(request)] = request
        if asked and chooser.random() < 0.05:
            gone.add(number := chooser.choice(list(asked)))
            engine.abort(number)
        for output in engine.step():
            assert output.request_id not in gone
            found[output.request_id, output.choice].append(output)
    assert len(asked) - len(gone) > 5
    for number, request in asked.items():
        for choice in range(request.n if number not in gone else 0):
            outputs, expected = found[number, choice], plain(model, request, choice)
            assert drawn(outputs) == [token for token, _ in expected]
            for output, (_, before) in zip(outputs, expected, strict=True):
                assert equal_states(output.state_before.alone(), before)
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason == ("eos" if outputs[-1].token == EOS else "length")


def test_a_torch_model_writes_the_same_tokens() -> None:
    """Its sums depend on the batch in the last bit, which these scores, far apart, do not show."""
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=4, prefill_chunk=32))
    asked = {engine.add(request): request for request in requests(6, 1)}
    found = run(engine)
    for number, request in asked.items():
        for choice in range(request.n):
            assert drawn(found[number, choice]) == [token for token, _ in plain(model, request, choice)]


def test_reading_only_gives_the_place_reached() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(prefill_chunk=1000))
    engine.add(Request(prompt(40, 1), n=0))
    (output,) = run(engine)[0, 0]
    cursor = prefill(model, prompt(40, 1), make_initial_state(model))
    assert (output.finish_reason, output.token) == ("read", None)
    assert output.logits is not None
    assert_close_relative(output.logits, cursor.logits, MODEL_TOLERANCE, "logits")
    for name, tensor in output.state_before.alone().tensors().items():
        assert_close_relative(tensor, cursor.state.tensors()[name], MODEL_TOLERANCE, name)


def test_a_text_goes_on_from_a_state_or_from_a_place() -> None:
    model = random_finch(VOCAB)
    cursor = prefill(model, prompt(9, 1), make_initial_state(model))
    engine = Engine(model, eos_id=EOS)
    after_state = Request(prompt(5, 2), PARAMS, start=cursor.state)
    after_place = Request((), PARAMS, start=cursor, n=2)
    numbers = [engine.add(after_state), engine.add(after_place)]
    found = run(engine)
    assert drawn(found[numbers[0], 0]) == [token for token, _ in plain(model, after_state)]
    for choice in range(2):
        assert drawn(found[numbers[1], choice]) == [token for token, _ in plain(model, after_place, choice)]


def test_a_continuation_can_be_ended_without_the_others() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, scheduler=Scheduler(slots=3))
    request = Request(prompt(5, 2), PARAMS, n=3)
    number = engine.add(request)
    engine.step()
    engine.abort_choice(number, 1)
    found = run(engine)
    assert (number, 1) not in found
    assert drawn(found[number, 2]) == [token for token, _ in plain(model, request, 2)][1:]
    engine.abort_choice(number, 1)
    assert not engine.busy


def test_a_deadline_ends_what_is_late_and_nothing_else() -> None:
    now = [0.0]
    engine = Engine(random_finch(VOCAB), scheduler=Scheduler(slots=2), clock=lambda: now[0])
    late = engine.add(Request(prompt(5, 2), replace(PARAMS, max_tokens=10**6), deadline=3.0))
    never = engine.add(Request(prompt(5, 2), PARAMS, n=2, deadline=2.0))
    fine = engine.add(Request(prompt(5, 3), PARAMS, priority=1))
    outputs = []
    while engine.busy:
        outputs += engine.step()
        now[0] += 0.1
    ends = {(output.request_id, output.choice): output for output in outputs if output.finish_reason}
    assert ends[late, 0].finish_reason == "deadline" and ends[late, 0].token is None
    assert ends[never, 0].finish_reason == ends[never, 1].finish_reason == "deadline"
    assert ends[fine, 0].finish_reason in ("length", "eos")
    assert engine.stats.finished["deadline"] == 3


def test_what_cannot_be_run_is_refused_and_the_queue_has_an_end() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, scheduler=Scheduler(slots=4), max_requests=2)
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.add(Request(()))
    with pytest.raises(TokenizerError, match="77 is outside"):
        engine.add(Request((1, VOCAB)))
    with pytest.raises(UsageError, match="n is 5"):
        engine.add(Request((1,), n=5))
    with pytest.raises(StateError):
        engine.add(Request((1,), start=make_initial_state(packed("4"))))
    assert not engine.busy
    first = engine.add(Request((1,)))
    engine.add(Request((1,)))
    with pytest.raises(QueueFull, match="2 requests are queued"):
        engine.add(Request((1,)))
    engine.abort(first)
    engine.add(Request((1,)))


def test_one_text_that_fails_leaves_the_others_alone() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS)
    bad = engine.add(Request(prompt(5, 2), replace(PARAMS, ban=tuple(range(VOCAB)))))
    good = engine.add(request := Request(prompt(5, 2), PARAMS))
    found = run(engine)
    assert found[bad, 0][-1].finish_reason == "failed" and "no token" in str(found[bad, 0][-1].error)
    assert drawn(found[good, 0]) == [token for token, _ in plain(model, request)]


def test_likelihoods_are_those_of_the_model() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS)
    number = engine.add(request := Request(prompt(5, 2), PARAMS, logprobs=3))
    outputs = run(engine)[number, 0]
    cursor = prefill(model, request.ids, make_initial_state(model))
    for output in outputs:
        expected = torch.log_softmax(cursor.logits, -1)
        assert output.logprob is not None and output.token is not None
        # Relative to the largest logarithm, as those near zero are differences of numbers of that size.
        size = float(expected.abs().max())
        assert output.logprob.logprob == pytest.approx(float(expected[output.token]), abs=MODEL_TOLERANCE * size)
        assert [token for token, _ in output.logprob.top] == expected.topk(3).indices.tolist()
        cursor = prefill(model, [output.token], cursor.state)


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
def test_prompt_logprobs_do_not_depend_on_other_requests(version: str) -> None:
    """They are those of the model's own logits in fixed chunks, bit for bit, and the completions are unchanged."""
    model = packed(version)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=3, prefill_chunk=64))
    ids = prompt(2 * PROMPT_LOGPROBS_CHUNK + 9, 1)
    scored = [Request(ids[:length], PARAMS, prompt_logprobs=2) for length in (1, PROMPT_LOGPROBS_CHUNK, len(ids))]
    numbers = {engine.add(request): request for request in (*scored, *requests(4, 2))}
    found = run(engine)
    for number, request in numbers.items():
        outputs = found[number, 0]
        assert drawn(outputs) == [token for token, _ in plain(model, request)]
        chunks = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        if request.prompt_logprobs is None:
            assert not chunks
            continue
        assert chunks == [output.prompt_logprobs for output in outputs[: len(chunks)]], "the prompt comes first"
        assert tuple(token for chunk in chunks for token in chunk.ids) == request.ids
        assert [chunk.computed_tokens for chunk in chunks][-1] == len(request.ids)
        logprobs, state = list[object]([None]), make_initial_state(model)
        for begin in range(0, len(request.ids), PROMPT_LOGPROBS_CHUNK):
            logits, state = model(torch.tensor([request.ids[begin : begin + PROMPT_LOGPROBS_CHUNK]]), state)
            for place, token in enumerate(request.ids[begin + 1 : begin + PROMPT_LOGPROBS_CHUNK + 1]):
                expected = torch.log_softmax(logits[0, place], -1)
                values, tokens = expected.topk(2)
                top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
                logprobs.append((float(expected[token]), top))
        assert [logprob for chunk in chunks for logprob in chunk.logprobs] == logprobs


def test_prompt_logprobs_of_one_text() -> None:
    model = random_finch(VOCAB)
    start, ids = prefill(model, prompt(5, 1), make_initial_state(model)), prompt(PROMPT_LOGPROBS_CHUNK + 3, 2)
    logprobs = compute_prompt_logprobs(model, ids, start)
    assert len(logprobs) == len(ids) and all(each is not None and each.top == () for each in logprobs)
    assert logprobs[0] is not None
    assert logprobs[0].logprob == float(torch.log_softmax(start.logits, -1)[ids[0]]), "the ModelOutput has its logits"
    after_state = compute_prompt_logprobs(model, ids, start.state)
    assert after_state[0] is None and after_state[1:] == logprobs[1:]


def test_a_deadline_ends_prompt_logprobs_after_the_chunks_that_were_read() -> None:
    now = [10.0]
    engine = Engine(random_finch(VOCAB), clock=lambda: now[0])
    ids = prompt(5 * PROMPT_LOGPROBS_CHUNK, 1)
    late = engine.add(Request(ids, PARAMS, n=2, prompt_logprobs=0, deadline=12.0))
    never = engine.add(Request(ids, PARAMS, prompt_logprobs=0, deadline=5.0))
    outputs = []
    while engine.busy:
        outputs += engine.step()
        now[0] += 0.6
    for number, completions, chunks in ((late, 2, 3), (never, 1, 1)):
        mine = [output for output in outputs if output.request_id == number]
        assert [output.finish_reason for output in mine] == [None] * chunks + ["deadline"] * completions
        assert sum(len(output.prompt_logprobs.ids) for output in mine if output.prompt_logprobs is not None) == (
            chunks * PROMPT_LOGPROBS_CHUNK + 1
        ), "the log probability of the next token is known too"
        assert all(output.prompt_incomplete for output in mine[chunks:])


def test_an_error_in_prompt_logprobs_ends_that_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS)
    monkeypatch.setattr(engine_module, "run_with_all_logits", fail)
    bad = engine.add(Request(prompt(5, 2), PARAMS, prompt_logprobs=0))
    good = engine.add(request := Request(prompt(5, 2), PARAMS))
    found = run(engine)
    (failed,) = found[bad, 0]
    assert failed.finish_reason == "failed" and str(failed.error) == "the model failed: out of memory"
    assert drawn(found[good, 0]) == [token for token, _ in plain(model, request)]


def test_the_tally_counts_what_was_done() -> None:
    engine = Engine(random_finch(VOCAB), scheduler=Scheduler(slots=4))
    engine.add(Request(prompt(30, 1), replace(PARAMS, max_tokens=4), n=2))
    assert (engine.num_waiting, engine.num_running) == (1, 0)
    engine.step()
    assert (engine.num_waiting, engine.num_running) == (0, 2)
    run(engine)
    tally = engine.stats
    assert (tally.prefill_tokens, tally.sampled_tokens, tally.requests, tally.model_calls) == (30, 8, 1, 4)
    assert tally.finished == {"length": 2} and tally.model_seconds > 0
