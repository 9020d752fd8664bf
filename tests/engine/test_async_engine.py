"""AsyncEngine against single streams: the same texts and states for every request, and every request ends."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Sequence

import pytest
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch
from torch import nn

from fledge.core.errors import FledgeError, TokenizerError
from fledge.engine.async_engine import AsyncEngine
from fledge.engine.engine import Engine, compute_prompt_logprobs
from fledge.engine.events import ErrorEvent, Event, FinishEvent, PromptLogprobsEvent, TextEvent, TextRequest, TextToken
from fledge.engine.generation import make_initial_state
from fledge.engine.llm.stream import Completion, Stream
from fledge.engine.prefix_cache.cache import PrefixMatch
from fledge.engine.request import EngineStopped, QueueFull, Request
from fledge.engine.sampling import SamplingParams
from fledge.engine.scheduler import Scheduler

TOKENIZER = ByteTokenizer("\n\n", "ab", "lo", b"\xe5\xa5")
COLON = TOKENIZER.get_id(":")


class Runner:
    """An AsyncEngine whose events are sorted by request."""

    def __init__(self, model: nn.Module, *, flush_interval: float = 0.0, **settings: object) -> None:
        self.events: dict[TextRequest, queue.SimpleQueue[Event]] = {}
        engine = Engine(model, eos_id=TOKENIZER.eos_id, **settings)  # type: ignore[arg-type]
        self.engine = AsyncEngine(engine, TOKENIZER, self.sort, flush_interval=flush_interval)

    def __enter__(self) -> Runner:
        self.engine.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()

    def sort(self) -> None:
        for request, event in self.engine.drain_events():
            self.events[request].put(event)

    def submit(self, request: TextRequest) -> TextRequest:
        self.events[request] = queue.SimpleQueue()
        self.engine.submit(request)
        return request

    def result(self, request: TextRequest) -> tuple[dict[int, str], dict[int, FinishEvent]]:
        """Wait until a request has ended: the text and the FinishEvent of each completion."""
        texts, ends = dict.fromkeys(range(max(request.request.n, 1)), ""), dict[int, FinishEvent]()
        while len(ends) < len(texts):
            event = self.events[request].get(timeout=60)
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, TextEvent):
                texts[event.choice] += event.text
            else:
                ends[event.choice] = event
        return texts, ends


def fake(*replies: str) -> FakeModel:
    return FakeModel([TOKENIZER.encode(reply) for reply in replies], COLON, TOKENIZER.vocab_size)


def single(model: nn.Module, text_request: TextRequest, choice: int = 0) -> Completion:
    """The same text from a Stream."""
    request = text_request.request
    assert request.params.seed is not None
    params = request.params.with_overrides({"seed": request.params.seed + choice})
    stream = Stream(model, TOKENIZER, request.ids, make_initial_state(model), params, show_held=text_request.show_held)
    for _ in stream:
        pass
    return stream.completion


def make_request(prompt: str, *, n: int = 1, logprobs: int | None = None, **options: object) -> TextRequest:
    settings = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    params = SamplingParams(seed=3, max_tokens=40).with_overrides(settings)
    return TextRequest(Request(tuple(TOKENIZER.encode(prompt)), params, n=n, logprobs=logprobs), **options)  # type: ignore[arg-type]


def test_requests_in_a_batch_match_single_streams() -> None:
    model, chooser = random_finch(TOKENIZER.vocab_size), random.Random(1)
    requests = [
        make_request(
            "x" * chooser.choice([1, 40, 200]),
            n=chooser.choice([1, 2]),
            seed=number,
            max_tokens=chooser.choice([1, 9, 30]),
            stop=chooser.choice([(), ("a",), ("b\n", "\u00e9")]),
            should_return_state=True,
            show_held=chooser.random() < 0.5,
        )
        for number in range(12)
    ]
    with Runner(model, scheduler=Scheduler(slots=5, prefill_chunk=64)) as runner:
        for each in requests:
            runner.submit(each)
        for each in requests:
            texts, ends = runner.result(each)
            for choice, end in ends.items():
                expected = single(model, each, choice)
                assert texts[choice] == expected.text
                assert (end.reason, end.stop, end.ids) == (expected.finish_reason, expected.stop, expected.ids)
                assert end.seed == expected.seed and end.state is not None
                for name, tensor in end.state.tensors().items():
                    assert_close_relative(tensor, expected.state.tensors()[name], MODEL_TOLERANCE, name)
    assert runner.engine.num_requests == 0


@pytest.mark.parametrize("reply", ["hello\n\nUser:", "hello", "", "h\u00e9\u597d\n"])
def test_a_stop_text_is_never_emitted_and_the_state_ends_before_it(reply: str) -> None:
    model = fake(reply)
    with Runner(model) as runner:
        request = runner.submit(make_request("ask:", temperature=0.0, stop=("\n\n",), should_return_state=True))
        texts, ends = runner.result(request)
    end, expected = ends[0], single(model, request)
    assert texts[0] == expected.text == reply.split("\n\n")[0]
    assert (end.reason, end.stop) == (expected.finish_reason, expected.stop)
    assert end.state is not None and equal_states(end.state, expected.state)


def test_suffix_ids_are_read_after_the_text() -> None:
    model = fake("hello\n\nUser:")
    suffix_ids = tuple(TOKENIZER.encode("\n\n"))
    with Runner(model) as runner:
        request = make_request("ask:", temperature=0.0, stop=("\n\n",), should_return_state=True, suffix_ids=suffix_ids)
        _, ends = runner.result(runner.submit(request))
    assert ends[0].ids == tuple(TOKENIZER.encode("hello\n\n"))
    again = Stream(
        model, TOKENIZER, [*request.request.ids, *ends[0].ids], make_initial_state(model), SamplingParams(max_tokens=1)
    )
    next(again, None)
    assert again.prompt_output is not None and ends[0].state is not None
    assert equal_states(again.prompt_output.state, ends[0].state)


def test_a_request_without_a_state_ends_without_a_final_read() -> None:
    with Runner(fake("hello\n\nUser:")) as runner:
        _, ends = runner.result(runner.submit(make_request("ask:", temperature=0.0, stop=("\n\n",))))
        assert ends[0].state is None and not runner.engine.engine.busy
        assert ends[0].sampled_tokens == 5, "the tokens of the stop text count too"


def test_tokens_come_with_their_text() -> None:
    model = fake("h\u597dlo ab\n\nUser:")
    with Runner(model) as runner:
        request = runner.submit(make_request("ask:", temperature=0.0, stop=("\n\n", "b "), logprobs=2))
        emitted = []
        while not isinstance(event := runner.events[request].get(timeout=60), FinishEvent):
            assert isinstance(event, TextEvent)
            emitted.append((event.text, [token.id for token in event.tokens]))
            assert all(token.logprob is not None and len(token.logprob.top) == 2 for token in event.tokens)
    # A character of two tokens is emitted with both of them.
    letter = TOKENIZER.encode("\u597d")
    assert emitted[:2] == [("h", [TOKENIZER.get_id("h")]), ("\u597d", letter)]
    assert [token for _, ids in emitted for token in ids] == TOKENIZER.encode("h\u597dlo ab")
    assert "".join(text for text, _ in emitted) == "h\u597dlo ab"


def test_prompt_logprobs_come_before_the_text() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    ids = tuple(TOKENIZER.encode("a prompt of several chunks. " * 12))
    request = TextRequest(Request(ids, SamplingParams(seed=3, max_tokens=5), n=2, prompt_logprobs=1))
    with Runner(model) as runner:
        runner.submit(request)
        tokens = list[TextToken]()
        while isinstance(event := runner.events[request].get(timeout=60), PromptLogprobsEvent):
            tokens += event.tokens
            read = event.computed_tokens
        assert isinstance(event, TextEvent)
    assert read == len(ids) and tuple(token.id for token in tokens) == ids
    assert [token.logprob for token in tokens] == compute_prompt_logprobs(model, ids, top=1)


def test_fast_text_is_emitted_together() -> None:
    """The first text immediately, and all text before the end; the order within each request is kept."""
    replies = ["h\u597dlo ab and more", "second text, longer than that", "third"]
    with Runner(fake(*(f"{reply}\n\nUser:" for reply in replies)), flush_interval=3600.0) as runner:
        requests = [
            make_request("ask:" * (number + 1), temperature=0.0, stop=("\n\n",), logprobs=0) for number in range(3)
        ]
        for each in requests:
            runner.submit(each)
        for each, reply in zip(requests, replies, strict=True):
            events = [runner.events[each].get(timeout=60)]
            while not isinstance(events[-1], FinishEvent):
                events.append(runner.events[each].get(timeout=60))
            texts = [event for event in events if isinstance(event, TextEvent)]
            assert texts[0].text == reply[0] and "".join(event.text for event in texts) == reply
            assert [token.id for event in texts for token in event.tokens] == TOKENIZER.encode(reply)
            assert len(texts) < len(TOKENIZER.encode(reply))


def test_waiting_text_is_emitted_before_an_error() -> None:
    model, calls = fake("hello there"), 0

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with Runner(model, flush_interval=3600.0) as runner:
        request = runner.submit(make_request("ask:", temperature=0.0))
        first, second, end = (runner.events[request].get(timeout=60) for _ in range(3))
        assert isinstance(first, TextEvent) and isinstance(second, TextEvent) and isinstance(end, ErrorEvent)
        assert "hello there".startswith(first.text + second.text) and len(second.text) > 1


def test_a_token_that_contains_the_start_of_a_stop_text_is_emitted_in_part() -> None:
    with Runner(fake("xab")) as runner:
        request = runner.submit(make_request("ask:", temperature=0.0, stop=("b",), logprobs=0))
        text, ids = "", list[int]()
        while not isinstance(event := runner.events[request].get(timeout=60), FinishEvent):
            assert isinstance(event, TextEvent)
            text += event.text
            ids += [token.id for token in event.tokens]
    assert text == "xa" and ids == TOKENIZER.encode("xab")


def test_a_cancelled_request_frees_its_slot() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    with Runner(model, scheduler=Scheduler(slots=1), max_requests=3) as runner:
        endless = runner.submit(make_request("x", max_tokens=10**9))
        waits = runner.submit(make_request("y", max_tokens=3))
        assert isinstance(runner.events[endless].get(timeout=60), TextEvent)
        runner.engine.cancel(endless)
        runner.result(waits)
        assert runner.engine.num_requests == 0 and not runner.engine.engine.busy


def test_submit_raises_errors_in_the_callers_thread() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    with Runner(model, scheduler=Scheduler(slots=1), max_requests=2) as runner:
        with pytest.raises(TokenizerError):
            runner.engine.submit(TextRequest(Request((9999,))))
        endless = [runner.submit(make_request("x", max_tokens=10**9)) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests"):
            runner.submit(make_request("y"))
        for each in endless:
            runner.engine.cancel(each)


def test_after_a_failure_of_the_model_the_engine_continues(caplog: pytest.LogCaptureFixture) -> None:
    model = fake("hello")
    broken = threading.Event()
    broken.set()

    def fail(*arguments: object) -> None:
        if broken.is_set():
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with Runner(model) as runner:
        with pytest.raises(FledgeError, match="the model failed: out of memory"):
            runner.result(runner.submit(make_request("ask:")))
        broken.clear()
        texts, _ = runner.result(runner.submit(make_request("ask:", temperature=0.0)))
        assert texts[0] == "hello"
    assert "the engine failed" in caplog.text


def test_close_finishes_running_requests_and_rejects_new_ones() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    runner = Runner(model)
    runner.engine.start()
    request = runner.submit(make_request("x", max_tokens=30))
    closer = threading.Thread(target=runner.engine.close, args=(60.0,))
    closer.start()
    while runner.engine._shutdown_deadline is None:
        pass
    with pytest.raises(EngineStopped, match="shutting down"):
        runner.engine.submit(make_request("y"))
    runner.result(request)
    closer.join(timeout=60)
    assert not runner.engine.is_alive


def test_requests_that_outlast_the_shutdown_fail() -> None:
    model, reached, gate = random_finch(TOKENIZER.vocab_size), threading.Event(), threading.Event()
    runner = Runner(model, scheduler=Scheduler(slots=2))

    def wait(*_: object) -> None:
        reached.set()
        assert gate.wait(60)

    model.register_forward_pre_hook(wait)
    runner.engine.start()
    requests = [
        runner.submit(make_request("x", n=2, max_tokens=10**9)),
        runner.submit(make_request("y", should_return_state=True)),
    ]
    assert reached.wait(60)
    late = runner.submit(make_request("z"))
    call = runner.engine.call(int)
    runner.engine.begin_shutdown()
    gate.set()
    for each in (*requests, late):
        with pytest.raises(FledgeError, match="shutting down"):
            runner.result(each)
    with pytest.raises(EngineStopped, match="shutting down"):
        call.result(timeout=60)
    runner.engine.close()
    assert not runner.engine.is_alive and runner.engine.num_requests == 0


def test_call_runs_in_the_engines_thread() -> None:
    with Runner(fake("a")) as runner:
        assert runner.engine.call(lambda: threading.current_thread().name).result(timeout=60) == "fledge-engine"
        with pytest.raises(ZeroDivisionError):
            runner.engine.call(lambda: 1 // 0).result(timeout=60)


def test_a_cancelled_call_is_skipped() -> None:
    runner = Runner(fake("hello"))
    abandoned = runner.engine.call(lambda: pytest.fail("this call was cancelled"))
    assert abandoned.cancel()
    running, may_continue = threading.Event(), threading.Event()

    def slow() -> int:
        running.set()
        assert may_continue.wait(60)
        return 1

    running_call = runner.engine.call(slow)
    with runner:
        assert running.wait(60)
        running_call.cancel()  # too late: only its result is lost
        may_continue.set()
        texts, _ = runner.result(runner.submit(make_request("ask:", temperature=0.0)))
        assert texts[0] == "hello"
    with pytest.raises(EngineStopped, match="shutting down"):
        runner.engine.call(int)


def test_a_step_runs_between_two_calls() -> None:
    runner = Runner(fake("hello"))
    calls = [runner.engine.call(lambda: runner.engine.engine.stats.model_calls) for _ in range(4)]
    request = runner.submit(make_request("ask:", temperature=0.0))
    with runner:
        runner.result(request)
    counts = [call.result(timeout=60) for call in calls]
    assert counts == sorted(set(counts)), "the model ran between any two calls"


def test_an_error_in_add_fails_one_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with Runner(fake("hello")) as runner:
        add = runner.engine.engine.add

        def full(request: Request, *, bypass_limit: bool = False) -> int:
            if request.n == 2:
                raise RuntimeError("out of memory")
            return add(request, bypass_limit=bypass_limit)

        monkeypatch.setattr(runner.engine.engine, "add", full)
        ids = tuple(TOKENIZER.encode("ask:"))
        fails = runner.submit(TextRequest(Request(ids, n=2)))
        works = runner.submit(make_request("ask:", temperature=0.0))
        with pytest.raises(FledgeError, match="the model failed: out of memory"):
            runner.result(fails)
        assert runner.result(works)[0][0] == "hello" and runner.engine.num_requests == 0


def test_a_deadline_within_the_prompt_stores_no_state() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    cache = RecordingCache()
    with Runner(model, cache=cache, clock=lambda: 10.0) as runner:
        ids = tuple(TOKENIZER.encode("a question that takes too long to read:"))
        request = Request(ids, deadline=5.0, cache_namespace="a")
        texts, ends = runner.result(
            runner.submit(TextRequest(request, suffix_ids=(3,), should_return_state=True, should_cache_state=True))
        )
    assert texts == {0: ""} and ends[0].reason == "deadline" and ends[0].state is None
    assert cache.stored == []


class RecordingCache:
    """An empty cache that records the ids of stored states."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, ...]] = []

    def match_prefix(self, namespace: str, ids: Sequence[int]) -> PrefixMatch:
        return PrefixMatch(0, None, None, 0)

    def plan_snapshots(self, *arguments: object) -> list[int]:
        return []

    def insert_prompt(self, namespace: str, ids: Sequence[int]) -> None:
        pass

    def put(self, namespace: str, ids: Sequence[int], *values: object) -> None:
        self.stored.append(tuple(ids))


def test_a_request_fails_if_its_final_state_cannot_be_stored() -> None:
    class FullCache(RecordingCache):
        def put(self, *arguments: object) -> None:
            raise OSError("no room")

    with Runner(fake("hello"), cache=FullCache()) as runner:
        ids = tuple(TOKENIZER.encode("ask:"))
        request = TextRequest(
            Request(ids, SamplingParams(temperature=0.0), cache_namespace="a"),
            suffix_ids=(3,),
            should_return_state=True,
            should_cache_state=True,
        )
        runner.submit(request)
        with pytest.raises(FledgeError, match="the model failed: no room"):
            runner.result(request)
        assert runner.engine.num_requests == 0 and not runner.engine.engine.busy
