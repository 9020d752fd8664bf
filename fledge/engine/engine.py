"""The engine: many requests on one model, a call of it at a time.

    engine = Engine(model, eos_id=0)
    number = engine.add(Request(ids, params))
    while engine.busy:
        for output in engine.step(): ...

The tokens of a request are those of the plain loop in `generation.py` with the same seed, whatever runs beside it: its
random numbers are its own, its state is a value, and the native library gives a sequence the same bits in any batch.
Token ids only; one thread at a time. Not here: text and stop texts (`desk.py`), who goes first (`scheduler.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.generation import ModelOutput, check_ids, config_of, device_of, fresh_state
from fledge.engine.model_runner import read
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.request import Finish, QueueFull, Request, TokenLogprob, TokenOutput
from fledge.engine.sampling import LARGEST_SEED, Sampler
from fledge.engine.scheduler import LatencyModel, ScheduledTokens, Scheduler
from fledge.engine.sequence import PendingSample, RequestState, Sequence, next_tokens
from fledge.models.config import ModelConfig
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import NO_EOS


@dataclass
class EngineStats:
    """What the engine has done since it began."""

    calls: int = 0
    read: int = 0  # tokens of prompts
    cached: int = 0  # tokens of prompts that the cache spared
    drawn: int = 0  # tokens written
    batch: int = 0  # sequences in the last call
    seconds: float = 0.0  # in the model
    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # continuations, by reason


class Engine:
    """Continuous batching for one model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_id: int = NO_EOS,
        scheduler: Scheduler | None = None,
        queue: int = 256,
        cache: PrefixCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """queue: requests that may be on their way at once; more are turned away. clock: what deadlines are told by."""
        self.model, self.eos_id, self.cache = model, eos_id, cache
        self.scheduler = scheduler or Scheduler()
        self.queue = queue
        self.tally = EngineStats()
        self._clock = clock
        self._pace = LatencyModel()
        self._tasks: dict[int, RequestState] = {}
        self._fresh, self._device = fresh_state(model), device_of(model)
        self._next = 0

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return config_of(self.model)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._tasks)

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been read yet."""
        return sum(not task.begun for task in list(self._tasks.values()))

    @property
    def running(self) -> int:
        """Sequences that are being read or written."""
        return sum(task.width for task in list(self._tasks.values()) if task.begun)

    def add(self, request: Request, *, extra: bool = False) -> int:
        """Take a request in; its number names it from now on. extra: even where the queue is full.

        Raises Busy where it is, and the errors of `check`.
        """
        if len(self._tasks) >= self.queue and not extra:
            raise QueueFull(f"{self.queue} requests are on their way, and no more may wait; try again later")
        self.check(request)
        number, self._next = self._next, self._next + 1
        rank = self.scheduler.rank(self._clock(), request.priority)
        start = request.start.state if isinstance(request.start, ModelOutput) else request.start or self._fresh
        self._tasks[number] = RequestState(number, request, rank, StateSlice(start.to(self._device)))
        self.tally.requests += 1
        return number

    def abort(self, number: int) -> None:
        """Forget a request; nothing more comes of it. No error where it has ended already."""
        self._tasks.pop(number, None)

    def abort_choice(self, number: int, choice: int) -> None:
        """Forget one continuation of a request, and the request with the last of them."""
        task = self._tasks.get(number)
        if task is not None and task.strands:
            task.strands = [strand for strand in task.strands if strand.choice != choice]
            if not task.strands:
                del self._tasks[number]

    def step(self) -> list[TokenOutput]:
        """One call of the model and what came of it; nothing where there is nothing to do."""
        outputs = self._expired()
        chosen = self.scheduler.chosen(list(self._tasks.values()))
        due = [place for task in chosen if not task.begun for place in self._begin(task, outputs)]
        self._draw(due, outputs)
        for task in self._tasks.values():
            if task.begun and task not in chosen:
                task.park()
        pieces = self.scheduler.pieces([task for task in chosen if task.number in self._tasks], self._pace)
        pieces = [piece for piece in pieces if piece.ids]
        if pieces:
            self._call(pieces, outputs)
        return outputs

    def check(self, request: Request) -> None:
        """Raise UsageError, TokenizerError or StateError for what cannot be run. May be called from any thread."""
        known = isinstance(request.start, ModelOutput)
        if not request.ids and not known:
            raise UsageError("the prompt is empty; give at least one token")
        assert not (request.ids and known), "a Cursor has read its prompt"
        check_ids(request.ids, self.config.vocab_size)
        if not 0 <= request.n <= self.scheduler.slots:
            raise UsageError(f"n is {request.n}; this engine writes up to {self.scheduler.slots} texts at once")
        if request.start is not None:
            state = request.start.state if isinstance(request.start, ModelOutput) else request.start
            state.check(self.config, 1)

    def _expired(self) -> list[TokenOutput]:
        now, outputs = self._clock(), list[TokenOutput]()
        for task in list(self._tasks.values()):
            if task.request.deadline is not None and now >= task.request.deadline:
                for strand in task.strands:
                    outputs.append(self._end(TokenOutput(task.number, strand.choice, strand.row), strand, "deadline"))
                for choice in range(0 if task.strands else max(task.request.n, 1)):
                    outputs.append(self._end(TokenOutput(task.number, choice, task.row, unread=True), None, "deadline"))
                self.abort(task.number)
        return outputs

    def _begin(self, task: RequestState, outputs: list[TokenOutput]) -> list[PendingSample]:
        """Look up what is known of a prompt. Returns what is to be drawn where that is all of it."""
        task.begun = True
        request = task.request
        if isinstance(request.start, ModelOutput):
            return self._write(task, request.start.logits.float().cpu(), outputs)
        if self.cache is not None and request.space is not None:
            hit = self.cache.find(request.space, request.ids)
            if hit.state is not None:
                # From the disk it comes on the CPU.
                task.row, task.done, task.cached = StateSlice(hit.state.to(self._device)), hit.length, hit.length
                self.tally.cached += hit.length
            if hit.logits is not None and hit.length == len(request.ids):
                return self._write(task, hit.logits, outputs)
            task.cuts.extend(self.cache.places(request.space, request.ids, task.done, request.marks))
            self.cache.learn(request.space, request.ids)
        return []

    def _call(self, pieces: list[ScheduledTokens], outputs: list[TokenOutput]) -> None:
        began = time.perf_counter()
        rows = [piece.task.row if piece.strand is None else piece.strand.row for piece in pieces]
        logits, after = read(self.model, [piece.ids for piece in pieces], rows)
        tokens, seconds = sum(len(piece.ids) for piece in pieces), time.perf_counter() - began
        self._pace.learn(tokens, seconds)
        self.tally.calls += 1
        self.tally.batch = len(pieces)
        self.tally.seconds += seconds
        self.tally.read += sum(len(piece.ids) for piece in pieces if piece.strand is None)
        due = list[PendingSample]()
        for piece, scores, row in zip(pieces, logits, after, strict=True):
            if piece.strand is None:
                due += self._advance(piece, scores, row, outputs)
            else:
                piece.strand.row = row
                due.append(PendingSample(piece.task, piece.strand, scores))
        self._draw(due, outputs)

    def _advance(
        self, piece: ScheduledTokens, scores: Tensor, row: StateSlice, outputs: list[TokenOutput]
    ) -> list[PendingSample]:
        """A prompt has been read a little further. Returns what is to be drawn where that was the end of it."""
        task = piece.task
        task.row, task.done = row, task.done + len(piece.ids)
        complete = task.done == len(task.request.ids)
        if task.cuts and task.cuts[0] == task.done:
            task.cuts.popleft()
            self._keep(task, scores if complete else None)
        return self._write(task, scores, outputs) if complete else []

    def _keep(self, task: RequestState, scores: Tensor | None) -> None:
        """Give the cache the state at this place of the prompt."""
        assert self.cache is not None and task.request.space is not None
        state = task.row.alone()
        task.row = StateSlice(state)
        known = task.request.ids[: task.done]
        self.cache.put(task.request.space, known, state, None if scores is None else scores.clone())

    def _write(self, task: RequestState, scores: Tensor, outputs: list[TokenOutput]) -> list[PendingSample]:
        """All has been read: begin the continuations, whose first tokens are due then."""
        request = task.request
        if request.n == 0:
            output = TokenOutput(task.number, 0, task.row, logits=scores.clone(), cached=task.cached)
            outputs.append(self._end(output, None, "read"))
            self.abort(task.number)
            return []
        for choice in range(request.n):
            params = request.params
            if params.seed is not None and choice:
                params = params.with_overrides({"seed": (params.seed + choice) % (LARGEST_SEED + 1)})
            constraint = request.constraint.fork() if request.constraint is not None else None
            task.strands.append(Sequence(choice, task.row, Sampler(params), params.max_tokens, constraint, -1))
        return [PendingSample(task, strand, scores) for strand in task.strands]

    def _draw(self, due: list[PendingSample], outputs: list[TokenOutput]) -> None:
        """The next token of each of these continuations."""
        for (task, strand, scores), token in zip(due, next_tokens(due), strict=True):
            about = (task.number, strand.choice, strand.row)
            if isinstance(token, FledgeError):
                outputs.append(self._end(TokenOutput(*about, cached=task.cached, error=token), strand, "failed"))
                self.abort_choice(task.number, strand.choice)
                continue
            strand.token, strand.left = token, strand.left - 1
            self.tally.drawn += 1
            top = task.request.logprobs
            likely = None if top is None else likelihood(scores, token, top)
            output = TokenOutput(*about, token, None, strand.sampler.seed, task.cached, likely)
            reason = self._reason(strand)
            outputs.append(output if reason is None else self._end(output, strand, reason))
            if reason is not None:
                self.abort_choice(task.number, strand.choice)

    def _reason(self, strand: Sequence) -> Finish | None:
        """Why the token just drawn is the last one, if it is."""
        if strand.token == self.eos_id:
            return "eos"
        if strand.constraint is not None and strand.constraint.done:
            return "complete"
        return None if strand.left else "length"

    def _end(self, output: TokenOutput, strand: Sequence | None, reason: Finish) -> TokenOutput:
        self.tally.finished[reason] = self.tally.finished.get(reason, 0) + 1
        return output._replace(finish=reason, seed=0 if strand is None else strand.sampler.seed)


def likelihood(scores: Tensor, token: int, top: int) -> TokenLogprob:
    """scores (V,): log probability of the token, and of the `top` most probable ones."""
    logprobs = torch.log_softmax(scores.float(), dim=-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
