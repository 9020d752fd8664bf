"""A conversation as a tree of turns, each with the state after it, so that undo, retry and branch read nothing again.

What the model reads is defined token by token. The system text is one piece, each question another (the template's
`open_turn`, up to where the answer begins), then come the ids of the answer, then the template's `close_turn`. Each
piece is encoded on its own; `Chat.ids` is all of them, and the state is that of reading exactly these ids.
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
"""The settings of the official chat demo for World models; they keep a small model on its subject."""


@dataclass(frozen=True, eq=False)
class ChatTurn:
    """A question and its answer. Turns are never changed; they point to the turn before, so branches share them.

    Each keeps two states (see `begin` and `state`): a conversation costs memory by its turns, not by their length.
    """

    parent: ChatTurn | None = field(repr=False)
    user: str
    answer: str  # as the model wrote it, commonly with a space in front
    question_ids: tuple[int, ...] = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)  # all that was read in this turn: question, answer, separator
    begin: ModelOutput = field(repr=False)  # where the answer begins
    state: State = field(repr=False)  # after `ids`
    completion: Completion = field(repr=False)


class Chat:
    """One conversation. It changes as it goes on, so one thread at a time uses it; its states are values like any.

    An answer that is not taken to its end (an interrupt, a `break`) is closed when the chat goes on, and stays as far
    as it was shown. A question whose reading was interrupted was never asked.
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
        """Begin after `start`. Raises UsageError for an unknown template, or a system text where it has none."""
        self.template = template_named(template)
        self.system = system
        self.params = self._with_stops(params or CHAT_PARAMS)
        self._model, self._tokenizer = model, tokenizer
        opening = self.template.turn("system", system) + self.template.close_turn() if system else ""
        self._opening_ids = tuple(tokenizer.encode(opening))
        self._opening_state = advance_state(model, self._opening_ids, start)
        self._heads: dict[str, ChatTurn | None] = {"main": None}
        self._current = "main"
        self._running: Stream | None = None

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """The finished turns of the current branch, oldest first."""
        found, turn = [], self._heads[self._current]
        while turn is not None:
            found.append(turn)
            turn = turn.parent
        return tuple(reversed(found))

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The conversation as (role, text), as `fledge.tokenizer.render` takes it."""
        opening = [("system", self.system)] if self.system else []
        return opening + [
            message for turn in self.turns for message in (("user", turn.user), ("assistant", turn.answer.strip()))
        ]

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token the state of the current branch has read since the chat began."""
        return self._opening_ids + tuple(token for turn in self.turns for token in turn.ids)

    @property
    def transcript(self) -> str:
        """The text of `ids`: exactly what the model has before it."""
        return self._tokenizer.decode(self.ids)

    @property
    def state(self) -> State:
        """The state after the last finished turn."""
        head = self._heads[self._current]
        return self._opening_state if head is None else head.state

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of all branches, oldest first; the first is "main"."""
        return tuple(self._heads)

    @property
    def current(self) -> str:
        """The name of the current branch."""
        return self._current

    def say(self, text: str, **overrides: Any) -> Stream:
        """Ask; the answer comes as a stream. overrides: fields of SamplingParams, for this answer only.

        Where `params` has a seed, each turn draws with its own, made of that seed and the number of turns before it
        (`turn_seed`). A seed among the overrides is taken as it is.
        """
        if not text.strip():
            raise UsageError("there is no text to say")
        self._settle()
        question = tuple(self._tokenizer.encode(self.template.open_turn(text)))
        if self.params.seed is not None:
            overrides = {"seed": turn_seed(self.params.seed, len(self.turns)), **overrides}
        return self._answer(text, question, self._heads[self._current], self.state, overrides)

    def retry(self, **overrides: Any) -> Stream:
        """Another answer to the last question, in place of the present one (name a branch first to keep that).

        The question is not read again. Without a seed of its own the new answer uses the one after the present
        answer's, to be different and still repeatable.
        """
        self._settle()
        last = self._head("retry")
        overrides = {"seed": (last.completion.seed + 1) % MAX_SEED, **overrides}
        return self._answer(last.user, last.question_ids, last.parent, last.begin, overrides)

    def undo(self) -> ChatTurn:
        """Take back the last turn of this branch, and return it."""
        self._settle()
        last = self._head("undo")
        self._heads[self._current] = last.parent
        return last

    def branch(self, name: str) -> None:
        """Begin a new branch here and go on in it. The present branch keeps its turns."""
        self._settle()
        if name in self._heads:
            raise UsageError(f"there is a branch {name!r} already; switch to it, or choose another name")
        self._heads[name] = self._heads[self._current]
        self._current = name

    def switch(self, name: str) -> None:
        """Go on in another branch."""
        self._settle()
        if name not in self._heads:
            raise UsageError(f"there is no branch {name!r}; branches: {', '.join(self._heads)}")
        self._current = name

    def _head(self, purpose: str) -> ChatTurn:
        head = self._heads[self._current]
        if head is None:
            raise UsageError(f"there is nothing to {purpose}: no turn has been finished in branch {self._current!r}")
        return head

    def _settle(self) -> None:
        """End an answer that is still running."""
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
            on_end=lambda completion: self._keep(stream.begin, completion, user, question, parent),
            show_held=False,
        )
        return stream

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        """The settings, with what ends an answer in this template among the stop texts."""
        return replace(params, stop=tuple(dict.fromkeys((*self.template.stops, *params.stop))))

    def _keep(
        self,
        begin: ModelOutput | None,
        completion: Completion,
        user: str,
        question: tuple[int, ...],
        parent: ChatTurn | None,
    ) -> None:
        """Make a turn of a finished answer and put it at the end of the current branch."""
        if begin is None:
            return
        closing = self._tokenizer.encode(self.template.close_turn())
        ids = (*question, *completion.ids, *closing)
        state = advance_state(self._model, closing, completion.state)
        self._heads[self._current] = ChatTurn(parent, user, completion.text, question, ids, begin, state, completion)


def turn_seed(seed: int, number: int) -> int:
    """The seed of turn `number` (from 0) in a chat with `seed`, so that no two turns share their random numbers.

    The first four bytes, little-endian, of the SHA-256 of "seed number" in decimal.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")
