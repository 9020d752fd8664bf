"""State files: exact round trips, and errors for invalid files, wrong signatures and other weights."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fakes import ByteTokenizer, equal_states, random_finch
from native_library import needs_native
from random_checkpoints import random_checkpoint

from fledge.core.errors import StateError
from fledge.engine.generation import advance_state, make_initial_state
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load
from fledge.engine.states.state_file import (
    METADATA,
    SIGNATURE,
    StateMetadata,
    decode_state,
    encode_state,
    read_state,
    write_state,
)
from fledge.models.state import KIND, State

SECRET = b"x" * 32


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = ByteTokenizer("ab")
    return LLM(random_finch(tokenizer.vocab_size), tokenizer, "mine")


@pytest.fixture(scope="module")
def made(llm: LLM) -> tuple[State, StateMetadata]:
    state = advance_state(llm.model, [5, 6, 7], make_initial_state(llm.model))
    return state, StateMetadata.create(llm.identity, llm.name, llm.config, 3, template="world", title="\u597d")


def test_state_and_metadata_round_trip(made: tuple[State, StateMetadata], tmp_path: Path) -> None:
    write_state(tmp_path / "a.state", *made)
    state, metadata = read_state(tmp_path / "a.state")
    assert equal_states(state, made[0]) and metadata == made[1]
    assert equal_states(State.load(tmp_path / "a.state"), made[0])


def test_state_of_other_weights_is_rejected(llm: LLM, made: tuple[State, StateMetadata]) -> None:
    made[1].check(llm.identity, llm.name)
    model = random_finch(llm.tokenizer.vocab_size)
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 0.5
    other = LLM(model, llm.tokenizer, "other")
    with pytest.raises(StateError, match=r"made by mine \([0-9a-f]{12}\), not by other"):
        made[1].check(other.identity, other.name)
    assert replace(llm, weight_changes="00").identity != llm.identity, "adapters change the weights"


@needs_native
def test_rounding_while_loading_changes_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(random_checkpoint("6.0", n_layer=1, n_embd=64, head_size=32, vocab_size=256, dim_ffn=96), path)
    plain, packed, rounded = load(path, pack=False), load(path), load(path, quant="int8")
    assert plain.identity == packed.identity != rounded.identity
    assert load(path, quant="int8", pack=False).identity == rounded.identity != load(path, quant="int4").identity
    assert replace(plain, source="").identity == plain.identity
    with pytest.raises(StateError, match="m was made in memory and does not keep its original weights"):
        _ = replace(packed, source="").identity
    path.unlink()
    assert packed.identity == plain.identity, "the identity is computed once"


def test_changed_signed_state_is_rejected(made: tuple[State, StateMetadata]) -> None:
    data = encode_state(*made, SECRET)
    assert decode_state(data, SECRET)[1] == made[1]
    assert decode_state(data)[1] == made[1]
    for forged in (encode_state(*made), encode_state(*made, b"y" * 32), data[:-1] + bytes([data[-1] ^ 1])):
        with pytest.raises(StateError, match=r"not signed with|finite"):
            decode_state(forged, SECRET)
    metadata = replace(made[1], tokens=4)
    with pytest.raises(StateError, match="not signed with"):
        signature = safetensors_metadata(data)["fledge_signature"]
        decode_state(rewritten(made[0], {**header_of(metadata), "fledge_signature": signature}), SECRET)


def test_invalid_state_is_rejected_before_its_signature_is_checked(made: tuple[State, StateMetadata]) -> None:
    tensors, good = made[0].tensors(), header_of(made[1])
    shape = [0, 1 << 62, 1 << 62]  # no data, and more elements than torch can count
    header = json.dumps(
        {"__metadata__": good, "wkv": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    ).encode()
    hostile = {
        r"wkv is torch\.bfloat16": safetensors.torch.save({**tensors, "wkv": tensors["wkv"].bfloat16()}, good),
        r"wkv is torch\.float8": safetensors.torch.save(
            {**tensors, "wkv": tensors["wkv"].to(torch.float8_e4m3fn)}, good
        ),
        "not signed with": safetensors.torch.save(tensors, {**good, SIGNATURE: "\u00e9"}),
        "damaged": struct.pack("<Q", len(header)) + header,
    }
    for reason, content in hostile.items():
        with pytest.raises(StateError, match=reason):
            decode_state(content, SECRET)


def safetensors_metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return found


def header_of(metadata: StateMetadata) -> dict[str, str]:
    return {KIND: "WkvState", METADATA: json.dumps(vars(metadata))}


def twice(data: bytes) -> bytes:
    """The same file with two metadata entries in its header."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()[:-1] + b', "__metadata__": {}}'
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def rewritten(state: State, metadata: dict[str, str]) -> bytes:
    return safetensors.torch.save(state.tensors(), metadata)


def test_error_for_an_invalid_file_is_one_line(made: tuple[State, StateMetadata], tmp_path: Path) -> None:
    state, metadata = made
    data, tensors = encode_state(state, metadata), state.tensors()
    good = header_of(metadata)
    infinite = {**tensors, "wkv": torch.full_like(tensors["wkv"], float("inf"))}
    hostile = {
        "nothing": b"",
        "short": data[:40],
        "cut": data[:-9],
        "noise": b"\x00" * 200,
        "huge header": b"\xff" * 7 + b"\x00" + data[8:],
        "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5 + data,
        "no card": safetensors.torch.save(tensors),
        "no json": safetensors.torch.save(tensors, {**good, METADATA: "{"}),
        "other keys": safetensors.torch.save(tensors, {**good, METADATA: '{"identity": "x", "exec": 1}'}),
        "other kinds": safetensors.torch.save(
            tensors, {**good, METADATA: json.dumps({**vars(metadata), "tokens": "3"})}
        ),
        "a name twice": safetensors.torch.save(tensors, {**good, METADATA: '{"tokens": 1, ' + good[METADATA][1:]}),
        "half a character": safetensors.torch.save(
            tensors, {**good, METADATA: json.dumps({**vars(metadata), "title": "\ud800"})}
        ),
        "a huge count": safetensors.torch.save(
            tensors, {**good, METADATA: json.dumps({**vars(metadata), "tokens": 10**99})}
        ),
        "header keys": safetensors.torch.save(tensors, {**good, "more": ""}),
        "header twice": twice(data),
        "flat": safetensors.torch.save({**tensors, "wkv": tensors["wkv"].flatten(2)}, good),
        "layers": safetensors.torch.save({**tensors, "wkv": tensors["wkv"][:1]}, good),
        "texts": safetensors.torch.save({**tensors, "wkv": tensors["wkv"].repeat(1, 2, 1, 1, 1)}, good),
        "another class": safetensors.torch.save(tensors, {**good, KIND: "object"}),
        "lacking": safetensors.torch.save({"wkv": tensors["wkv"]}, good),
        "integers": safetensors.torch.save({**tensors, "wkv": tensors["wkv"].long()}, good),
        "infinite": safetensors.torch.save(infinite, good),
    }
    for name, content in hostile.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(StateError, match="x is not a valid state file: ") as caught:
            read_state(tmp_path / "x")
        assert "\n" not in str(caught.value), name
    with pytest.raises(StateError, match="cannot be read: No such file"):
        read_state(tmp_path / "missing")
