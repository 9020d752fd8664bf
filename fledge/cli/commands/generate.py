"""`fledge generate`: continue a text. Standard output gets that text as it comes, or one JSON object; nothing else."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.input import text_or_stdin, without_final_newline
from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, messages, remark, visible, write
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.engine import LLM, Completion, Stream

SHOWN_PROMPT = 400
"""Characters of the prompt that a terminal shows before the text."""

app = typer.Typer(name="generate", add_completion=False)


@app.command()
@spread
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue. (default: standard input)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, at the end.")] = False,
) -> None:
    """Continue a text.

    Standard input is taken as bytes, less one line end at its end; they need not be valid UTF-8. Ctrl-C ends the text
    and keeps what was written.
    """
    data = text_or_stdin(prompt, "prompt", 'fledge generate "Once upon a time"')
    data = without_final_newline(data) if prompt is None else data
    if not data:
        raise UsageError('the prompt is empty; give at least one character, say fledge generate "Once upon a time"')
    began = time.perf_counter()
    llm = model.load()
    load_s = time.perf_counter() - began

    from fledge.engine import SamplingParams

    with SlowBar("reading the prompt", "tokens") as bar:
        stream = llm.stream(data, params=sampling.applied_to(SamplingParams()), progress=bar.update)
        first = first_piece(stream)
    if first is not None and not as_json:
        _show_prompt(data)
    take_rest(stream, first, show=not as_json)
    done = stream.completion
    if as_json:
        print(json.dumps(record(llm, done, load_s), ensure_ascii=False))
    elif sys.stdout.isatty():
        write("\n")
    remark(summary(done))
    if done.finish_reason == "interrupted":
        raise KeyboardInterrupt


def first_piece(stream: Stream) -> str | None:
    """The first piece; None after Ctrl-C."""
    try:
        return next(stream, "")
    except KeyboardInterrupt:
        return None


def take_rest(stream: Stream, first: str | None, *, show: bool) -> None:
    """Take the text to its end, or to Ctrl-C."""
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


def _show_prompt(data: bytes) -> None:
    """On a terminal the text reads on from its prompt."""
    if sys.stdout.isatty() and messages().is_terminal:
        text = data.decode("utf-8", errors="replace")
        text = text if len(text) <= SHOWN_PROMPT else "…" + text[-SHOWN_PROMPT:]
        messages().print(visible(text), style="dim", end="", markup=False, soft_wrap=True)


def summary(done: Completion) -> str:
    """One line about a finished text."""
    why = {"stop": "stop text", "eos": "end of text", "length": "token limit", "interrupted": "Ctrl-C"}
    speed = f", {_rate(len(done.ids), done.timings.decode_s):.1f} tokens/s" if done.ids else ""
    return f"{len(done.ids)} tokens{speed}, ended by {why[done.finish_reason]}, seed {done.seed}"


def record(llm: LLM, done: Completion, load_s: float) -> dict[str, Any]:
    """What `--json` prints."""
    prefill_s, decode_s = done.timings.prefill_s, done.timings.decode_s
    return {
        "text": done.text,
        "ids": list(done.ids),
        "finish_reason": done.finish_reason,
        "stop": done.stop,
        "prompt_tokens": done.prompt_tokens,
        "seed": done.seed,
        "model": llm.name,
        "device": str(llm.device),
        "weights": llm.weights,
        "timings": {"load_s": load_s, "prefill_s": prefill_s, "decode_s": decode_s},
        "tokens_per_second": {
            "prefill": _rate(done.prompt_tokens, prefill_s),
            "decode": _rate(len(done.ids), decode_s),
        },
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
