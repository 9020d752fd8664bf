"""`fledge generate`: continue a text. Standard output gets only the generated text, or one JSON object."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.input import read_text_or_stdin, strip_final_newline
from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, escape_controls, message_console, print_terminal_note, write
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.engine import LLM, Completion, Stream

MAX_PROMPT_SHOWN = 400
"""Number of characters of the prompt that a terminal shows before the text."""

app = typer.Typer(name="generate", add_completion=False)


@app.command()
@spread
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue. (default: standard input)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a text.

    Standard input is read as bytes, without one line break at its end; it need not be valid UTF-8. Ctrl-C stops the
    generation and keeps the text so far.
    """
    data = read_text_or_stdin(prompt, "prompt", 'fledge generate "Once upon a time"')
    data = strip_final_newline(data) if prompt is None else data
    if not data:
        raise UsageError('the prompt is empty; give at least one character, as in fledge generate "Once upon a time"')
    started = time.perf_counter()
    llm = model.load()
    load_s = time.perf_counter() - started

    from fledge.engine import SamplingParams

    with SlowBar("reading the prompt", "tokens") as bar:
        stream = llm.stream(data, params=sampling.apply_to(SamplingParams()), progress=bar.update)
        first = next_piece(stream)
    if first is not None and not as_json:
        _print_prompt(data)
    finish_stream(stream, first, show=not as_json)
    completion = stream.completion
    if as_json:
        print(json.dumps(completion_record(llm, completion, load_s), ensure_ascii=False))
    elif sys.stdout.isatty():
        write("\n")
    print_terminal_note(summarize(completion))
    if completion.finish_reason == "interrupted":
        raise KeyboardInterrupt


def next_piece(stream: Stream) -> str | None:
    """The next part of the text; None after Ctrl-C."""
    try:
        return next(stream, "")
    except KeyboardInterrupt:
        return None


def finish_stream(stream: Stream, first: str | None, *, show: bool) -> None:
    """Generate the rest of the text, until its end or Ctrl-C. show: write it to standard output."""
    if first is None:
        return
    try:
        if show:
            write(first)
        for piece in stream:
            if show:
                write(piece)
    except KeyboardInterrupt:
        stream.close()


def _print_prompt(data: bytes) -> None:
    """On a terminal, print the prompt before the text."""
    if sys.stdout.isatty() and message_console().is_terminal:
        text = data.decode("utf-8", errors="replace")
        text = text if len(text) <= MAX_PROMPT_SHOWN else "…" + text[-MAX_PROMPT_SHOWN:]
        message_console().print(escape_controls(text), style="dim", end="", markup=False, soft_wrap=True)


def summarize(completion: Completion) -> str:
    """One line about a finished text."""
    reasons = {"stop": "stop string", "eos": "end of text", "length": "token limit", "interrupted": "Ctrl-C"}
    count = len(completion.ids)
    speed = f", {_rate(count, completion.timings.decode_s):.1f} tokens/s" if count else ""
    return f"{count} tokens{speed}, ended by {reasons[completion.finish_reason]}, seed {completion.seed}"


def completion_record(llm: LLM, completion: Completion, load_s: float) -> dict[str, Any]:
    """The object that `--json` prints."""
    prefill_s, decode_s = completion.timings.prefill_s, completion.timings.decode_s
    return {
        "text": completion.text,
        "ids": list(completion.ids),
        "finish_reason": completion.finish_reason,
        "stop": completion.stop,
        "prompt_tokens": completion.prompt_tokens,
        "seed": completion.seed,
        "model": llm.name,
        "device": str(llm.device),
        "weights": llm.weights,
        "timings": {"load_s": load_s, "prefill_s": prefill_s, "decode_s": decode_s},
        "tokens_per_second": {
            "prefill": _rate(completion.prompt_tokens, prefill_s),
            "decode": _rate(len(completion.ids), decode_s),
        },
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
