"""The input loop of `fledge chat`: reads lines, runs slash commands, shows answers while they are generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from fledge.cli.terminal import print_answer_end, print_note, print_terminal_note, write, write_answer
from fledge.core.errors import FledgeError, UsageError
from fledge.engine import Chat, Stream

HELP = """\
/undo          remove the last question and its answer
/retry         answer the last question again, differently
/branch NAME   start a new branch here and switch to it; without NAME, list the branches
/switch NAME   switch to another branch
/history       show this branch
/help          show this list
/quit          end the conversation (also Ctrl-D)
A line that ends with a backslash continues on the next line. To send a message that begins with a slash, type two.\
"""


class ChatSession:
    """One conversation of `fledge chat`."""

    def __init__(self, chat: Chat, *, interactive: bool) -> None:
        """interactive: input comes from a terminal. Errors and Ctrl-C then end the current action, not the chat."""
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
        """Run until /quit or the end of the input. On a terminal, Ctrl-C never ends the conversation."""
        while True:
            try:
                return self._converse()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                write("\n")
                print_note("Ctrl-D or /quit ends the conversation")

    def _converse(self) -> None:
        for line in self._lines():
            if line.strip() == "/quit":
                return
            if line.strip():
                self._handle_line(line)

    def _lines(self) -> Iterator[str]:
        """The input lines, with continued lines joined."""
        if self._interactive:
            with suppress(ImportError):  # adds line editing and history to `input`; not on every platform
                import readline  # noqa: F401
        parts: list[str] = []
        while True:
            try:
                line = self._read_line(is_continuation=bool(parts))
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                parts = []
                write("\n")
                print_note("Ctrl-D or /quit ends the conversation")
                continue
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                yield "\n".join(parts)
                parts = []
        if self._interactive:
            write("\n")
        elif parts:
            yield "\n".join(parts)

    def _read_line(self, *, is_continuation: bool) -> str:
        if self._interactive:
            branch = "" if self._chat.current == "main" else self._chat.current
            return input("... " if is_continuation else f"{branch}> ")
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        # A turn is text, so invalid UTF-8 is replaced as a terminal would show it.
        return line.decode("utf-8", errors="replace").rstrip("\r\n")

    def _handle_line(self, line: str) -> None:
        try:
            if line.startswith("//"):
                self._show_answer(self._chat.say(line[1:]))
            elif line.startswith("/"):
                self._run_command(line)
            else:
                self._show_answer(self._chat.say(line))
        except FledgeError as error:
            if not self._interactive:
                raise
            print_note(f"{error}")

    def _run_command(self, line: str) -> None:
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise UsageError(f"there is no command /{name}; /help lists the commands")
        self._commands[name](rest.strip())

    def _show_answer(self, stream: Stream) -> None:
        """Write an answer while it is generated. Ctrl-C ends it; the text shown so far becomes the answer."""
        if self._answers and not self._interactive:
            write("\n")
        self._answers += 1
        turns = len(self._chat.turns)
        try:
            has_text = write_answer(stream, "reading")
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # pressed again: the chat then closes the answer at the next message
                stream.close()
            write("\n")
            if not self._interactive:
                raise
            is_kept = len(self._chat.turns) > turns
            print_terminal_note(
                "stopped; the answer ends here" if is_kept else "stopped while reading; the message was not added"
            )
            return
        write("\n")
        print_answer_end(has_text, stream.completion.finish_reason)
        if self._interactive:
            write("\n")

    def _undo(self, _rest: str) -> None:
        print_terminal_note(f"removed: {self._chat.undo().user}")

    def _retry(self, _rest: str) -> None:
        self._show_answer(self._chat.retry())

    def _branch(self, name: str) -> None:
        if not name:
            current = self._chat.current
            print_note(
                "branches: "
                + ", ".join(f"{branch} (current)" if branch == current else branch for branch in self._chat.branches)
            )
            return
        self._chat.branch(name)
        print_terminal_note(f"now in the new branch {name}")

    def _switch(self, name: str) -> None:
        if not name:
            raise UsageError("/switch needs the name of a branch; /branch lists them")
        self._chat.switch(name)
        print_terminal_note(f"now in branch {name}, turns so far: {len(self._chat.turns)}")

    def _history(self, _rest: str) -> None:
        labels = self._chat.template.labels
        for role, text in self._chat.messages:
            print_note(f"{labels[role]}: {text}")
        if not self._chat.messages:
            print_note("this branch has no messages")

    def _help(self, _rest: str) -> None:
        for line in HELP.splitlines():
            print_note(line)
