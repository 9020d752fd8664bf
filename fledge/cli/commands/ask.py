"""`fledge ask`: questions about a text that is read only once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, escape_controls, print_answer_end, print_note, write, write_answer
from fledge.core.errors import UsageError
from fledge.core.files import get_cache_folder

if TYPE_CHECKING:
    from fledge.engine import LLM, Stream
    from fledge.engine.states.read_document import ReadResult

CACHE_BYTES = 2 << 30
"""Size limit of the cached states; the least recently used ones are removed first."""

app = typer.Typer(name="ask", add_completion=False)


@app.command()
@spread
def ask(
    model: ModelOptions,
    sampling: SamplingOptions,
    book: Annotated[str, typer.Argument(metavar="TEXT", help="The file to read; - is standard input.")],
    questions: Annotated[
        list[str], typer.Argument(metavar="QUESTION...", help="Asked one by one, each right after the text.")
    ],
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: world, instruct or qa. (default: that of the model, else world)"),
    ] = None,
) -> None:
    """Read a text and answer questions about it.

    The state after the text is saved, so later questions about the same text are answered immediately. Ctrl-C while
    reading keeps the part that has been read. In a pipe, standard output gets the answers, separated by blank lines.
    The sampling defaults are those of `fledge chat`.
    """
    if any(not question.strip() for question in questions):
        raise UsageError("a question is empty; give each as one argument, in quotes")
    data = read_text(book)
    llm = model.load()

    from fledge.engine.llm.chat import CHAT_PARAMS

    template = template or llm.template or "world"
    params = sampling.apply_to(CHAT_PARAMS)
    llm.chat(template=template, params=params)  # checks the options before the text is read
    started = time.perf_counter()
    result = _read_document(llm, data, template, book)
    print_note(_describe_result(result, time.perf_counter() - started))
    for index, question in enumerate(questions):
        if index:
            write("\n")
        if sys.stdout.isatty() and len(questions) > 1:
            print_note(question)
        print_answer(llm.chat(template=template, params=params, state=result.state).say(question))


def read_text(path: str) -> bytes:
    """The bytes of a text file, or of standard input for "-". Raises UsageError if it is empty."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if not data.strip():
        raise UsageError(f"{'standard input' if path == '-' else path} is empty; there is nothing to read")
    return data


def encode_turn(llm: LLM, data: bytes, template: str) -> list[int]:
    """The ids of a text before the first question: the text, then the end of a turn."""
    from fledge.tokenizer import template_named

    return llm.tokenizer.encode(data.rstrip() + template_named(template).close_turn().encode())


def print_answer(stream: Stream) -> None:
    """Write an answer while it is generated, without leading whitespace. Raises KeyboardInterrupt after Ctrl-C."""
    try:
        has_text = write_answer(stream, "reading the question")
    finally:
        write("\n")
    print_answer_end(has_text, stream.completion.finish_reason)


def _read_document(llm: LLM, data: bytes, template: str, book: str) -> ReadResult:
    from fledge.engine.states.read_document import evict_oldest, mark_used, source_hash

    ids, folder = encode_turn(llm, data, template), get_cache_folder() / "books"
    with SlowBar(f"reading {escape_controls(book)}", "tokens") as bar:
        path = folder / f"{source_hash(llm.read([]), ids)[:32]}-{llm.identity[:32]}.state"
        result = llm.read_document(
            ids, path, title=Path(book).name, progress=bar.update, on_write_error=_report_write_error
        )
    mark_used(path)
    evict_oldest(folder, CACHE_BYTES)
    return result


def _report_write_error(error: OSError) -> None:
    print_note(f"the state of the text cannot be saved, so the text will be read again next time: {error}")


def _describe_result(result: ReadResult, seconds: float) -> str:
    total = result.metadata.tokens
    if not result.new_tokens:
        return f"cached: {total:,} tokens"
    cached = f", {total - result.new_tokens:,} were cached" if result.new_tokens < total else ""
    return f"read {result.new_tokens:,} tokens in {seconds:.1f} s{cached}"
