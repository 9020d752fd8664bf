"""Chats: a conversation as a tree of turns, each with the state after it.

Undo, retry and branch never read a token again. The ids that a chat reads are exactly defined: those of the system
text, then for each turn those of the question (the template's `open_turn`, up to the start of the answer), those of the
answer, and those of the template's `close_turn`. Each part is encoded separately. `Chat.ids` has all of them, and
`Chat.state` is the state after exactly these ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fledge.core.errors import UsageError
from fledge.engine.generation import ModelOutput, advance_state
from fledge.engine.llm.stream import Completion, Stream
from fledge.engine.sampling import MAX_SEED, SamplingParams
from fledge.models.state import State
from fledge.tokenizer import Tokenizer, template_named

CHAT_PARAMS = SamplingParams(top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5, max_tokens=1024)
"""The settings of the official chat demo for World models. They keep a small model on topic."""


@dataclass(frozen=True, eq=False)
class ChatTurn:
    """A question and its answer. Turns never change. Each refers to the previous one, so branches share turns.

    Each turn keeps two states (`prompt_output` and `state`): memory grows with the number of turns, not their length.
    """

    parent: ChatTurn | None = field(repr=False)
    user: str
    answer: str  # as generated, usually with a leading space
    question_ids: tuple[int, ...] = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)  # all ids of the turn: question, answer, separator
    prompt_output: ModelOutput = field(repr=False)  # logits and state before the answer
    state: State = field(repr=False)  # after `ids`
    completion: Completion = field(repr=False)


class Chat:
    """One conversation. It changes with every turn and must be used by one thread at a time; its states are values.

    An answer that was not finished (after an interrupt or a `break`) is closed when the chat continues, and keeps the
    text emitted so far. If reading a question was interrupted, the question is not part of the chat.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        start: State,
        *,
        system: str | None = None,
        template: str = "world",
        params: SamplingParams | None = None,
    ) -> None:
        """A conversation after the state `start`.

        Raises UsageError for an unknown template, or for a system text if the template has none.
        """
        self.template = template_named(template)
        self.system = system
        self.params = self._with_stops(params or CHAT_PARAMS)
        self._model, self._tokenizer = model, tokenizer
        opening = self.template.turn("system", system) + self.template.close_turn() if system else ""
        self._opening_ids = tuple(tokenizer.encode(opening))
        self._opening_state = advance_state(model, self._opening_ids, start)
        self._last_turns: dict[str, ChatTurn | None] = {"main": None}  # of each branch
        self._current = "main"
        self._running: Stream | None = None

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """The finished turns of the current branch, oldest first."""
        turns, turn = list[ChatTurn](), self._last_turns[self._current]
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return tuple(reversed(turns))

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The conversation as (role, text) pairs, the input of `fledge.tokenizer.render`."""
        opening = [("system", self.system)] if self.system else []
        return opening + [
            message for turn in self.turns for message in (("user", turn.user), ("assistant", turn.answer.strip()))
        ]

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids that the state of the current branch has read since the chat began."""
        return self._opening_ids + tuple(token for turn in self.turns for token in turn.ids)

    @property
    def transcript(self) -> str:
        """The text of `ids`: exactly what the model has read."""
        return self._tokenizer.decode(self.ids)

    @property
    def state(self) -> State:
        """The state after the last finished turn."""
        last = self._last_turns[self._current]
        return self._opening_state if last is None else last.state

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of all branches, oldest first. The first is "main"."""
        return tuple(self._last_turns)

    @property
    def current(self) -> str:
        """The name of the current branch."""
        return self._current

    def say(self, text: str, **overrides: Any) -> Stream:
        """Ask a question and return the answer as a stream. overrides: fields of SamplingParams, for this answer only.

        If `params` has a seed, each turn uses its own seed, computed from that seed and the number of previous turns
        (`turn_seed`). A seed among the overrides is used as it is. Raises UsageError for an empty question.
        """
        if not text.strip():
            raise UsageError("the message is empty; give some text")
        self._close_running()
        question = tuple(self._tokenizer.encode(self.template.open_turn(text)))
        if self.params.seed is not None:
            overrides = {"seed": turn_seed(self.params.seed, len(self.turns)), **overrides}
        return self._answer(text, question, self._last_turns[self._current], self.state, overrides)

    def retry(self, **overrides: Any) -> Stream:
        """Generate another answer to the last question, which replaces the present one. `branch` first to keep it.

        The question is not read again. Unless a seed is given, the seed is that of the present answer plus one, so the
        new answer differs and is still reproducible.
        """
        self._close_running()
        last = self._last_turn("retry")
        overrides = {"seed": (last.completion.seed + 1) % MAX_SEED, **overrides}
        return self._answer(last.user, last.question_ids, last.parent, last.prompt_output, overrides)

    def undo(self) -> ChatTurn:
        """Remove the last turn of this branch and return it."""
        self._close_running()
        last = self._last_turn("undo")
        self._last_turns[self._current] = last.parent
        return last

    def branch(self, name: str) -> None:
        """Create a branch at the current turn and switch to it. The present branch keeps its turns."""
        self._close_running()
        if name in self._last_turns:
            raise UsageError(f"branch {name!r} already exists; switch to it, or choose another name")
        self._last_turns[name] = self._last_turns[self._current]
        self._current = name

    def switch(self, name: str) -> None:
        """Switch to another branch."""
        self._close_running()
        if name not in self._last_turns:
            raise UsageError(f"there is no branch {name!r}; branches: {', '.join(self._last_turns)}")
        self._current = name

    def _last_turn(self, action: str) -> ChatTurn:
        last = self._last_turns[self._current]
        if last is None:
            raise UsageError(f"there is nothing to {action}: branch {self._current!r} has no finished turn")
        return last

    def _close_running(self) -> None:
        """End an answer that is still being generated."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _answer(
        self,
        user: str,
        question: tuple[int, ...],
        parent: ChatTurn | None,
        start: State | ModelOutput,
        overrides: dict[str, Any],
    ) -> Stream:
        self._running = stream = Stream(
            self._model,
            self._tokenizer,
            () if isinstance(start, ModelOutput) else question,
            start,
            self._with_stops(self.params.with_overrides(overrides)),
            on_end=lambda completion: self._append_turn(stream.prompt_output, completion, user, question, parent),
            show_held=False,
        )
        return stream

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        """The settings, with the template's stop strings added."""
        return replace(params, stop=tuple(dict.fromkeys((*self.template.stops, *params.stop))))

    def _append_turn(
        self,
        prompt_output: ModelOutput | None,
        completion: Completion,
        user: str,
        question: tuple[int, ...],
        parent: ChatTurn | None,
    ) -> None:
        """Make a turn of a finished answer, and append it to the current branch."""
        if prompt_output is None:
            return
        closing = self._tokenizer.encode(self.template.close_turn())
        ids = (*question, *completion.ids, *closing)
        state = advance_state(self._model, closing, completion.state)
        turn = ChatTurn(parent, user, completion.text, question, ids, prompt_output, state, completion)
        self._last_turns[self._current] = turn


def turn_seed(seed: int, number: int) -> int:
    """The seed of turn `number` (from 0) of a chat with `seed`, so that no two turns share random numbers.

    The first four bytes, little-endian, of the SHA-256 of "seed number" in decimal.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")
