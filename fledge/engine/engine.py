"""The engine: continuous batching of many requests on one model.

    engine = Engine(model, eos_id=0)
    request_id = engine.add(Request(ids, params))
    while engine.busy:
        for output in engine.step(): ...

The tokens of a request are those of the plain loop in `generation.py` with the same seed, whatever else runs: each
request has its own random numbers, its state is a value, and the native library computes the same bits for a sequence
in any batch. The engine works on token ids only and is used by one thread at a time; `AsyncEngine` adds text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.generation import ModelOutput, check_token_ids, get_config, get_device, make_initial_state
from fledge.engine.model_runner import run_model, run_with_all_logits
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.request import EngineFinishReason, PromptLogprobs, QueueFull, Request, TokenLogprob, TokenOutput
from fledge.engine.sampling import MAX_SEED, Sampler
from fledge.engine.scheduler import LatencyModel, ScheduledTokens, Scheduler
from fledge.engine.sequence import PendingSample, RequestState, Sequence, sample_next_tokens
from fledge.models.config import ModelConfig
from fledge.models.state import State
from fledge.models.state_slice import StateSlice
from fledge.tokenizer import NO_EOS

PROMPT_LOGPROBS_CHUNK = 128
"""Prompt tokens per model call when log probabilities are requested. The logits of all of them exist at the same time:
33 MB for 128 tokens and a vocabulary of 65536."""


@dataclass
class EngineStats:
    """Counters since the engine was created."""

    model_calls: int = 0
    prefill_tokens: int = 0  # prompt tokens computed
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    sampled_tokens: int = 0
    batch_size: int = 0  # sequences in the last call
    model_seconds: float = 0.0  # time in the model
    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # completions by finish reason


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
        """max_requests: unfinished requests that are accepted; more are rejected. clock: measures deadlines."""
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
        """The sizes of the model."""
        return get_config(self.model)

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._request_states)

    @property
    def num_waiting(self) -> int:
        """Requests that have not started."""
        return sum(not each.is_started for each in list(self._request_states.values()))

    @property
    def num_running(self) -> int:
        """Sequences that are being prefilled or decoded."""
        return sum(each.num_sequences for each in list(self._request_states.values()) if each.is_started)

    def add(self, request: Request, *, bypass_limit: bool = False) -> int:
        """Add a request and return its id. bypass_limit: accept it even if the queue is full.

        Raises QueueFull if the queue is full, and the errors of `check_request`.
        """
        if len(self._request_states) >= self.max_requests and not bypass_limit:
            raise QueueFull(f"{self.max_requests} requests are queued or running; try again later")
        self.check_request(request)
        request_id, self._next_id = self._next_id, self._next_id + 1
        rank = self.scheduler.compute_rank(self._clock(), request.priority)
        start, last_logits = request.start or self._initial_state, None
        if isinstance(start, ModelOutput):
            last_logits, start = start
        state_slice = StateSlice(start.to(self._device))
        self._request_states[request_id] = RequestState(request_id, request, rank, state_slice, last_logits)
        self.stats.requests += 1
        return request_id

    def abort(self, request_id: int) -> None:
        """Drop a request; it produces no more outputs. Does nothing if the request has ended."""
        self._request_states.pop(request_id, None)

    def abort_choice(self, request_id: int, choice: int) -> None:
        """Drop one completion of a request, and the request itself with its last completion."""
        request_state = self._request_states.get(request_id)
        if request_state is not None and request_state.sequences:
            request_state.sequences = [each for each in request_state.sequences if each.choice != choice]
            if not request_state.sequences:
                del self._request_states[request_id]

    def get_prompt_progress(self, request_id: int) -> tuple[StateSlice, int] | None:
        """The state after the part of a prompt that has been read, and its number of tokens; None after the prompt."""
        request_state = self._request_states.get(request_id)
        if request_state is None or not request_state.is_prefilling:
            return None
        return request_state.state_slice, request_state.computed_tokens

    def step(self) -> list[TokenOutput]:
        """Run one batch, and one chunk of prompt log probabilities if requested. Returns the new outputs."""
        outputs = list[TokenOutput]()
        self._expire(outputs)
        self._score_prompt(outputs)
        ready = [each for each in self._request_states.values() if not each.is_scoring]
        selected = self.scheduler.select(ready)
        pending = [sample for each in selected if not each.is_started for sample in self._start(each, outputs)]
        self._sample(pending, outputs)
        for request_state in self._request_states.values():
            if request_state.is_started and request_state not in selected:
                request_state.detach_state()
        running = [each for each in selected if each.request_id in self._request_states]
        scheduled = [tokens for tokens in self.scheduler.schedule(running, self._latency) if tokens.ids]
        if scheduled:
            self._run_batch(scheduled, outputs)
        return outputs

    def check_request(self, request: Request) -> None:
        """Raise UsageError, TokenizerError or StateError for an invalid request. May be called from any thread."""
        has_logits = isinstance(request.start, ModelOutput)
        if not request.ids and not has_logits:
            raise UsageError("the prompt is empty; give at least one token")
        assert not (request.ids and has_logits) or request.prompt_logprobs is not None, "a ModelOutput has no prompt"
        check_token_ids(request.ids, self.config.vocab_size)
        if not 0 <= request.n <= self.scheduler.slots:
            raise UsageError(f"n is {request.n}; this engine generates up to {self.scheduler.slots} completions")
        if request.start is not None:
            state = request.start.state if isinstance(request.start, ModelOutput) else request.start
            state.check(self.config, 1)

    def _expire(self, outputs: list[TokenOutput]) -> None:
        """End the requests whose deadline has passed."""
        now = self._clock()
        for request_state in list(self._request_states.values()):
            deadline = request_state.request.deadline
            if deadline is None or now < deadline:
                continue
            if request_state.is_scoring and not request_state.computed_tokens:
                continue  # its first chunk is always read
            for sequence in request_state.sequences:
                output = TokenOutput(request_state.request_id, sequence.choice, sequence.state_slice)
                outputs.append(self._finish(output, sequence, "deadline"))
            if not request_state.sequences:
                self._finish_incomplete(request_state, "deadline", None, outputs)
            self.abort(request_state.request_id)

    def _finish_incomplete(
        self,
        request_state: RequestState,
        reason: EngineFinishReason,
        error: FledgeError | None,
        outputs: list[TokenOutput],
    ) -> None:
        """End all completions of a request whose prompt has not been read completely."""
        for choice in range(max(request_state.request.n, 1)):
            output = TokenOutput(
                request_state.request_id, choice, request_state.state_slice, error=error, prompt_incomplete=True
            )
            outputs.append(self._finish(output, None, reason))

    def _score_prompt(self, outputs: list[TokenOutput]) -> None:
        """Read the next chunk of a prompt whose log probabilities are requested. An error ends that request only."""
        request_state = self.scheduler.select_scoring(list(self._request_states.values()))
        if request_state is None:
            return
        try:
            scored = self._read_scored_chunk(request_state)
        except Exception as error:
            failure = error if isinstance(error, FledgeError) else FledgeError(f"the model failed: {error}")
            self._finish_incomplete(request_state, "failed", failure, outputs)
            self.abort(request_state.request_id)
            return
        outputs.append(
            TokenOutput(request_state.request_id, 0, request_state.state_slice, prompt_logprobs=scored),
        )

    def _read_scored_chunk(self, request_state: RequestState) -> PromptLogprobs:
        """The log probabilities of the tokens after each token of the next chunk, and of the first prompt token."""
        request, begin = request_state.request, request_state.computed_tokens
        assert request.prompt_logprobs is not None
        end = min(begin + PROMPT_LOGPROBS_CHUNK, len(request.ids))
        started = time.perf_counter()
        logits, after = run_with_all_logits(self.model, request.ids[begin:end], request_state.state_slice)
        self.stats.model_calls += 1
        self.stats.prefill_tokens += end - begin
        self.stats.model_seconds += time.perf_counter() - started
        targets = request.ids[begin + 1 : end + 1]
        logprobs = list[TokenLogprob | None](compute_logprobs(logits, targets, request.prompt_logprobs))
        if begin == 0:
            targets, first = request.ids[: end + 1], request_state.last_logits
            logprobs.insert(
                0, None if first is None else compute_logprobs(first[None], targets[:1], request.prompt_logprobs)[0]
            )
        request_state.state_slice, request_state.computed_tokens = after, end
        request_state.last_logits = logits[-1].clone()
        return PromptLogprobs(targets, tuple(logprobs), end)

    def _start(self, request_state: RequestState, outputs: list[TokenOutput]) -> list[PendingSample]:
        """Look up the prompt in the prefix cache. Returns the samples to take if nothing is left to read."""
        request_state.is_started = True
        request = request_state.request
        if request_state.last_logits is not None:
            return self._start_sequences(request_state, request_state.last_logits.float().cpu(), outputs)
        if self.cache is not None and request.cache_namespace is not None:
            match = self.cache.match_prefix(request.cache_namespace, request.ids)
            if match.state is not None:
                request_state.state_slice = StateSlice(match.state.to(self._device))  # from the disk it is on the CPU
                request_state.computed_tokens = request_state.cached_tokens = match.length
                self.stats.cached_tokens += match.length
            if match.logits is not None and match.length == len(request.ids):
                return self._start_sequences(request_state, match.logits, outputs)
            positions = self.cache.plan_snapshots(
                request.cache_namespace, request.ids, request_state.computed_tokens, request.message_ends
            )
            request_state.snapshot_positions.extend(positions)
            self.cache.insert_prompt(request.cache_namespace, request.ids)
        return []

    def _run_batch(self, scheduled: list[ScheduledTokens], outputs: list[TokenOutput]) -> None:
        """Call the model for the scheduled tokens, then sample from the sequences that have read all their tokens."""
        started = time.perf_counter()
        states = [(each.sequence or each.request_state).state_slice for each in scheduled]
        logits, after = run_model(self.model, [each.ids for each in scheduled], states)
        tokens, seconds = sum(len(each.ids) for each in scheduled), time.perf_counter() - started
        self._latency.update(tokens, seconds)
        self.stats.model_calls += 1
        self.stats.batch_size = len(scheduled)
        self.stats.model_seconds += seconds
        self.stats.prefill_tokens += sum(len(each.ids) for each in scheduled if each.sequence is None)
        pending = list[PendingSample]()
        for each, scores, state_slice in zip(scheduled, logits, after, strict=True):
            if each.sequence is None:
                pending += self._advance_prompt(each, scores, state_slice, outputs)
            else:
                each.sequence.state_slice = state_slice
                pending.append(PendingSample(each.request_state, each.sequence, scores))
        self._sample(pending, outputs)

    def _advance_prompt(
        self, scheduled: ScheduledTokens, logits: Tensor, state_slice: StateSlice, outputs: list[TokenOutput]
    ) -> list[PendingSample]:
        """Record that a part of a prompt was read. Returns the samples to take if that was its end."""
        request_state = scheduled.request_state
        request_state.state_slice = state_slice
        request_state.computed_tokens += len(scheduled.ids)
        is_complete = request_state.computed_tokens == len(request_state.request.ids)
        positions = request_state.snapshot_positions
        if positions and positions[0] == request_state.computed_tokens:
            positions.popleft()
            self._store_snapshot(request_state, logits if is_complete else None)
        return self._start_sequences(request_state, logits, outputs) if is_complete else []

    def _store_snapshot(self, request_state: RequestState, logits: Tensor | None) -> None:
        """Store the state after the computed part of the prompt in the prefix cache."""
        request = request_state.request
        assert self.cache is not None and request.cache_namespace is not None
        state = request_state.state_slice.extract()
        request_state.state_slice = StateSlice(state)
        prefix = request.ids[: request_state.computed_tokens]
        self.cache.put(request.cache_namespace, prefix, state, None if logits is None else logits.clone())

    def _start_sequences(
        self, request_state: RequestState, logits: Tensor, outputs: list[TokenOutput]
    ) -> list[PendingSample]:
        """Create the completions of a prompt that has been read. Returns their first samples."""
        request = request_state.request
        if request.n == 0:
            output = TokenOutput(
                request_state.request_id,
                0,
                request_state.state_slice,
                logits=logits.clone(),
                cached_tokens=request_state.cached_tokens,
            )
            outputs.append(self._finish(output, None, "read"))
            self.abort(request_state.request_id)
            return []
        for choice in range(request.n):
            params = request.params
            if params.seed is not None and choice:
                params = params.with_overrides({"seed": (params.seed + choice) % (MAX_SEED + 1)})
            constraint = request.constraint.fork() if request.constraint is not None else None
            sampler = Sampler(params)
            request_state.sequences.append(
                Sequence(choice, request_state.state_slice, sampler, params.max_tokens, constraint, -1)
            )
        return [PendingSample(request_state, sequence, logits) for sequence in request_state.sequences]

    def _sample(self, pending: list[PendingSample], outputs: list[TokenOutput]) -> None:
        """Sample the next token of each sequence."""
        for (request_state, sequence, logits), token in zip(pending, sample_next_tokens(pending), strict=True):
            request, request_id, choice = request_state.request, request_state.request_id, sequence.choice
            if isinstance(token, FledgeError):
                failed = TokenOutput(
                    request_id, choice, sequence.state_slice, cached_tokens=request_state.cached_tokens, error=token
                )
                outputs.append(self._finish(failed, sequence, "failed"))
                self.abort_choice(request_id, choice)
                continue
            is_first = sequence.last_token < 0
            sequence.last_token, sequence.remaining_tokens = token, sequence.remaining_tokens - 1
            self.stats.sampled_tokens += 1
            output = TokenOutput(
                request_id,
                choice,
                sequence.state_slice,
                token=token,
                seed=sequence.sampler.seed,
                cached_tokens=request_state.cached_tokens,
                logprob=None
                if request.logprobs is None
                else compute_logprobs(logits[None], [token], request.logprobs)[0],
                logits=logits.clone() if request.should_return_logits and is_first else None,
            )
            reason = self._finish_reason(sequence)
            outputs.append(output if reason is None else self._finish(output, sequence, reason))
            if reason is not None:
                self.abort_choice(request_state.request_id, sequence.choice)

    def _finish_reason(self, sequence: Sequence) -> EngineFinishReason | None:
        """Why the token just sampled is the last one, or None if it is not."""
        if sequence.last_token == self.eos_id:
            return "eos"
        if sequence.constraint is not None and sequence.constraint.is_complete:
            return "complete"
        return None if sequence.remaining_tokens else "length"

    def _finish(self, output: TokenOutput, sequence: Sequence | None, reason: EngineFinishReason) -> TokenOutput:
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        return output._replace(finish_reason=reason, seed=0 if sequence is None else sequence.sampler.seed)


def compute_logprobs(logits: Tensor, ids: Ids[int], top: int) -> list[TokenLogprob]:
    """The log probability of each id, and of the `top` most probable tokens in its place.

    logits: (T, V), of the token at each position; rows after the last id are ignored.
    """
    logprobs = torch.log_softmax(logits[: len(ids)].float(), dim=-1)  # (T, V)
    chosen = logprobs.gather(1, torch.tensor(list(ids), dtype=torch.long, device=logits.device)[:, None])[:, 0]
    values, tokens = logprobs.topk(min(top, logprobs.shape[-1]))  # (T, top)
    alternatives = zip(tokens.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(logprob, tuple(zip(*row, strict=True)))
        for logprob, row in zip(chosen.tolist(), alternatives, strict=True)
    ]


def compute_prompt_logprobs(
    model: nn.Module, ids: Ids[int], start: State | ModelOutput | None = None, top: int = 0
) -> list[TokenLogprob | None]:
    """The log probability of each of `ids` (at least one), and of the `top` most probable tokens in its place.

    start: what the ids follow; None: the model's initial state. The first id has a log probability only if `start` is
    a ModelOutput. This is `Request.prompt_logprobs` for callers with a single text.
    """
    engine, logprobs = Engine(model), list[TokenLogprob | None]()
    engine.add(Request(tuple(ids), start=start, n=0, prompt_logprobs=top))
    while engine.busy:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.prompt_logprobs is not None:
                logprobs += output.prompt_logprobs.logprobs
    return logprobs
