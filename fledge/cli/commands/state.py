"""`fledge state`: what a model has read, as a file: made, looked at, gone on from, compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.commands.ask import show_answer, text_of, turn_ids
from fledge.cli.commands.generate import first_piece, summary, take_rest
from fledge.cli.input import text_or_stdin, without_final_newline
from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, print_rows, remark, visible
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.engine import LLM
    from fledge.engine.states.state_file import StateMetadata
    from fledge.models import State

app = typer.Typer(name="state", add_completion=False)

StateFile = Annotated[Path, typer.Argument(metavar="STATE", help="A file that `fledge state save` wrote, or a server.")]


@app.callback()
def state() -> None:
    """Keep what a model has read in a file, and go on from it."""


@app.command()
@spread
def save(
    model: ModelOptions,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The file to read; - is standard input.")],
    to: Annotated[Path, typer.Option("--to", metavar="STATE", help="The file to write.")],
    template: Annotated[
        str | None,
        typer.Option(help="End it as a turn, for questions to follow: world, instruct or qa. (default: a plain text)"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="What to call it. (default: the name of the text's file)")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Read a text and write the state after it.

    Ctrl-C keeps what has been read, in STATE.part; the same command goes on from there.
    """
    if to.exists() and not force:
        raise UsageError(f"{to} exists; give another name, or --force to replace it")
    data = text_of(text)
    llm = model.load()

    ids = llm.tokenizer.encode(data) if template is None else turn_ids(llm, data, template)
    title = ("" if text == "-" else Path(text).name) if title is None else title
    with SlowBar(f"reading {visible(text)}", "tokens") as bar:
        reading = llm.read_document(ids, to, template=template, title=title, progress=bar.update)
    known = f", {len(ids) - reading.new_tokens:,} of them before" if reading.new_tokens < len(ids) else ""
    print(visible(f"{to}: {len(ids):,} tokens read{known}, {to.stat().st_size:,} bytes"))


@app.command()
def info(file: StateFile) -> None:
    """Tell what a state has read, and whose it is."""
    from fledge.engine.states.state_file import read_state

    found, card = read_state(file)
    print_rows(_rows(file, found, card))


@app.command()
@spread
def load(
    model: ModelOptions,
    sampling: SamplingOptions,
    file: StateFile,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What comes next. (default: standard input)")
    ] = None,
) -> None:
    """Go on from a state.

    After a plain text the prompt continues it, as in `fledge generate`; after a state with a template it is asked as a
    question, as in `fledge chat`. Only the model that made the state takes it.
    """
    from fledge.engine.states.state_file import read_state

    found, card = read_state(file)
    data = text_or_stdin(prompt, "prompt", f'fledge state load {file} "What comes next"')
    data = without_final_newline(data) if prompt is None else data
    if not data:
        raise UsageError("the prompt is empty; give at least one character to follow what the state has read")
    llm = model.load()
    with SlowBar("comparing the weights"):
        card.check(llm.identity, llm.name)
    if card.template is None:
        _go_on(llm, found, data, sampling)
        return
    from fledge.engine.llm.chat import CHAT_PARAMS

    chat = llm.chat(template=card.template, params=sampling.applied_to(CHAT_PARAMS), state=found)
    show_answer(chat.say(data.decode("utf-8", "replace")))


@app.command()
def diff(
    first: StateFile, second: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one of the same model.")]
) -> None:
    """Tell how far two states of one model are apart, layer by layer.

    0 where they are the same, 1 where one holds nothing. att_shift and ffn_shift are what is left of the last token,
    memory is everything before it.
    """
    from fledge.engine.states.inspect import layer_distances
    from fledge.engine.states.state_file import read_state

    (one, mine), (other, theirs) = read_state(first), read_state(second)
    mine.check(theirs.identity, theirs.model)
    found = layer_distances(one, other)
    layers = zip(*found.values(), strict=True)
    print_rows([(str(layer), *(f"{x:.4f}" for x in row)) for layer, row in enumerate(layers)], ("layer", *found))


def _go_on(llm: LLM, found: State, data: bytes, sampling: SamplingOptions) -> None:
    from fledge.engine import SamplingParams

    with SlowBar("reading the prompt", "tokens") as bar:
        stream = llm.stream(data, state=found, params=sampling.applied_to(SamplingParams()), progress=bar.update)
        first = first_piece(stream)
    take_rest(stream, first, show=True)
    done = stream.completion
    remark(summary(done))
    if done.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _rows(file: Path, found: State, card: StateMetadata) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in found.tensors().items())
    return [
        ("file", str(file)),
        ("title", card.title or "none"),
        ("read", f"{card.tokens:,} tokens"),
        ("template", card.template or "none: a plain text"),
        ("model", f"{card.model}{f': {card.family}' if card.family else ''}"),
        ("weights", card.identity),
        ("made", card.created),
        ("holds", f"{type(found).__name__}: {shapes}, float32"),
        ("bytes", f"{found.nbytes:,}"),
    ]
