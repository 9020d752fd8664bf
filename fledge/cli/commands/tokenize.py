"""`fledge tokenize`: text to token ids and back. Starts without torch, unless a model's own vocabulary is asked for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.input import text_or_stdin
from fledge.cli.terminal import remark, visible
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.tokenizer import Tokenizer

app = typer.Typer(name="tokenize", add_completion=False)


@app.command()
def tokenize(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]", help="A text, or ids with --decode. (default: stdin)")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Take ids, print their text.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many tokens there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Use this model's vocabulary. (default: World)")
    ] = None,
) -> None:
    """Turn text into token ids, or ids into text.

    One line a token: its id and the text it stands for. Standard input is taken as bytes, exactly as they are, a final
    line end included.
    """
    if decode:
        if count:
            raise UsageError("--count and --decode do not go together; the number of ids is known")
        _decode(_ids(text), _tokenizer(model), as_json)
        return
    if text is not None and len(text) > 1:
        raise UsageError(f"there are {len(text)} texts; put quotes around one text, or add --decode for ids")
    data = text_or_stdin(text[0] if text else None, "text", 'fledge tokenize "Hello, world"')
    tokenizer = _tokenizer(model)
    if count:
        print(tokenizer.count(data))
        return
    ids = tokenizer.encode(data)
    piece_of = {token: tokenizer.decode_bytes([token]) for token in set(ids)}
    pieces = [piece_of[token] for token in ids]
    if as_json:
        print(
            json.dumps(
                {"ids": ids, "pieces": [piece.decode("utf-8", "replace") for piece in pieces]}, ensure_ascii=False
            )
        )
        return
    width = len(str(tokenizer.vocab_size))
    sys.stdout.write(
        "".join(f"{token:>{width}}  {piece_text(piece)}\n" for token, piece in zip(ids, pieces, strict=True))
    )
    if ids:
        remark(f"{len(ids):,} tokens, {len(data):,} bytes, {len(data) / len(ids):.2f} bytes a token")


def piece_text(piece: bytes) -> str:
    """A token as Python would write it: text in quotes, or b'...' where the bytes alone are no text."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)


def _tokenizer(model: str | None) -> Tokenizer:
    if model is None:
        from fledge.tokenizer import load_world

        return load_world()
    from fledge.checkpoint import inspect, load_tokenizer
    from fledge.engine.llm.loading import locate_checkpoint

    path = locate_checkpoint(model)
    found = inspect(path)
    return load_tokenizer(found.tokenizer_spec, found.config.vocab_size, str(path))


def _ids(words: Sequence[str] | None) -> list[int]:
    """Ids from the arguments, or from standard input; spaces, commas and brackets may stand around them."""
    joined = " ".join(words) if words else None
    text = text_or_stdin(joined, "id", "fledge tokenize --decode 33155 45").decode("utf-8", errors="replace")
    found = re.findall(r"[^\s,\[\]]+", text)
    for word in found:
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise UsageError(f"{word!r:.40} is not a token id; ids are whole numbers from 0 up")
    return [int(word) for word in found]


def _decode(ids: list[int], tokenizer: Tokenizer, as_json: bool) -> None:
    """The exact bytes, unless a person reads them."""
    if as_json:
        print(json.dumps({"ids": ids, "text": tokenizer.decode(ids)}, ensure_ascii=False))
    elif sys.stdout.isatty():
        print(visible(tokenizer.decode(ids)))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(tokenizer.decode_bytes(ids))
