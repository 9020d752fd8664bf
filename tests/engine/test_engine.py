"""The engine against the reference loop: the same tokens for every request, whatever else runs."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from engine_runs import PARAMS, VOCAB, native_model, random_prompt, reference_ids, reference_tokens, run, tokens_of
from fakes import EOS, equal_states, random_finch
from native_library import needs_native
from random_checkpoints import VERSIONS

from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.engine import engine as engine_module
from fledge.engine.engine import PROMPT_LOGPROBS_CHUNK, Engine, compute_prompt_logprobs
from fledge.engine.generation import make_initial_state, prefill
from fledge.engine.request import QueueFull, Request
from fledge.engine.scheduler import Scheduler


def random_requests(count: int, seed: int) -> list[Request]:
    """Short and long prompts, different seeds and lengths, one or several completions."""
    chooser = random.Random(seed)
    requests = []
    for index in range(count):
        params = replace(PARAMS, seed=chooser.randrange(1000), max_tokens=chooser.randrange(1, 14))
        length = chooser.choice([1, 2, 17, 60, 300])
        requests.append(Request(random_prompt(length, index), params, n=chooser.choice([1, 1, 1, 3])))
    return requests


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", range(3))
def test_requests_in_a_batch_match_the_reference_bit_for_bit(version: str, seed: int) -> None:
    """Requests arrive and are aborted at random times; the others have the tokens and states of the reference loop."""
    model, chooser = native_model(version), random.Random(seed)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=7, prefill_chunk=64))
    waiting, submitted, aborted = random_requests(14, seed), dict[int, Request](), set[int]()
    outputs_by_id = defaultdict(list)
    while waiting or engine.busy:
        if waiting and chooser.random() < 0.5:
            request = waiting.pop()
            submitted[engine.add(request)] = request
        if submitted and chooser.random() < 0.05:
            aborted.add(request_id := chooser.choice(list(submitted)))
            engine.abort(request_id)
        for output in engine.step():
            assert output.request_id not in aborted
            outputs_by_id[output.request_id, output.choice].append(output)
    assert len(submitted) - len(aborted) > 5
    for request_id, request in submitted.items():
        for choice in range(request.n if request_id not in aborted else 0):
            outputs, expected = outputs_by_id[request_id, choice], reference_tokens(model, request, choice)
            assert tokens_of(outputs) == [token for token, _ in expected]
            for output, (_, before) in zip(outputs, expected, strict=True):
                assert equal_states(output.state_before.extract(), before)
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason == ("eos" if outputs[-1].token == EOS else "length")


def test_a_torch_model_samples_the_same_tokens() -> None:
    """The last bits of its logits depend on the batch, but these logits are too far apart for that to matter."""
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=4, prefill_chunk=32))
    submitted = {engine.add(request): request for request in random_requests(6, 1)}
    outputs_by_id = run(engine)
    for request_id, request in submitted.items():
        for choice in range(request.n):
            assert tokens_of(outputs_by_id[request_id, choice]) == reference_ids(model, request, choice)


def test_a_request_without_completions_returns_logits_and_state() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(prefill_chunk=1000))
    engine.add(Request(random_prompt(40, 1), n=0))
    (output,) = run(engine)[0, 0]
    expected = prefill(model, random_prompt(40, 1), make_initial_state(model))
    assert (output.finish_reason, output.token) == ("read", None)
    assert output.logits is not None
    assert_close_relative(output.logits, expected.logits, MODEL_TOLERANCE, "logits")
    for name, tensor in output.state_before.extract().tensors().items():
        assert_close_relative(tensor, expected.state.tensors()[name], MODEL_TOLERANCE, name)


def test_a_request_can_start_from_a_state_or_a_model_output() -> None:
    model = random_finch(VOCAB)
    output = prefill(model, random_prompt(9, 1), make_initial_state(model))
    engine = Engine(model, eos_id=EOS)
    after_state = Request(random_prompt(5, 2), PARAMS, start=output.state)
    after_output = Request((), PARAMS, start=output, n=2)
    request_ids = [engine.add(after_state), engine.add(after_output)]
    outputs_by_id = run(engine)
    assert tokens_of(outputs_by_id[request_ids[0], 0]) == reference_ids(model, after_state)
    for choice in range(2):
        assert tokens_of(outputs_by_id[request_ids[1], choice]) == reference_ids(model, after_output, choice)


def test_a_completion_can_be_aborted_without_the_others() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, scheduler=Scheduler(slots=3))
    request = Request(random_prompt(5, 2), PARAMS, n=3)
    request_id = engine.add(request)
    engine.step()
    engine.abort_choice(request_id, 1)
    outputs_by_id = run(engine)
    assert (request_id, 1) not in outputs_by_id
    assert tokens_of(outputs_by_id[request_id, 2]) == reference_ids(model, request, 2)[1:]
    engine.abort_choice(request_id, 1)
    assert not engine.busy


def test_a_deadline_ends_late_requests_only() -> None:
    now = [0.0]
    engine = Engine(random_finch(VOCAB), scheduler=Scheduler(slots=2), clock=lambda: now[0])
    late = engine.add(Request(random_prompt(5, 2), replace(PARAMS, max_tokens=10**6), deadline=3.0))
    never = engine.add(Request(random_prompt(5, 2), PARAMS, n=2, deadline=2.0))
    fine = engine.add(Request(random_prompt(5, 3), PARAMS, priority=1))
    outputs = []
    while engine.busy:
        outputs += engine.step()
        now[0] += 0.1
    ends = {(output.request_id, output.choice): output for output in outputs if output.finish_reason}
    assert ends[late, 0].finish_reason == "deadline" and ends[late, 0].token is None
    assert ends[never, 0].finish_reason == ends[never, 1].finish_reason == "deadline"
    assert ends[fine, 0].finish_reason in ("length", "eos")
    assert engine.stats.finished["deadline"] == 3


def test_invalid_requests_and_a_full_queue() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, scheduler=Scheduler(slots=4), max_requests=2)
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.add(Request(()))
    with pytest.raises(TokenizerError, match="77 is outside"):
        engine.add(Request((1, VOCAB)))
    with pytest.raises(UsageError, match="n is 5"):
        engine.add(Request((1,), n=5))
    with pytest.raises(StateError):
        engine.add(Request((1,), start=make_initial_state(native_model("4"))))
    assert not engine.busy
    first = engine.add(Request((1,)))
    engine.add(Request((1,)))
    with pytest.raises(QueueFull, match="2 requests are queued"):
        engine.add(Request((1,)))
    engine.abort(first)
    engine.add(Request((1,)))


def test_an_error_ends_one_completion_only() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS)
    bad = engine.add(Request(random_prompt(5, 2), replace(PARAMS, ban=tuple(range(VOCAB)))))
    good = engine.add(request := Request(random_prompt(5, 2), PARAMS))
    outputs_by_id = run(engine)
    assert outputs_by_id[bad, 0][-1].finish_reason == "failed" and "no token" in str(outputs_by_id[bad, 0][-1].error)
    assert tokens_of(outputs_by_id[good, 0]) == reference_ids(model, request)


def test_logprobs_are_those_of_the_model() -> None:
    model = random_finch(VOCAB)
    engine = Engine(model, eos_id=EOS)
    request_id = engine.add(request := Request(random_prompt(5, 2), PARAMS, logprobs=3))
    outputs = run(engine)[request_id, 0]
    reference = prefill(model, request.ids, make_initial_state(model))
    for output in outputs:
        expected = torch.log_softmax(reference.logits, -1)
        assert output.logprob is not None and output.token is not None
        # Relative to the largest logarithm, as those near zero are differences of numbers of that size.
        size = float(expected.abs().max())
        assert output.logprob.logprob == pytest.approx(float(expected[output.token]), abs=MODEL_TOLERANCE * size)
        assert [token for token, _ in output.logprob.top] == expected.topk(3).indices.tolist()
        reference = prefill(model, [output.token], reference.state)


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
def test_prompt_logprobs_do_not_depend_on_other_requests(version: str) -> None:
    """They are those of the model's own logits in fixed chunks, bit for bit, and the completions are unchanged."""
    model = native_model(version)
    engine = Engine(model, eos_id=EOS, scheduler=Scheduler(slots=3, prefill_chunk=64))
    ids = random_prompt(2 * PROMPT_LOGPROBS_CHUNK + 9, 1)
    scored = [Request(ids[:length], PARAMS, prompt_logprobs=2) for length in (1, PROMPT_LOGPROBS_CHUNK, len(ids))]
    submitted = {engine.add(request): request for request in (*scored, *random_requests(4, 2))}
    outputs_by_id = run(engine)
    for request_id, request in submitted.items():
        outputs = outputs_by_id[request_id, 0]
        assert tokens_of(outputs) == reference_ids(model, request)
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
            for index, token in enumerate(request.ids[begin + 1 : begin + PROMPT_LOGPROBS_CHUNK + 1]):
                expected = torch.log_softmax(logits[0, index], -1)
                values, tokens = expected.topk(2)
                top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
                logprobs.append((float(expected[token]), top))
        assert [logprob for chunk in chunks for logprob in chunk.logprobs] == logprobs


