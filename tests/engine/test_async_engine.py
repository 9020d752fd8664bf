"""The desk against single streams: the same texts and states for every caller, and nobody is left waiting."""

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
from fledge.engine.request import QueueFull, Request
from fledge.engine.sampling import SamplingParams
from fledge.engine.scheduler import Scheduler

TOKENIZER = ByteTokenizer("\n\n", "ab", "lo", b"\xe5\xa5")
COLON = TOKENIZER.id_of(":")


class Office:
    """A desk whose events are sorted by job as they come."""

    def __init__(self, model: nn.Module, *, frame: float = 0.0, **engine: object) -> None:
        self.arrived: dict[TextRequest, queue.SimpleQueue[Event]] = {}
        self.steps = 0
        worker = Engine(model, eos_id=TOKENIZER.eos_id, **engine)  # type: ignore[arg-type]
        self.desk = AsyncEngine(worker, TOKENIZER, self.sort, flush_interval=frame)

    def __enter__(self) -> Office:
        self.desk.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.desk.close()

    def sort(self) -> None:
        self.steps += 1
        for job, event in self.desk.drain_events():
            self.arrived[job].put(event)

    def submit(self, job: TextRequest) -> TextRequest:
        self.arrived[job] = queue.SimpleQueue()
        self.desk.submit(job)
        return job

    def result(self, job: TextRequest) -> tuple[dict[int, str], dict[int, FinishEvent]]:
        """Wait until a job has ended: the text and the end of each choice."""
        texts, ends = dict.fromkeys(range(max(job.request.n, 1)), ""), dict[int, FinishEvent]()
        while len(ends) < len(texts):
            event = self.arrived[job].get(timeout=60)
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, TextEvent):
                texts[event.choice] += event.text
            else:
                ends[event.choice] = event
        return texts, ends


def fake(*replies: str) -> FakeModel:
    return FakeModel([TOKENIZER.encode(reply) for reply in replies], COLON, TOKENIZER.vocab_size)


def single(model: nn.Module, job: TextRequest, choice: int = 0) -> Completion:
    """The same text by itself."""
    request = job.request
    assert request.params.seed is not None
    params = request.params.with_overrides({"seed": request.params.seed + choice})
    stream = Stream(model, TOKENIZER, request.ids, make_initial_state(model), params, show_held=job.show_held)
    for _ in stream:
        pass
    return stream.completion


def job(prompt: str, *, n: int = 1, logprobs: int | None = None, **rest: object) -> TextRequest:
    settings = {name: rest.pop(name) for name in list(rest) if name in SamplingParams.__dataclass_fields__}
    params = SamplingParams(seed=3, max_tokens=40).with_overrides(settings)
    return TextRequest(Request(tuple(TOKENIZER.encode(prompt)), params, n=n, logprobs=logprobs), **rest)  # type: ignore[arg-type]


