"""Convert names to and from the layout of the Hugging Face remote code (`rwkv`, `rwkv5`, `rwkv6`); detect the layout.

Values and shapes are the same as in official files; only names differ. The RWKV-4 class of transformers uses the names
of the v5 code. The layout of flash-linear-attention is in formats/fla.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "_forward_module."  # DeepSpeed adds it to every name
LETTERS = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}  # time_mix_k is called time_mix_key
PREFIXES = (  # (official, Hugging Face) prefixes of names
    ("emb.", "rwkv.embeddings."),
    ("ln_out.", "rwkv.ln_out."),
    ("head.", "head."),
    ("blocks.0.ln0.", "rwkv.blocks.0.pre_ln."),
)
SUBMODULES = (("att", "attention"), ("ffn", "feed_forward"), ("ln1", "ln1"), ("ln2", "ln2"))
TO_HF = dict(SUBMODULES)
FROM_HF = {hf: official for official, hf in SUBMODULES}
TIME_MIX = re.compile(r"time_mix_(\w+)")
BLOCK = re.compile(r"(rwkv\.)?blocks\.(\d+)\.(\w+)\.(.+)")


def detect_layout(names: Iterable[str]) -> str:
    """Return the layout of these names: "official", "hf" or "fla". Unknown names count as official."""
    for name in names:
        if name.startswith(("rwkv.embeddings.", "rwkv.blocks.0.pre_ln.", "rwkv.blocks.0.attention.")):
            return "hf"
        if name.startswith(("model.embeddings.", "model.layers.0.")):
            return "fla"
    return "official"


def to_hf(name: str) -> str:
    """Convert an official name to a Hugging Face name."""
    for official, hf in PREFIXES:
        if name.startswith(official):
            return hf + name[len(official) :]
    match = BLOCK.fullmatch(name)
    assert match and match[3] in TO_HF, name
    inner = TIME_MIX.sub(lambda letter: f"time_mix_{LETTERS.get(letter[1], letter[1])}", match[4])
    return f"rwkv.blocks.{match[2]}.{TO_HF[match[3]]}.{inner}"


def from_hf(name: str) -> str:
    """Convert a Hugging Face name to an official name; any other name is returned unchanged."""
    for official, hf in PREFIXES:
        if name.startswith(hf):
            return official + name[len(hf) :]
    match = BLOCK.fullmatch(name)
    if match is None or not match[1] or match[3] not in FROM_HF:
        return name
    letters = {word: letter for letter, word in LETTERS.items()}
    inner = TIME_MIX.sub(lambda word: f"time_mix_{letters.get(word[1], word[1])}", match[4])
    return f"blocks.{match[2]}.{FROM_HF[match[3]]}.{inner}"
