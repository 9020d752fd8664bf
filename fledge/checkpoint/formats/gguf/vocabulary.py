"""Convert the token list of a GGUF file to and from the vocabulary record of Fledge.

The tokenizer `rwkv` of llama.cpp has one text for each id, written like the inside of Python's repr of the token's
bytes: `\\n`, `\\\\`, `\\'`, `\\xe4`. Id 0, the end of text, is `<s>` of the type CONTROL; unused ids are `[PAD<id>]`
of the type UNUSED. llama.cpp also recognizes these texts in a prompt, where every other program reads letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fledge.checkpoint.formats.gguf.header import NumberArray
from fledge.core.errors import UnsupportedError
from fledge.tokenizer.vocabulary import BYTE_IDS, Vocabulary, byte_vocabulary, prune, world_vocabulary

NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
END = b"<s>"
ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
CONTROLS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}

# The chat template of the World models (fledge.tokenizer.chat_template). llama.cpp detects it by the comment.
CHAT_TEMPLATE = r"""
{#- rwkv-world -#}
{%- set labels = {'system': 'System: ', 'user': 'User: ', 'assistant': 'Assistant: '} -%}
{%- for message in messages -%}
{{- labels[message['role']] + message['content'] | trim + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
""".strip()


def make_tokenizer_keys(vocabulary: Vocabulary | None, rows: int) -> dict[str, Any]:
    """Create the keys `tokenizer.*` for a model with this many rows. Without a vocabulary, it takes only token ids."""
    if vocabulary is None:
        return {"ggml.model": "none"}
    keys: dict[str, Any] = {
        "ggml.model": "rwkv",
        "ggml.tokens": _get_texts(vocabulary),
        "ggml.token_type": _get_types(vocabulary),
    }
    if vocabulary.eos_id >= 0:
        keys["ggml.bos_token_id"] = keys["ggml.eos_token_id"] = vocabulary.eos_id
        keys["chat_template"] = CHAT_TEMPLATE
    if b"\n\n" in vocabulary.tokens:
        keys["ggml.eot_token_id"] = vocabulary.tokens.index(b"\n\n")  # ends an answer in the chat template
    assert len(vocabulary.tokens) == rows
    return keys


def read_tokenizer_spec(values: Mapping[str, Any], rows: int, source: str) -> dict[str, Any] | None:
    """Return the record of the vocabulary in the keys of a file: World, pruned or bytes.

    None for any other, and if the file has none. Raises UnsupportedError if a model has the 65536 rows of World but
    other tokens: without a record it would be used as a World model, with wrong answers.
    """
    texts = values.get("tokenizer.ggml.tokens")
    world = world_vocabulary()
    kind = values.get("tokenizer.ggml.model", "none")
    if kind != "rwkv" or not isinstance(texts, list) or len(texts) != rows:
        if rows == world.size and kind != "none":
            raise UnsupportedError(
                f"{source} has {rows} token rows but not World's tokens; Fledge cannot read its text"
            )
        return None
    tokens = _parse_tokens(texts, values.get("tokenizer.ggml.token_type"))
    if rows == world.size:
        if tokens[1 : world.used] == world.tokens[1 : world.used]:  # reserved ids may be in use
            return world.to_spec()
        raise UnsupportedError(f"{source} has {rows} token rows but not World's tokens; Fledge cannot read its text")
    if tokens == byte_vocabulary().tokens:
        return byte_vocabulary().to_spec()
    return _make_pruned_spec(tokens, world)


def _get_texts(vocabulary: Vocabulary) -> list[bytes]:
    """Return the text of each id."""
    return [
        repr(token)[2:-1].encode("ascii") if token else END if token_id == vocabulary.eos_id else b"[PAD%d]" % token_id
        for token_id, token in enumerate(vocabulary.tokens)
    ]


def _get_types(vocabulary: Vocabulary) -> list[int]:
    return [
        NORMAL if token else CONTROL if token_id == vocabulary.eos_id else UNUSED
        for token_id, token in enumerate(vocabulary.tokens)
    ]


def _parse_tokens(texts: Sequence[bytes], types: Any) -> tuple[bytes, ...]:
    """Return the bytes of each id, empty for an unused id."""
    kinds: Sequence[Any] = ()
    if isinstance(types, NumberArray) and types.code in "iI":
        kinds = types.unpack()
    if len(kinds) != len(texts):
        kinds = [CONTROL if text == END else NORMAL for text in texts]
    return tuple(
        _parse_text(text) if kind not in (CONTROL, UNUSED) else b"" for text, kind in zip(texts, kinds, strict=True)
    )


def _parse_text(text: bytes) -> bytes:
    """Return the bytes of a token from its text."""
    if b"\\" not in text:
        return text
    return ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)]) if match[1] else CONTROLS.get(match[2], match[2])


def _make_pruned_spec(tokens: tuple[bytes, ...], world: Vocabulary) -> dict[str, Any] | None:
    """Return the record of a pruned World vocabulary with these tokens, or None for other tokens."""
    ids = {token: token_id for token_id, token in enumerate(world.tokens) if token}
    used = max((token_id for token_id, token in enumerate(tokens) if token), default=0) + 1
    if used < BYTE_IDS or not all(token in ids for token in tokens[1:used]):
        return None
    pruned = prune(world, (ids[token] for token in tokens[BYTE_IDS:used]), size=len(tokens))
    return pruned.to_spec() if pruned.tokens == tokens else None
