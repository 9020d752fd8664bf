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
from fledge.engine.generation import ModelOutput, check_token_ids, get_config, get_device, make_initial_state
from fledge.engine.model_runner import run_model
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.request import EngineFinishReason, QueueFull, Request, TokenLogprob, TokenOutput
from fledge.engine.sampling import MAX_SEED, Sampler
from fledge.engine.scheduler import LatencyModel, ScheduledTokens, Scheduler
from fledge.engine.sequence import PendingSample, RequestState, Sequence, sample_next_tokens
from fledge.models.config import ModelConfig
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import NO_EOS


@dataclass
class EngineStats:
    """What the engine has done since it began."""

    model_calls: int = 0
    prefill_tokens: int = 0  # tokens of prompts
    cached_tokens: int = 0  # tokens of prompts that the cache spared
    sampled_tokens: int = 0  # tokens written
    batch_size: int = 0  # sequences in the last call
    model_seconds: float = 0.0  # in the model
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
        max_requests: int = 256,
        cache: PrefixCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """queue: requests that may be on their way at once; more are turned away. clock: what deadlines are told by."""
        self.model, self.eos_id, self.cache = model, eos_id, cache
        self.scheduler = scheduler or Scheduler()
        self.max_requests = max_requests
        self.stats = EngineStats()
        self._clock = clock
        self._latency = LatencyModel()
        self._request_states: dict[int, RequestState] = {}
        self._initial_state, self._device = make_initial_state(model), get_device(model)
        self._next_id = 0

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return get_config(self.model)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._request_states)

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has been read yet."""
        return sum(not task.is_started for task in list(self._request_states.values()))

    @property
    def num_running(self) -> int:
        """Sequences that are being read or written."""
        return sum(task.num_sequences for task in list(self._request_states.values()) if task.is_started)

    def add(self, request: Request, *, bypass_limit: bool = False) -> int:
        """Take a request in; its number names it from now on. extra: even where the queue is full.

        Raises Busy where it is, and the errors of `check`.
        """
        if len(self._request_states) >= self.max_requests and not bypass_limit:
            raise QueueFull(f"{self.max_requests} requests are on their way, and no more may wait; try again later")
        self.check_request(request)
        number, self._next_id = self._next_id, self._next_id + 1
        rank = self.scheduler.compute_rank(self._clock(), request.priority)
        start = request.start.state if isinstance(request.start, ModelOutput) else request.start or self._initial_state
        self._request_states[number] = RequestState(number, request, rank, StateSlice(start.to(self._device)))
        self.stats.requests += 1
        return number

    def abort(self, number: int) -> None:
        """Forget a request; nothing more comes of it. No error where it has ended already."""
        self._request_states.pop(number, None)

    def abort_choice(self, number: int, choice: int) -> None:
        """Forget one continuation of a request, and the request with the last of them."""
        task = self._request_states.get(number)
        if task is not None and task.sequences:
            task.sequences = [strand for strand in task.sequences if strand.choice != choice]
            if not task.sequences:
                del self._request_states[number]

    def step(self) -> list[TokenOutput]:
        """One call of the model and what came of it; nothing where there is nothing to do."""
        outputs = self._expire()
        chosen = self.scheduler.select(list(self._request_states.values()))
        due = [place for task in chosen if not task.is_started for place in self._start(task, outputs)]
        self._sample(due, outputs)
        for task in self._request_states.values():
            if task.is_started and task not in chosen:
                task.detach_state()
        pieces = self.scheduler.schedule(
            [task for task in chosen if task.request_id in self._request_states], self._latency
        )
        pieces = [piece for piece in pieces if piece.ids]
        if pieces:
            self._run_model(pieces, outputs)
        return outputs

    def check_request(self, request: Request) -> None:
        """Raise UsageError, TokenizerError or StateError for what cannot be run. May be called from any thread."""
        known = isinstance(request.start, ModelOutput)
        if not request.ids and not known:
            raise UsageError("the prompt is empty; give at least one token")
        assert not (request.ids and known), "a Cursor has read its prompt"
        check_token_ids(request.ids, self.config.vocab_size)
        if not 0 <= request.n <= self.scheduler.slots:
            raise UsageError(f"n is {request.n}; this engine writes up to {self.scheduler.slots} texts at once")
        if request.start is not None:
            state = request.start.state if isinstance(request.start, ModelOutput) else request.start
            state.check(self.config, 1)

    def _expire(self) -> list[TokenOutput]:
        now, outputs = self._clock(), list[TokenOutput]()
        for task in list(self._request_states.values()):
            if task.request.deadline is not None and now >= task.request.deadline:
                for strand in task.sequences:
                    outputs.append(
                        self._finish(
                            TokenOutput(task.request_id, strand.choice, strand.state_slice), strand, "deadline"
                        )
                    )
                for choice in range(0 if task.sequences else max(task.request.n, 1)):
                    outputs.append(
                        self._finish(
                            TokenOutput(task.request_id, choice, task.state_slice, prompt_incomplete=True),
                            None,
                            "deadline",
                        )
                    )
                self.abort(task.request_id)
        return outputs

    def _start(self, task: RequestState, outputs: list[TokenOutput]) -> list[PendingSample]:
        """Look up what is known of a prompt. Returns what is to be drawn where that is all of it."""
        task.is_started = True
        request = task.request
        if isinstance(request.start, ModelOutput):
            return self._start_sequences(task, request.start.logits.float().cpu(), outputs)
        if self.cache is not None and request.cache_namespace is not None:
            hit = self.cache.match_prefix(request.cache_namespace, request.ids)
            if hit.state is not None:
                # From the disk it comes on the CPU.
                task.state_slice, task.computed_tokens, task.cached_tokens = (
                    StateSlice(hit.state.to(self._device)),
                    hit.length,
                    hit.length,
                )
                self.stats.cached_tokens += hit.length
            if hit.logits is not None and hit.length == len(request.ids):
                return self._start_sequences(task, hit.logits, outputs)
            task.snapshot_positions.extend(
                self.cache.plan_snapshots(
                    request.cache_namespace, request.ids, task.computed_tokens, request.message_ends
                )
            )
            self.cache.insert_prompt(request.cache_namespace, request.ids)
        return []

    def _run_model(self, pieces: list[ScheduledTokens], outputs: list[TokenOutput]) -> None:
        began = time.perf_counter()
        rows = [
            piece.request_state.state_slice if piece.sequence is None else piece.sequence.state_slice
            for piece in pieces
        ]
        logits, after = run_model(self.model, [piece.ids for piece in pieces], rows)
        tokens, seconds = sum(len(piece.ids) for piece in pieces), time.perf_counter() - began
        self._latency.update(tokens, seconds)
        self.stats.model_calls += 1
        self.stats.batch_size = len(pieces)
        self.stats.model_seconds += seconds
        self.stats.prefill_tokens += sum(len(piece.ids) for piece in pieces if piece.sequence is None)
        due = list[PendingSample]()
        for piece, scores, row in zip(pieces, logits, after, strict=True):
            if piece.sequence is None:
                due += self._advance(piece, scores, row, outputs)
            else:
                piece.sequence.state_slice = row
                due.append(PendingSample(piece.request_state, piece.sequence, scores))
        self._sample(due, outputs)

    def _advance(
        self, piece: ScheduledTokens, scores: Tensor, row: StateSlice, outputs: list[TokenOutput]
    ) -> list[PendingSample]:
        """A prompt has been read a little further. Returns what is to be drawn where that was the end of it."""
        task = piece.request_state
        task.state_slice, task.computed_tokens = row, task.computed_tokens + len(piece.ids)
        complete = task.computed_tokens == len(task.request.ids)
        if task.snapshot_positions and task.snapshot_positions[0] == task.computed_tokens:
            task.snapshot_positions.popleft()
            self._store_snapshot(task, scores if complete else None)
        return self._start_sequences(task, scores, outputs) if complete else []

    def _store_snapshot(self, task: RequestState, scores: Tensor | None) -> None:
        """Give the cache the state at this place of the prompt."""
        assert self.cache is not None and task.request.cache_namespace is not None
        state = task.state_slice.alone()
        task.state_slice = StateSlice(state)
        known = task.request.ids[: task.computed_tokens]
        self.cache.put(task.request.cache_namespace, known, state, None if scores is None else scores.clone())

    def _start_sequences(self, task: RequestState, scores: Tensor, outputs: list[TokenOutput]) -> list[PendingSample]:
        """All has been read: begin the continuations, whose first tokens are due then."""
        request = task.request
        if request.n == 0:
            output = TokenOutput(
                task.request_id, 0, task.state_slice, logits=scores.clone(), cached_tokens=task.cached_tokens
            )
            outputs.append(self._finish(output, None, "read"))
            self.abort(task.request_id)
            return []
        for choice in range(request.n):
            params = request.params
            if params.seed is not None and choice:
                params = params.with_overrides({"seed": (params.seed + choice) % (MAX_SEED + 1)})
            constraint = request.constraint.fork() if request.constraint is not None else None
            task.sequences.append(
                Sequence(choice, task.state_slice, Sampler(params), params.max_tokens, constraint, -1)
            )
        return [PendingSample(task, strand, scores) for strand in task.sequences]

    def _sample(self, due: list[PendingSample], outputs: list[TokenOutput]) -> None:
        """The next token of each of these continuations."""
        for (task, strand, scores), token in zip(due, sample_next_tokens(due), strict=True):
            about = (task.request_id, strand.choice, strand.state_slice)
            if isinstance(token, FledgeError):
                outputs.append(
                    self._finish(TokenOutput(*about, cached_tokens=task.cached_tokens, error=token), strand, "failed")
                )
                self.abort_choice(task.request_id, strand.choice)
                continue
            strand.last_token, strand.remaining_tokens = token, strand.remaining_tokens - 1
            self.stats.sampled_tokens += 1
            top = task.request.logprobs
            likely = None if top is None else compute_logprob(scores, token, top)
            output = TokenOutput(*about, token, None, strand.sampler.seed, task.cached_tokens, likely)
            reason = self._finish_reason(strand)
            outputs.append(output if reason is None else self._finish(output, strand, reason))
            if reason is not None:
                self.abort_choice(task.request_id, strand.choice)

    def _finish_reason(self, strand: Sequence) -> EngineFinishReason | None:
        """Why the token just drawn is the last one, if it is."""
        if strand.last_token == self.eos_id:
            return "eos"
        if strand.constraint is not None and strand.constraint.is_complete:
            return "complete"
        return None if strand.remaining_tokens else "length"

    def _finish(self, output: TokenOutput, strand: Sequence | None, reason: EngineFinishReason) -> TokenOutput:
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        return output._replace(finish_reason=reason, seed=0 if strand is None else strand.sampler.seed)


def compute_logprob(scores: Tensor, token: int, top: int) -> TokenLogprob:
    """scores (V,): log probability of the token, and of the `top` most probable ones."""
    logprobs = torch.log_softmax(scores.float(), dim=-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
