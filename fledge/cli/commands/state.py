"""`fledge state`: save the state after a text, inspect it, continue from it, compare two states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.commands.ask import encode_turn, print_answer, read_text
from fledge.cli.commands.generate import finish_stream, next_piece, summarize
from fledge.cli.input import read_text_or_stdin, strip_final_newline
from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, escape_controls, print_rows, print_terminal_note
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.engine import LLM
    from fledge.engine.states.state_file import StateMetadata
    from fledge.models import State

app = typer.Typer(name="state", add_completion=False)

StateFile = Annotated[Path, typer.Argument(metavar="STATE", help="A state file of `fledge state save` or of a server.")]


@app.callback()
def state() -> None:
    """Save the state of a model in a file, and continue from it."""


@app.command()
@spread
def save(
    model: ModelOptions,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The file to read; - is standard input.")],
    to: Annotated[Path, typer.Option("--to", metavar="STATE", help="The file to write.")],
    template: Annotated[
        str | None,
        typer.Option(help="End the text as a turn of world, instruct or qa, for questions. (default: no)"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The title in the metadata. (default: the file name)")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Read a text and write the state after it.

    Ctrl-C keeps the part that has been read, in STATE.part; the same command continues from there.
    """
    if to.exists() and not force:
        raise UsageError(f"{to} exists; give another name, or --force to replace it")
    data = read_text(text)
    llm = model.load()

    ids = llm.tokenizer.encode(data) if template is None else encode_turn(llm, data, template)
    title = ("" if text == "-" else Path(text).name) if title is None else title
    with SlowBar(f"reading {escape_controls(text)}", "tokens") as bar:
        result = llm.read_document(ids, to, template=template, title=title, progress=bar.update)
    earlier = f", {len(ids) - result.new_tokens:,} of them before" if result.new_tokens < len(ids) else ""
    print(escape_controls(f"{to}: {len(ids):,} tokens read{earlier}, {to.stat().st_size:,} bytes"))


@app.command()
def info(file: StateFile) -> None:
    """Show what a state has read, and the model that made it."""
    from fledge.engine.states.state_file import read_state

    loaded, metadata = read_state(file)
    print_rows(_state_rows(file, loaded, metadata))


@app.command()
@spread
def load(
    model: ModelOptions,
    sampling: SamplingOptions,
    file: StateFile,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text that follows. (default: standard input)")
    ] = None,
) -> None:
    """Continue from a state.

    After a plain text, the prompt continues it, as in `fledge generate`. After a state with a template, the prompt is a
    question, as in `fledge chat`. Only the model that made the state accepts it.
    """
    from fledge.engine.states.state_file import read_state

    loaded, metadata = read_state(file)
    data = read_text_or_stdin(prompt, "prompt", f'fledge state load {file} "What comes next"')
    data = strip_final_newline(data) if prompt is None else data
    if not data:
        raise UsageError("the prompt is empty; give at least one character to follow the text of the state")
    llm = model.load()
    with SlowBar("comparing the weights"):
        metadata.check(llm.identity, llm.name)
    if metadata.template is None:
        _continue_text(llm, loaded, data, sampling)
        return
    from fledge.engine.llm.chat import CHAT_PARAMS

    chat = llm.chat(template=metadata.template, params=sampling.apply_to(CHAT_PARAMS), state=loaded)
    print_answer(chat.say(data.decode("utf-8", "replace")))


@app.command()
def diff(
    first: StateFile, second: Annotated[Path, typer.Argument(metavar="OTHER", help="Another state of the same model.")]
) -> None:
    """Show the distance between two states of one model, layer by layer.

    0 means equal, 1 means that one of them is empty. att_shift and ffn_shift contain the last token, memory contains
    everything before it.
    """
    from fledge.engine.states.inspect import layer_distances
    from fledge.engine.states.state_file import read_state

    (left, left_metadata), (right, right_metadata) = read_state(first), read_state(second)
    left_metadata.check(right_metadata.identity, right_metadata.model)
    distances = layer_distances(left, right)
    layers = zip(*distances.values(), strict=True)
    print_rows([(str(layer), *(f"{x:.4f}" for x in row)) for layer, row in enumerate(layers)], ("layer", *distances))


def _continue_text(llm: LLM, start: State, data: bytes, sampling: SamplingOptions) -> None:
    from fledge.engine import SamplingParams

    with SlowBar("reading the prompt", "tokens") as bar:
        stream = llm.stream(data, state=start, params=sampling.apply_to(SamplingParams()), progress=bar.update)
        first = next_piece(stream)
    finish_stream(stream, first, show=True)
    completion = stream.completion
    print_terminal_note(summarize(completion))
    if completion.finish_reason == "interrupted":
        raise KeyboardInterrupt


def _state_rows(file: Path, loaded: State, metadata: StateMetadata) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in loaded.tensors().items())
    return [
        ("file", str(file)),
        ("title", metadata.title or "none"),
        ("read", f"{metadata.tokens:,} tokens"),
        ("template", metadata.template or "none: a plain text"),
        ("model", f"{metadata.model}{f': {metadata.family}' if metadata.family else ''}"),
        ("weights", metadata.identity),
        ("created", metadata.created),
        ("tensors", f"{type(loaded).__name__}: {shapes}, float32"),
        ("bytes", f"{loaded.nbytes:,}"),
    ]
