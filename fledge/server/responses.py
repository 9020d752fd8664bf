"""What the desk's events look like to a client: bodies, and the pieces of a stream, in OpenAI's words."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fledge.engine.events import FinishEvent, TextEvent, TextToken
from fledge.engine.structured.tool_calls import parse_tool_calls
from fledge.tokenizer import Tokenizer

REASONS = {"stop": "stop", "eos": "stop", "complete": "stop", "length": "length", "deadline": "length"}
"""Why a text ended, in the protocol's words."""

WHOLE = ("eos", "complete")
"""Ends at which a grammar has nothing left open."""

CALL = "<tool_call>"

COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class ChatCompletionStream:
    """One choice of a chat as it comes: no white space at either end, and calls apart from the text."""

    def __init__(self, calls: bool = False, only: bool = False) -> None:
        """calls: whether the text may hold calls of functions; these are told once they are whole, and what is left of
        a call that was cut is not told at all. only: whether there is nothing beside them.
        """
        self.text, self.calls = "", list[dict[str, Any]]()
        self.tokens: list[TextToken] = []
        self.end: FinishEvent | None = None
        self._looks, self._only = calls, only
        self._cut = False  # whether it ended within a call
        self._open = ""  # the end of the text, where a call may be beginning
        self._held = ""  # white space that may turn out to be the end
        self._call = ""  # from where a call begins

    def take(self, piece: TextEvent) -> str:
        """The text to be shown now."""
        self.tokens += piece.tokens
        if not self._looks:
            return self._show(piece.text)
        if self._call:
            self._call += piece.text
            return ""
        text = self._open + piece.text
        place = text.find(CALL)
        if place >= 0:
            self._open, self._call = "", text[place:]
        else:
            place = len(text) - next(size for size in range(len(CALL) - 1, -1, -1) if text.endswith(CALL[:size]))
            self._open = text[place:]
        return self._show(text[:place])

    def finish(self, end: FinishEvent) -> str:
        """The last text; `calls` and `reason` are known then."""
        self.end = end
        rest, calls = parse_tool_calls(self._call or self._open)
        if end.reason not in WHOLE:
            # One "<" may be text as well as the beginning of a call, a longer piece of the mark hardly.
            self._cut = bool(rest) and (bool(self._call) or self._only or len(rest) > 1)
        self.calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        return "" if self._cut else self._show(rest)

    @property
    def reason(self) -> str:
        """Why it ended; after a whole call that is followed by a piece of one, why that is no more."""
        assert self.end is not None
        return "tool_calls" if self.calls and not self._cut else REASONS[self.end.reason]

    def _show(self, text: str) -> str:
        text = self._held + text
        if not self.text:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self.text += shown
        return shown


@dataclass
class ResponseHeader:
    """What every body and every piece of one answer begins with."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, stream: bool = False, **more: Any) -> dict[str, Any]:
        """The answer, or with `stream` a piece of it."""
        chat = self.kind == "chat.completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": self.kind + (".chunk" if stream and chat else ""),
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def usage(prompt: int, ends: Iterable[FinishEvent], cached: int) -> dict[str, Any]:
    """The tokens that were read and written."""
    drawn = sum(end.sampled_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = COMPACT.encode(body)
    if not text.isascii():
        text = text.translate(LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


LINE_ENDS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
"""Letters at which some clients end a line, though the protocol does not: httpx's `iter_lines`, say."""

DONE = b"data: [DONE]\n\n"
WAITING = b": still reading\n\n"
"""A comment, so that nobody between here and the client takes a long silence for the end."""


def chat_logprobs(tokens: Iterable[TextToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    found = []
    for token in tokens:
        assert token.logprob is not None
        top = [_likely(id, logprob, tokenizer) for id, logprob in token.logprob.top]
        found.append({**_likely(token.id, token.logprob.logprob, tokenizer), "top_logprobs": top})
    return {"content": found, "refusal": None}


def _likely(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def text_logprobs(tokens: Iterable[TextToken], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """`logprobs` of a completion choice; offset: the characters of text before."""
    names, values, tops, offsets = list[str](), list[float | None](), list[dict[str, float] | None](), list[int]()
    text = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        names.append(_name(token.id, tokenizer))
        offsets.append(offset)
        offset += len(text.decode(tokenizer.decode_bytes([token.id])))
        likelihood = token.logprob  # none for the first token of a prompt, which follows nothing
        values.append(None if likelihood is None else likelihood.logprob)
        if likelihood is None:
            tops.append(None)
        else:  # the token itself is always among them
            top = {_name(id, tokenizer): value for id, value in likelihood.top}
            tops.append(top | {names[-1]: likelihood.logprob})
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _name(token: int, tokenizer: Tokenizer) -> str:
    """A token's text; of a part of a character its bytes, as the protocol has them: they all look alike as text."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
