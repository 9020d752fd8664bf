"""The loop of `fledge chat`: reads lines, carries out slash commands, shows answers as they come.

Here: what is typed and what is shown. Not here: turns, states, branches (fledge.engine.Chat keeps those).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from fledge.cli.terminal import note, remark, remark_end, write, write_answer
from fledge.core.errors import FledgeError, UsageError
from fledge.engine import Chat, Stream

HELP = """\
/undo          take back the last question and its answer
/retry         answer the last question again, differently
/branch NAME   go on in a new branch that begins here; without NAME, list the branches
/switch NAME   go on in another branch
/history       show this branch
/help          show this
/quit          leave; so does Ctrl-D
A line that ends in a backslash goes on in the next one. To say something that begins with a slash, type two.\
"""


class ChatSession:
    """One run of the command."""

    def __init__(self, chat: Chat, *, interactive: bool) -> None:
        """`interactive`: a person types; errors and Ctrl-C then end what is going on, not the conversation."""
        self._chat = chat
        self._interactive = interactive
        self._answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "undo": self._undo,
            "retry": self._retry,
            "branch": self._branch,
            "switch": self._switch,
            "history": self._history,
            "help": self._help,
        }

    def run(self) -> None:
        """Until /quit or the end of the input. On a terminal no Ctrl-C ends it, whenever it is pressed."""
        while True:
            try:
                return self._converse()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                write("\n")
                note("Ctrl-D or /quit leaves")

    def _converse(self) -> None:
        for line in self._lines():
            if line.strip() == "/quit":
                return
            if line.strip():
                self._take(line)

    def _lines(self) -> Iterator[str]:
        """The lines, continued ones joined; ends with the input."""
        if self._interactive:
            with suppress(ImportError):  # gives `input` its editing and history; not everywhere
                import readline  # noqa: F401
        parts: list[str] = []
        while True:
            try:
                line = self._line(continued=bool(parts))
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                parts = []
                write("\n")
                note("Ctrl-D or /quit leaves")
                continue
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                yield "\n".join(parts)
                parts = []
        if self._interactive:
            write("\n")
        elif parts:
            yield "\n".join(parts)

    def _line(self, *, continued: bool) -> str:
        if self._interactive:
            branch = "" if self._chat.current == "main" else self._chat.current
            return input("... " if continued else f"{branch}> ")
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        # What is not UTF-8 is shown to the model as a person would see it; turns are text.
        return line.decode("utf-8", errors="replace").rstrip("\r\n")

    def _take(self, line: str) -> None:
        try:
            if line.startswith("//"):
                self._show(self._chat.say(line[1:]))
            elif line.startswith("/"):
                self._command(line)
            else:
                self._show(self._chat.say(line))
        except FledgeError as error:
            if not self._interactive:
                raise
            note(f"{error}")

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise UsageError(f"there is no command /{name}; /help lists them")
        self._commands[name](rest.strip())

    def _show(self, stream: Stream) -> None:
        """Write an answer as it comes. Ctrl-C ends it; what was shown stays said."""
        if self._answers and not self._interactive:
            write("\n")
        self._answers += 1
        turns = len(self._chat.turns)
        try:
            begun = write_answer(stream, "reading")
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # pressed again: then the chat closes the answer when it goes on
                stream.close()
            write("\n")
            if not self._interactive:
                raise
            kept = len(self._chat.turns) > turns
            remark("stopped; the answer ends here" if kept else "stopped while reading; this was not said")
            return
        write("\n")
        remark_end(begun, stream.completion.finish_reason)
        if self._interactive:
            write("\n")

    def _undo(self, _rest: str) -> None:
        remark(f"took back: {self._chat.undo().user}")

    def _retry(self, _rest: str) -> None:
        self._show(self._chat.retry())

    def _branch(self, name: str) -> None:
        if not name:
            here = self._chat.current
            note(
                "branches: "
                + ", ".join(f"{branch} (here)" if branch == here else branch for branch in self._chat.branches)
            )
            return
        self._chat.branch(name)
        remark(f"in the new branch {name}")

    def _switch(self, name: str) -> None:
        if not name:
            raise UsageError("/switch needs the name of a branch; /branch lists them")
        self._chat.switch(name)
        remark(f"in branch {name}, turns so far: {len(self._chat.turns)}")

    def _history(self, _rest: str) -> None:
        labels = self._chat.template.labels
        for role, text in self._chat.messages:
            note(f"{labels[role]}: {text}")
        if not self._chat.messages:
            note("nothing has been said in this branch")

    def _help(self, _rest: str) -> None:
        for line in HELP.splitlines():
            note(line)