def test_prompt_logprobs_of_one_text() -> None:
    model = random_finch(VOCAB)
    start = prefill(model, random_prompt(5, 1), make_initial_state(model))
    ids = random_prompt(PROMPT_LOGPROBS_CHUNK + 3, 2)
    logprobs = compute_prompt_logprobs(model, ids, start)
    assert len(logprobs) == len(ids) and all(each is not None and each.top == () for each in logprobs)
    assert logprobs[0] is not None
    assert logprobs[0].logprob == float(torch.log_softmax(start.logits, -1)[ids[0]]), "the ModelOutput has its logits"
    after_state = compute_prompt_logprobs(model, ids, start.state)
    assert after_state[0] is None and after_state[1:] == logprobs[1:]


def test_a_deadline_ends_prompt_logprobs_after_the_chunks_that_were_read() -> None:
    now = [10.0]
    engine = Engine(random_finch(VOCAB), clock=lambda: now[0])
    ids = random_prompt(5 * PROMPT_LOGPROBS_CHUNK, 1)
    late = engine.add(Request(ids, PARAMS, n=2, prompt_logprobs=0, deadline=12.0))
    never = engine.add(Request(ids, PARAMS, prompt_logprobs=0, deadline=5.0))
    outputs = []
    while engine.busy:
        outputs += engine.step()
        now[0] += 0.6
    for request_id, completions, chunks in ((late, 2, 3), (never, 1, 1)):
        mine = [output for output in outputs if output.request_id == request_id]
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
    bad = engine.add(Request(random_prompt(5, 2), PARAMS, prompt_logprobs=0))
    good = engine.add(request := Request(random_prompt(5, 2), PARAMS))
    outputs_by_id = run(engine)
    (failed,) = outputs_by_id[bad, 0]
    assert failed.finish_reason == "failed" and str(failed.error) == "the model failed: out of memory"
    assert tokens_of(outputs_by_id[good, 0]) == reference_ids(model, request)


def test_stats() -> None:
    engine = Engine(random_finch(VOCAB), scheduler=Scheduler(slots=4))
    engine.add(Request(random_prompt(30, 1), replace(PARAMS, max_tokens=4), n=2))
    assert (engine.num_waiting, engine.num_running) == (1, 0)
    engine.step()
    assert (engine.num_waiting, engine.num_running) == (0, 2)
    run(engine)
    stats = engine.stats
    assert (stats.prefill_tokens, stats.sampled_tokens, stats.requests, stats.model_calls) == (30, 8, 1, 4)
    assert stats.finished == {"length": 2} and stats.model_seconds > 0
