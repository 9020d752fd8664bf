"""Names of the Hugging Face remote-code layout (`rwkv`, `rwkv5`, `rwkv6`) and back, and which layout a dict is in.

Values and shapes are the same as in official files; only names differ. transformers' own RWKV-4 class uses the names
of the v5 code. Here: data and tiny functions. The layout of flash-linear-attention is in fla_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "_forward_module."  # DeepSpeed puts it before every name
LETTERS = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}  # time_mix_k is time_mix_key there
PARTS = (  # official, Hugging Face; each a leading part of a name
    ("emb.", "rwkv.embeddings."),
    ("ln_out.", "rwkv.ln_out."),
    ("head.", "head."),
    ("blocks.0.ln0.", "rwkv.blocks.0.pre_ln."),
)
ROOMS = (("att", "attention"), ("ffn", "feed_forward"), ("ln1", "ln1"), ("ln2", "ln2"))
TO_HF = dict(ROOMS)
FROM_HF = {theirs: ours for ours, theirs in ROOMS}
TIME_MIX = re.compile(r"time_mix_(\w+)")
BLOCK = re.compile(r"(rwkv\.)?blocks\.(\d+)\.(\w+)\.(.+)")


def detect_layout(names: Iterable[str]) -> str:
    """ "official", "hf" or "fla": whose names these are. Names of nobody count as official, and are refused later."""
    for name in names:
        if name.startswith(("rwkv.embeddings.", "rwkv.blocks.0.pre_ln.", "rwkv.blocks.0.attention.")):
            return "hf"
        if name.startswith(("model.embeddings.", "model.layers.0.")):
            return "fla"
    return "official"


def to_hf(name: str) -> str:
    """Official name -> Hugging Face name."""
    for ours, theirs in PARTS:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    match = BLOCK.fullmatch(name)
    assert match and match[3] in TO_HF, name
    inner = TIME_MIX.sub(lambda found: f"time_mix_{LETTERS.get(found[1], found[1])}", match[4])
    return f"rwkv.blocks.{match[2]}.{TO_HF[match[3]]}.{inner}"


def from_hf(name: str) -> str:
    """Hugging Face name -> official name; a name that is neither is given back as it is."""
    for ours, theirs in PARTS:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    match = BLOCK.fullmatch(name)
    if match is None or not match[1] or match[3] not in FROM_HF:
        return name
    letters = {word: letter for letter, word in LETTERS.items()}
    inner = TIME_MIX.sub(lambda found: f"time_mix_{letters.get(found[1], found[1])}", match[4])
    return f"blocks.{match[2]}.{FROM_HF[match[3]]}.{inner}"
