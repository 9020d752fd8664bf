"""The vocabulary in a GGUF file: llama.cpp's list of token texts, and Fledge's record of a vocabulary.

The tokenizer `rwkv` of llama.cpp has one text for each id, written as the inside of Python's repr of the token's bytes:
`\\n`, `\\\\`, `\\'`, `\\xe4`. Id 0, the end of text, is `<s>` of the type CONTROL; ids that stand for nothing are
`[PAD<id>]` of the type UNUSED. llama.cpp finds these texts in a prompt too, where every other program reads letters.
Here: both directions of that list. Not here: the file, and how text is cut into tokens.
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

# The chat form of the World models (fledge.tokenizer.chat_template). llama.cpp knows it by the name in the comment.
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
    """Keys below `tokenizer.` for a model with this many rows; without a vocabulary a model takes token ids only."""
    if vocabulary is None:
        return {"ggml.model": "none"}
    keys: dict[str, Any] = {
        "ggml.model": "rwkv",
        "ggml.tokens": _texts(vocabulary),
        "ggml.token_type": _types(vocabulary),
    }
    if vocabulary.eos_id >= 0:
        keys["ggml.bos_token_id"] = keys["ggml.eos_token_id"] = vocabulary.eos_id
        keys["chat_template"] = CHAT_TEMPLATE
    if b"\n\n" in vocabulary.tokens:
        keys["ggml.eot_token_id"] = vocabulary.tokens.index(b"\n\n")  # ends an answer in the chat form
    assert len(vocabulary.tokens) == rows
    return keys


def read_tokenizer_spec(values: Mapping[str, Any], rows: int, source: str) -> dict[str, Any] | None:
    """The record of the vocabulary in a file's keys, where it is one that Fledge knows: World, pruned or bytes.

    None for any other, and where the file has none. Raises UnsupportedError where a model has World's 65536 rows but
    other tokens: without a record it would be taken for a World model and answer nonsense.
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
    tokens = _tokens(texts, values.get("tokenizer.ggml.token_type"))
    if rows == world.size:
        if tokens[1 : world.used] == world.tokens[1 : world.used]:  # reserved ids may have been given a meaning
            return world.to_spec()
        raise UnsupportedError(f"{source} has {rows} token rows but not World's tokens; Fledge cannot read its text")
    if tokens == byte_vocabulary().tokens:
        return byte_vocabulary().to_spec()
    return _pruned_spec(tokens, world)


def _texts(vocabulary: Vocabulary) -> list[bytes]:
    """The list of texts."""
    return [
        repr(token)[2:-1].encode("ascii") if token else END if at == vocabulary.eos_id else b"[PAD%d]" % at
        for at, token in enumerate(vocabulary.tokens)
    ]


def _types(vocabulary: Vocabulary) -> list[int]:
    return [
        NORMAL if token else CONTROL if at == vocabulary.eos_id else UNUSED
        for at, token in enumerate(vocabulary.tokens)
    ]


def _tokens(texts: Sequence[bytes], types: Any) -> tuple[bytes, ...]:
    """The bytes of each id, none where it stands for nothing."""
    kinds: Sequence[Any] = ()
    if isinstance(types, NumberArray) and types.code in "iI":
        kinds = types.unpack()
    if len(kinds) != len(texts):
        kinds = [CONTROL if text == END else NORMAL for text in texts]
    return tuple(
        _bytes(text) if kind not in (CONTROL, UNUSED) else b"" for text, kind in zip(texts, kinds, strict=True)
    )


def _bytes(text: bytes) -> bytes:
    """The bytes a text stands for."""
    if b"\\" not in text:
        return text
    return ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)]) if match[1] else CONTROLS.get(match[2], match[2])


def _pruned_spec(tokens: tuple[bytes, ...], world: Vocabulary) -> dict[str, Any] | None:
    """The record of a pruned World vocabulary with these tokens, if that is what they are."""
    ids = {token: at for at, token in enumerate(world.tokens) if token}
    used = max((at for at, token in enumerate(tokens) if token), default=0) + 1
    if used < BYTE_IDS or not all(token in ids for token in tokens[1:used]):
        return None
    pruned = prune(world, (ids[token] for token in tokens[BYTE_IDS:used]), size=len(tokens))
    return pruned.to_spec() if pruned.tokens == tokens else None
