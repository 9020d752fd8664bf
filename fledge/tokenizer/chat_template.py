"""Chat templates: how messages become the one text a model was trained to continue.

A blank line separates turns, so none may occur inside a turn, and the model's own blank line ends its answer. The text
to be continued ends in a label and its colon, never in a space: World tokens carry their space in front, and a space
already written makes the model start with a token it seldom saw there.

Here: the templates as data, and the functions that apply them. Not here: token ids, sampling, matching of stop texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fledge.core.errors import UsageError

Message = tuple[str, str] | Mapping[str, object]
"""(role, content), or a mapping with at least the keys "role" and "content"."""

SEPARATOR = "\n\n"
"""What ends a turn, in every template."""

ASSISTANT = "assistant"
"""The role the model speaks in, in every template."""


@dataclass(frozen=True)
class ChatTemplate:
    """One way to write a conversation.

    labels:   the word before the colon for each role; the roles of a template are its keys.
    optional: roles whose turn is left out where its content is empty.
    """

    name: str
    labels: Mapping[str, str]
    optional: frozenset[str] = frozenset()

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer in the format the models were trained on: the blank line."""
        return (SEPARATOR,)

    @property
    def label_stops(self) -> tuple[str, ...]:
        """Texts that end an answer which may itself hold blank lines: a blank line and the label of a next turn."""
        return tuple(dict.fromkeys(f"{SEPARATOR}{label}:" for label in self.labels.values()))

    def open_turn(self, user_text: str) -> str:
        """What to append for the user's next message, up to where the model answers. It follows `close_turn`."""
        return self.turn("user", user_text) + self.close_turn() + self.turn(ASSISTANT, "")

    def close_turn(self) -> str:
        """What to append after an answer (without the stop text that ended it)."""
        return SEPARATOR

    def turn(self, role: str, content: str) -> str:
        """One turn without its end: `User: How are you?`, or the bare `User:` where the content is empty."""
        if role not in self.labels:
            raise UsageError(f"role {role!r} is unknown to template {self.name!r}; roles: {', '.join(self.labels)}")
        content = normalize(content)
        return f"{self.labels[role]}: {content}" if content else f"{self.labels[role]}:"


TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType(
    {
        template.name: template
        for template in (
            ChatTemplate("world", {"system": "System", "user": "User", ASSISTANT: "Assistant"}),
            ChatTemplate(
                "instruct", {"user": "Instruction", "input": "Input", ASSISTANT: "Response"}, frozenset({"input"})
            ),
            ChatTemplate("qa", {"user": "Question", ASSISTANT: "Answer"}),
        )
    }
)
"""The templates by name. `world` is the chat form of the World models."""


def template_named(name: str) -> ChatTemplate:
    """The template of that name. Raises UsageError."""
    if name not in TEMPLATES:
        raise UsageError(f"chat template {name!r} is unknown; templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(messages: Iterable[Message], template: ChatTemplate | str = "world", *, answer: bool = True) -> str:
    """The conversation as one text.

    With `answer` the text ends where the model is to speak: after `Assistant:`, or, where the last message is the
    assistant's, after what it holds, so that the model goes on from there. Without `answer` it is a finished
    conversation, as for training: nothing is added after the last turn.

    Raises UsageError for no messages, an unknown template or role, and content that is not text.
    """
    if isinstance(template, str):
        template = template_named(template)
    return "".join(pieces(messages, template, answer=answer))


def pieces(messages: Iterable[Message], template: ChatTemplate | str = "world", *, answer: bool = True) -> list[str]:
    """The text of `render`, as `Chat` reads it: cut where each answer begins, where it ends, and after its blank line.

    Encoded one by one they give the tokens of a conversation that was written turn by turn, so what was read of one is
    a beginning of the next.
    """
    if isinstance(template, str):
        template = template_named(template)
    turns = [_role_and_content(message, at) for at, message in enumerate(messages)]
    if not turns:
        raise UsageError("a conversation needs at least one message")
    if answer and turns[-1][0] != ASSISTANT:
        turns.append((ASSISTANT, ""))
    turns = [(role, content) for role, content in turns if role not in template.optional or normalize(content)]
    found, text = list[str](), ""
    for number, (role, content) in enumerate(turns):
        last = number == len(turns) - 1
        turn = template.turn(role, content)
        if role == ASSISTANT:
            label = template.turn(ASSISTANT, "")
            found += [text + label, turn.removeprefix(label), "" if last else SEPARATOR]
            text = ""
        else:
            text += turn + ("" if last else SEPARATOR)
            if not last and turns[number + 1][0] != ASSISTANT:
                found.append(text)
                text = ""
    return [piece for piece in [*found, text] if piece]


def normalize(content: str) -> str:
    """Content fit for one turn: CRLF and CR become LF, runs of LF become one, no white space at either end."""
    return re.sub(r"[\r\n]+", "\n", content).strip()


def _role_and_content(message: Message, at: int) -> tuple[str, str]:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
    else:
        role, content = message
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(
            f"message {at} needs a role and a content that are text, "
            f"not {type(role).__name__} and {type(content).__name__}"
        )
    return role, content
