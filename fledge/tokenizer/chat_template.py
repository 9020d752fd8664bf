"""Chat templates: they render messages as the text format that a model was trained on.

A blank line separates turns, so no turn may contain one, and the model ends its answer with a blank line. The prompt
ends with a label and its colon, never with a space: World tokens include the space before a word, and after a written
space the model would have to start with a token that is rare in that position.
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
"""The text that ends a turn, in every template."""

ASSISTANT = "assistant"
"""The role of the model, in every template."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text format of a conversation.

    labels:   the word before the colon for each role; the roles of a template are its keys.
    optional: roles that have no turn if their content is empty.
    """

    name: str
    labels: Mapping[str, str]
    optional: frozenset[str] = frozenset()

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer in the format the models were trained on: the blank line."""
        return (SEPARATOR,)

    @property
    def label_stops(self) -> tuple[str, ...]:
        """Strings that end an answer that may contain blank lines: a blank line and the label of a next turn."""
        return tuple(dict.fromkeys(f"{SEPARATOR}{label}:" for label in self.labels.values()))

    def open_turn(self, user_text: str) -> str:
        """The text to append for the user's next message, up to the start of the answer. It follows `close_turn`."""
        return self.turn("user", user_text) + self.close_turn() + self.turn(ASSISTANT, "")

    def close_turn(self) -> str:
        """The text to append after an answer (without the stop string that ended it)."""
        return SEPARATOR

    def turn(self, role: str, content: str) -> str:
        """One turn without its end: `User: How are you?`, or only `User:` if the content is empty."""
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

    With `answer`, the text ends where the model continues: after `Assistant:`, or, if the last message is the
    assistant's, after its content. Without `answer`, it is a finished conversation, as for training: nothing is added
    after the last turn.

    Raises UsageError for no messages, an unknown template or role, and content that is not text.
    """
    if isinstance(template, str):
        template = template_named(template)
    return "".join(render_segments(messages, template, answer=answer))


def render_segments(
    messages: Iterable[Message], template: ChatTemplate | str = "world", *, answer: bool = True
) -> list[str]:
    """The text of `render`, split where each answer begins, where it ends, and after its blank line.

    `Chat` reads a conversation in these segments. Encoded one by one, they give the tokens of a conversation that was
    generated turn by turn, so the tokens of one request are a prefix of the next.
    """
    if isinstance(template, str):
        template = template_named(template)
    turns = [_role_and_content(message, index) for index, message in enumerate(messages)]
    if not turns:
        raise UsageError("a conversation needs at least one message")
    if answer and turns[-1][0] != ASSISTANT:
        turns.append((ASSISTANT, ""))
    turns = [(role, content) for role, content in turns if role not in template.optional or normalize(content)]
    segments, text = list[str](), ""
    for index, (role, content) in enumerate(turns):
        is_last = index == len(turns) - 1
        turn = template.turn(role, content)
        if role == ASSISTANT:
            label = template.turn(ASSISTANT, "")
            segments += [text + label, turn.removeprefix(label), "" if is_last else SEPARATOR]
            text = ""
        else:
            text += turn + ("" if is_last else SEPARATOR)
            if not is_last and turns[index + 1][0] != ASSISTANT:
                segments.append(text)
                text = ""
    return [segment for segment in [*segments, text] if segment]


def normalize(content: str) -> str:
    """Content for one turn: CRLF and CR become LF, several LF become one, and both ends lose their whitespace."""
    return re.sub(r"[\r\n]+", "\n", content).strip()


def _role_and_content(message: Message, index: int) -> tuple[str, str]:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
    else:
        role, content = message
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(
            f"message {index} needs a role and a content that are text, "
            f"not {type(role).__name__} and {type(content).__name__}"
        )
    return role, content
