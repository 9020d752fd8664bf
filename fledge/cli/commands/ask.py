"""`fledge ask`: questions about a text that is read once and known from then on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, note, remark_end, visible, write, write_answer
from fledge.core.errors import UsageError
from fledge.core.files import get_cache_folder

if TYPE_CHECKING:
    from fledge.engine import LLM, Stream
    from fledge.engine.states.read_document import ReadResult

KEPT = 2 << 30
"""Bytes of states in the cache; what was not asked for longest goes first."""

app = typer.Typer(name="ask", add_completion=False)


@app.command()
@spread
def ask(
    model: ModelOptions,
    sampling: SamplingOptions,
    book: Annotated[str, typer.Argument(metavar="TEXT", help="The file to read; - is standard input.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="Each is asked after the text alone.")],
    template: Annotated[
        str | None,
        typer.Option(help="How it is asked: world, instruct or qa. (default: as the model was tuned, else world)"),
    ] = None,
) -> None:
    """Read a text and answer questions about it.

    The state after the text is kept, so the next questions about the same text begin at once. Ctrl-C while reading
    keeps what has been read. From a pipe, standard output gets the answers, a blank line between them. Answers are
    drawn as in `fledge chat`.
    """
    if any(not question.strip() for question in questions):
        raise UsageError("a question is empty; give each as one argument, in quotes")
    data = text_of(book)
    llm = model.load()

    from fledge.engine.llm.chat import CHAT_PARAMS

    template = template or llm.template or "world"
    params = sampling.applied_to(CHAT_PARAMS)
    llm.chat(template=template, params=params)  # a mistake in the options is told before the reading
    began = time.perf_counter()
    reading = _read(llm, data, template, book)
    note(_told(reading, time.perf_counter() - began))
    for number, question in enumerate(questions):
        if number:
            write("\n")
        if sys.stdout.isatty() and len(questions) > 1:
            note(question)
        show_answer(llm.chat(template=template, params=params, state=reading.state).say(question))


def text_of(path: str) -> bytes:
    """The bytes of a text file, or of standard input for "-". Raises UsageError where there is nothing in it."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if not data.strip():
        raise UsageError(f"{'standard input' if path == '-' else path} is empty; there is nothing to read")
    return data


def turn_ids(llm: LLM, data: bytes, template: str) -> list[int]:
    """A text as what comes before the first question: as it is, then what ends a turn."""
    from fledge.tokenizer import template_named

    return llm.tokenizer.encode(data.rstrip() + template_named(template).close_turn().encode())


def show_answer(stream: Stream) -> None:
    """Write an answer as it comes, without the space before it. Raises KeyboardInterrupt after Ctrl-C."""
    try:
        begun = write_answer(stream, "reading the question")
    finally:
        write("\n")
    remark_end(begun, stream.completion.finish_reason)


def _read(llm: LLM, data: bytes, template: str, book: str) -> ReadResult:
    from fledge.engine.states.read_document import evict_oldest, mark_used, source_hash

    ids, folder = turn_ids(llm, data, template), get_cache_folder() / "books"
    with SlowBar(f"reading {visible(book)}", "tokens") as bar:
        path = folder / f"{source_hash(llm.read([]), ids)[:32]}-{llm.identity[:32]}.state"
        reading = llm.read_document(ids, path, title=Path(book).name, progress=bar.update, on_write_error=_not_kept)
    mark_used(path)
    evict_oldest(folder, KEPT)
    return reading


def _not_kept(error: OSError) -> None:
    note(f"the state of the text cannot be kept, so it will be read again next time: {error}")


def _told(reading: ReadResult, seconds: float) -> str:
    total = reading.metadata.tokens
    if not reading.new_tokens:
        return f"known: {total:,} tokens"
    before = f", {total - reading.new_tokens:,} were known" if reading.new_tokens < total else ""
    return f"read {reading.new_tokens:,} tokens in {seconds:.1f} s{before}"
