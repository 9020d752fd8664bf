"""`fledge tokenize`: text to token ids and back. It imports torch only for the vocabulary of a model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.input import read_text_or_stdin
from fledge.cli.terminal import escape_controls, print_terminal_note
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.tokenizer import Tokenizer

app = typer.Typer(name="tokenize", add_completion=False)


@app.command()
def tokenize(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]", help="A text, or ids with --decode. (default: stdin)")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Read ids, print their text.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only the number of tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Use this model's vocabulary. (default: World)")
    ] = None,
) -> None:
    """Convert text to token ids, or ids to text.

    Prints one line for each token: its id and its text. Standard input is read as exact bytes, including a final line
    break.
    """
    if decode:
        if count:
            raise UsageError("--count and --decode cannot be combined; the number of ids is already known")
        _print_decoded(_read_ids(text), _load_tokenizer(model), as_json)
        return
    if text is not None and len(text) > 1:
        raise UsageError(f"there are {len(text)} texts; put quotes around one text, or add --decode for ids")
    data = read_text_or_stdin(text[0] if text else None, "text", 'fledge tokenize "Hello, world"')
    tokenizer = _load_tokenizer(model)
    if count:
        print(tokenizer.count(data))
        return
    ids = tokenizer.encode(data)
    token_bytes = {token: tokenizer.decode_bytes([token]) for token in set(ids)}
    pieces = [token_bytes[token] for token in ids]
    if as_json:
        print(
            json.dumps(
                {"ids": ids, "pieces": [piece.decode("utf-8", "replace") for piece in pieces]}, ensure_ascii=False
            )
        )
        return
    width = len(str(tokenizer.vocab_size))
    sys.stdout.write(
        "".join(f"{token:>{width}}  {format_piece(piece)}\n" for token, piece in zip(ids, pieces, strict=True))
    )
    if ids:
        print_terminal_note(f"{len(ids):,} tokens, {len(data):,} bytes, {len(data) / len(ids):.2f} bytes per token")


def format_piece(piece: bytes) -> str:
    """A token in Python's notation: text in quotes, or b'...' if the bytes alone are not valid text."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)


def _load_tokenizer(model: str | None) -> Tokenizer:
    if model is None:
        from fledge.tokenizer import load_world

        return load_world()
    from fledge.checkpoint import inspect, load_tokenizer
    from fledge.engine.llm.loading import locate_checkpoint

    path = locate_checkpoint(model)
    info = inspect(path)
    return load_tokenizer(info.tokenizer_spec, info.config.vocab_size, str(path))


def _read_ids(words: Sequence[str] | None) -> list[int]:
    """Ids from the arguments, or from standard input; separated by spaces, commas or brackets."""
    joined = " ".join(words) if words else None
    text = read_text_or_stdin(joined, "id", "fledge tokenize --decode 33155 45").decode("utf-8", errors="replace")
    numbers = re.findall(r"[^\s,\[\]]+", text)
    for number in numbers:
        if not re.fullmatch(r"[0-9]{1,18}", number):
            raise UsageError(f"{number!r:.40} is not a token id; ids are whole numbers from 0 up")
    return [int(number) for number in numbers]


def _print_decoded(ids: list[int], tokenizer: Tokenizer, as_json: bool) -> None:
    """Print the exact bytes, or readable text on a terminal."""
    if as_json:
        print(json.dumps({"ids": ids, "text": tokenizer.decode(ids)}, ensure_ascii=False))
    elif sys.stdout.isatty():
        print(escape_controls(tokenizer.decode(ids)))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(tokenizer.decode_bytes(ids))