def test_many_callers_get_the_texts_of_single_streams() -> None:
    model, chooser = random_finch(TOKENIZER.vocab_size), random.Random(1)
    jobs = [
        job(
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
    with Office(model, scheduler=Scheduler(slots=5, prefill_chunk=64)) as office:
        for each in jobs:
            office.submit(each)
        for each in jobs:
            texts, ends = office.result(each)
            for choice, end in ends.items():
                expected = single(model, each, choice)
                assert texts[choice] == expected.text
                assert (end.reason, end.stop, end.ids) == (expected.finish_reason, expected.stop, expected.ids)
                assert end.seed == expected.seed and end.state is not None
                for name, tensor in end.state.tensors().items():
                    assert_close_relative(tensor, expected.state.tensors()[name], MODEL_TOLERANCE, name)
    assert office.desk.num_requests == 0


@pytest.mark.parametrize("reply", ["hello\n\nUser:", "hello", "", "h\u00e9\u597d\n"])
def test_a_stop_text_is_never_shown_and_the_state_ends_before_it(reply: str) -> None:
    model = fake(reply)
    with Office(model) as office:
        mine = office.submit(job("ask:", temperature=0.0, stop=("\n\n",), should_return_state=True))
        texts, ends = office.result(mine)
    end, expected = ends[0], single(model, mine)
    assert texts[0] == expected.text == reply.split("\n\n")[0]
    assert (end.reason, end.stop) == (expected.finish_reason, expected.stop)
    assert end.state is not None and equal_states(end.state, expected.state)


def test_the_closing_is_read_after_the_text() -> None:
    model = fake("hello\n\nUser:")
    closing = tuple(TOKENIZER.encode("\n\n"))
    with Office(model) as office:
        asked = job("ask:", temperature=0.0, stop=("\n\n",), should_return_state=True, suffix_ids=closing)
        _, ends = office.result(office.submit(asked))
    assert ends[0].ids == tuple(TOKENIZER.encode("hello\n\n"))
    again = Stream(
        model, TOKENIZER, [*asked.request.ids, *ends[0].ids], make_initial_state(model), SamplingParams(max_tokens=1)
    )
    next(again, None)
    assert again.prompt_output is not None and ends[0].state is not None
    assert equal_states(again.prompt_output.state, ends[0].state)


def test_a_job_without_a_state_ends_at_once() -> None:
    with Office(fake("hello\n\nUser:")) as office:
        _, ends = office.result(office.submit(job("ask:", temperature=0.0, stop=("\n\n",))))
        assert ends[0].state is None and not office.desk.engine.busy
        assert ends[0].sampled_tokens == 5, "the stop text was drawn too"


def test_tokens_come_with_the_text_they_show() -> None:
    model = fake("h\u597dlo ab\n\nUser:")
    with Office(model) as office:
        mine = office.submit(job("ask:", temperature=0.0, stop=("\n\n", "b "), logprobs=2))
        shown = []
        while not isinstance(event := office.arrived[mine].get(timeout=60), FinishEvent):
            assert isinstance(event, TextEvent)
            shown.append((event.text, [token.id for token in event.tokens]))
            assert all(token.logprob is not None and len(token.logprob.top) == 2 for token in event.tokens)
    # The letter of two tokens is shown once both are there; the pieces say which tokens made them.
    letter = TOKENIZER.encode("\u597d")
    assert shown[:2] == [("h", [TOKENIZER.id_of("h")]), ("\u597d", letter)]
    assert [token for _, ids in shown for token in ids] == TOKENIZER.encode("h\u597dlo ab")
    assert "".join(text for text, _ in shown) == "h\u597dlo ab"


def test_prompt_logprobs_come_before_the_text() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    ids = tuple(TOKENIZER.encode("a prompt of several chunks. " * 12))
    request = TextRequest(Request(ids, SamplingParams(seed=3, max_tokens=5), n=2, prompt_logprobs=1))
    with Office(model) as office:
        office.submit(request)
        tokens = list[TextToken]()
        while isinstance(event := office.arrived[request].get(timeout=60), PromptLogprobsEvent):
            tokens += event.tokens
            read = event.computed_tokens
        assert isinstance(event, TextEvent)
    assert read == len(ids) and tuple(token.id for token in tokens) == ids
    assert [token.logprob for token in tokens] == compute_prompt_logprobs(model, ids, top=1)


def test_text_that_comes_fast_is_handed_over_together() -> None:
    """The first of it at once, and all of it before the end; with other jobs beside it, each keeps its own order."""
    replies = ["h\u597dlo ab and more", "second text, longer than that", "third"]
    with Office(fake(*(f"{reply}\n\nUser:" for reply in replies)), frame=3600.0) as office:
        jobs = [job("ask:" * (number + 1), temperature=0.0, stop=("\n\n",), logprobs=0) for number in range(3)]
        for each in jobs:
            office.submit(each)
        for each, reply in zip(jobs, replies, strict=True):
            events = [office.arrived[each].get(timeout=60)]
            while not isinstance(events[-1], FinishEvent):
                events.append(office.arrived[each].get(timeout=60))
            pieces = [event for event in events if isinstance(event, TextEvent)]
            assert pieces[0].text == reply[0] and "".join(piece.text for piece in pieces) == reply
            assert [token.id for piece in pieces for token in piece.tokens] == TOKENIZER.encode(reply)
            assert len(pieces) < len(TOKENIZER.encode(reply))


def test_held_text_is_told_before_an_error() -> None:
    model, calls = fake("hello there"), 0

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with Office(model, frame=3600.0) as office:
        mine = office.submit(job("ask:", temperature=0.0))
        first, second, end = (office.arrived[mine].get(timeout=60) for _ in range(3))
        assert isinstance(first, TextEvent) and isinstance(second, TextEvent) and isinstance(end, ErrorEvent)
        assert "hello there".startswith(first.text + second.text) and len(second.text) > 1


def test_of_a_token_that_a_stop_text_cuts_the_part_before_it_counts() -> None:
    with Office(fake("xab")) as office:
        mine = office.submit(job("ask:", temperature=0.0, stop=("b",), logprobs=0))
        text, ids = "", list[int]()
        while not isinstance(event := office.arrived[mine].get(timeout=60), FinishEvent):
            assert isinstance(event, TextEvent)
            text += event.text
            ids += [token.id for token in event.tokens]
    assert text == "xa" and ids == TOKENIZER.encode("xab")


def test_what_is_cancelled_frees_its_place() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    with Office(model, scheduler=Scheduler(slots=1), max_requests=3) as office:
        endless = office.submit(job("x", max_tokens=10**9))
        waits = office.submit(job("y", max_tokens=3))
        assert isinstance(office.arrived[endless].get(timeout=60), TextEvent)
        office.desk.cancel(endless)
        office.result(waits)
        assert office.desk.num_requests == 0 and not office.desk.engine.busy


def test_refusals_come_at_once_and_from_the_callers_thread() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    with Office(model, scheduler=Scheduler(slots=1), max_requests=2) as office:
        with pytest.raises(TokenizerError):
            office.desk.submit(TextRequest(Request((9999,))))
        endless = [office.submit(job("x", max_tokens=10**9)) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests"):
            office.submit(job("y"))
        for each in endless:
            office.desk.cancel(each)


def test_one_failure_of_the_model_ends_its_jobs_and_the_desk_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = fake("hello")
    broken = threading.Event()
    broken.set()

    def fail(*arguments: object) -> None:
        if broken.is_set():
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with Office(model) as office:
        with pytest.raises(FledgeError, match="the model failed: out of memory"):
            office.result(office.submit(job("ask:")))
        broken.clear()
        texts, _ = office.result(office.submit(job("ask:", temperature=0.0)))
        assert texts[0] == "hello"
    assert "the engine failed" in caplog.text


def test_closing_finishes_what_runs_and_refuses_the_rest() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    office = Office(model)
    office.desk.start()
    mine = office.submit(job("x", max_tokens=30))
    closer = threading.Thread(target=office.desk.close, args=(60.0,))
    closer.start()
    while office.desk._shutdown_deadline is None:
        pass
    with pytest.raises(QueueFull, match="shutting down"):
        office.desk.submit(job("y"))
    office.result(mine)
    closer.join(timeout=60)
    assert not office.desk.is_alive


def test_what_still_runs_when_the_time_is_over_is_told_so() -> None:
    model, reached, gate = random_finch(TOKENIZER.vocab_size), threading.Event(), threading.Event()
    office = Office(model, scheduler=Scheduler(slots=2))

    def wait(*_: object) -> None:
        reached.set()
        assert gate.wait(60)

    model.register_forward_pre_hook(wait)
    office.desk.start()
    jobs = [office.submit(job("x", n=2, max_tokens=10**9)), office.submit(job("y", should_return_state=True))]
    assert reached.wait(60)
    late = office.submit(job("z"))
    asked = office.desk.call(int)
    office.desk.begin_shutdown()
    gate.set()
    for each in (*jobs, late):
        with pytest.raises(FledgeError, match="shutting down"):
            office.result(each)
    with pytest.raises(QueueFull, match="shutting down"):
        asked.result(timeout=60)
    office.desk.close()
    assert not office.desk.is_alive and office.desk.num_requests == 0


def test_work_for_the_engines_thread() -> None:
    with Office(fake("a")) as office:
        assert office.desk.call(lambda: threading.current_thread().name).result(timeout=60) == "fledge-engine"
        with pytest.raises(ZeroDivisionError):
            office.desk.call(lambda: 1 // 0).result(timeout=60)


def test_a_call_that_nobody_waits_for_is_passed_over_and_the_desk_goes_on() -> None:
    office = Office(fake("hello"))
    abandoned = office.desk.call(lambda: pytest.fail("nobody waits for this"))
    assert abandoned.cancel()
    running, gone = threading.Event(), threading.Event()

    def slow() -> int:
        running.set()
        assert gone.wait(60)
        return 1

    left = office.desk.call(slow)
    with office:
        assert running.wait(60)
        left.cancel()  # too late for that: its answer is lost, nothing else
        gone.set()
        texts, _ = office.result(office.submit(job("ask:", temperature=0.0)))
        assert texts[0] == "hello"
    with pytest.raises(QueueFull, match="shutting down"):
        office.desk.call(int)


def test_calls_take_turns_with_texts() -> None:
    office = Office(fake("hello"))
    calls = [office.desk.call(lambda: office.desk.engine.stats.model_calls) for _ in range(4)]
    mine = office.submit(job("ask:", temperature=0.0))
    with office:
        office.result(mine)
    seen = [call.result(timeout=60) for call in calls]
    assert seen == sorted(set(seen))  # a step of the model between any two of them


def test_one_that_cannot_begin_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Office(fake("hello")) as office:
        add = office.desk.engine.add

        def full(request: Request, *, bypass_limit: bool = False) -> int:
            if request.n == 2:
                raise RuntimeError("out of memory")
            return add(request, bypass_limit=bypass_limit)

        monkeypatch.setattr(office.desk.engine, "add", full)
        ids = tuple(TOKENIZER.encode("ask:"))
        fails, works = office.submit(TextRequest(Request(ids, n=2))), office.submit(job("ask:", temperature=0.0))
        with pytest.raises(FledgeError, match="the model failed: out of memory"):
            office.result(fails)
        assert office.result(works)[0][0] == "hello" and office.desk.num_requests == 0


def test_a_deadline_within_the_prompt_leaves_no_state_and_nothing_in_the_cache() -> None:
    model = random_finch(TOKENIZER.vocab_size)
    cache = Recorder()
    with Office(model, cache=cache, clock=lambda: 10.0) as office:
        ids = tuple(TOKENIZER.encode("a question that nobody has time to read:"))
        request = Request(ids, deadline=5.0, cache_namespace="mine")
        texts, ends = office.result(
            office.submit(TextRequest(request, suffix_ids=(3,), should_return_state=True, should_cache_state=True))
        )
    assert texts == {0: ""} and ends[0].reason == "deadline" and ends[0].state is None
    assert cache.kept == []


class Recorder:
    """A cache that knows nothing and remembers what it is given."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, ...]] = []

    def match_prefix(self, namespace: str, ids: Sequence[int]) -> PrefixMatch:
        return PrefixMatch(0, None, None, 0)

    def plan_snapshots(self, *arguments: object) -> list[int]:
        return []

    def insert_prompt(self, namespace: str, ids: Sequence[int]) -> None:
        pass

    def put(self, namespace: str, ids: Sequence[int], *rest: object) -> None:
        self.kept.append(tuple(ids))


def test_where_the_end_cannot_be_kept_the_job_fails_and_is_not_left_waiting() -> None:
    class Full(Recorder):
        def put(self, *arguments: object) -> None:
            raise OSError("no room")

    with Office(fake("hello"), cache=Full()) as office:
        request = Request(tuple(TOKENIZER.encode("ask:")), SamplingParams(temperature=0.0), cache_namespace="mine")
        mine = office.submit(TextRequest(request, suffix_ids=(3,), should_return_state=True, should_cache_state=True))
        with pytest.raises(FledgeError, match="the model failed: no room"):
            office.result(mine)
        assert office.desk.num_requests == 0 and not office.desk.engine.busy
