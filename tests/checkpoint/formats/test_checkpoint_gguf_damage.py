"""Damaged and hostile GGUF files load or raise a one-line error, without a crash or a huge allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_checkpoints import make_tensors

gguf = pytest.importorskip("gguf")

import foreign_gguf as foreign  # noqa: E402 - it needs the package

from fledge.checkpoint import read  # noqa: E402
from fledge.checkpoint.formats.gguf.header import read_header  # noqa: E402
from fledge.core.errors import CheckpointError, FledgeError  # noqa: E402
from fledge.tokenizer import byte_vocabulary  # noqa: E402

LARGE_NUMBERS = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with a tokenizer, texts, arrays, and tensors of four types."""
    tensors = make_tensors("6.0", n_layer=2, n_embd=32, head_size=16, vocab_size=256)
    keys = foreign.make_keys(tensors, 1) | foreign.make_world_keys(byte_vocabulary().tokens) | {"general.name": "small"}
    kinds = {
        "output.weight": gguf.GGMLQuantizationType.Q4_0,
        "blk.0.time_mix_key.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.1.time_mix_key.weight": gguf.GGMLQuantizationType.Q5_0,
        "blk.1.time_mix_output.weight": gguf.GGMLQuantizationType.Q8_0,
    }
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return foreign.write(path, foreign.convert_tensors(tensors, 1), keys, kinds=kinds)


def find_header_end(path: Path) -> int:
    return min(location.begin for location in read_header(path).locations.values())


def read_outcome(path: Path, data: bytes) -> str:
    """Return "loaded", or the message of a CheckpointError."""
    path.write_bytes(data)
    messages = []
    for weights in (False, True):
        try:
            checkpoint = read(path, weights=weights)
            assert not weights or len([values.sum() for values in checkpoint.dequantize().values()])
        except FledgeError as error:
            message = str(error)
            assert path.name in message and "\n" not in message and len(message) < 1500, message
            messages.append(message)
    return messages[-1] if messages else "loaded"


def read_all(path: Path, damaged: list[bytes]) -> list[str]:
    """Read every file; the memory of Python and numpy stays near the size of the file."""
    tracemalloc.start()
    outcomes = [read_outcome(path, data) for data in damaged]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20, f"{peak} bytes"
    return outcomes


def test_truncated_files_are_rejected(gguf_file: Path, tmp_path: Path) -> None:
    data, end = gguf_file.read_bytes(), find_header_end(gguf_file)
    rng = random.Random(1)
    cuts = [*range(4, 40), *rng.sample(range(40, end), 60), *rng.sample(range(end, len(data)), 20)]
    outcomes = read_all(tmp_path / "cut.gguf", [data[:cut] for cut in cuts])
    assert "loaded" not in outcomes and all("damaged" in outcome for outcome in outcomes)


def test_changed_bytes_are_harmless_or_an_error(gguf_file: Path, tmp_path: Path) -> None:
    data, end = gguf_file.read_bytes(), find_header_end(gguf_file)
    rng = random.Random(2)
    damaged = []
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(end)] = rng.randrange(256)
        damaged.append(bytes(changed))
    outcomes = read_all(tmp_path / "changed.gguf", damaged)
    assert 0 < outcomes.count("loaded") < len(outcomes)


def find_lengths(path: Path) -> list[tuple[int, str]]:
    """List the position and struct code of the lengths, counts, sizes, types and offsets in the header."""
    reader = gguf.GGUFReader(path)
    positions = [(4, "<I"), (8, "<Q"), (16, "<Q")]
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    for field in (*fields, *(info.field for info in reader.tensors)):
        offset = field.offset
        for part in field.parts[:9]:
            size = part.dtype.itemsize
            if size in (4, 8):
                positions += [(offset + begin, "<I" if size == 4 else "<Q") for begin in range(0, part.nbytes, size)]
            offset += part.nbytes
    return positions


def test_false_lengths_are_harmless_or_an_error(gguf_file: Path, tmp_path: Path) -> None:
    data = gguf_file.read_bytes()
    rng = random.Random(3)
    damaged = []
    for position, code in rng.choices(find_lengths(gguf_file), k=250):
        old = struct.unpack_from(code, data, position)[0]
        value = rng.choice((*LARGE_NUMBERS, old + 1, old - 1, 2 * old, old + 32)) % 2 ** (8 * struct.calcsize(code))
        changed = bytearray(data)
        struct.pack_into(code, changed, position, value)
        damaged.append(bytes(changed))
    outcomes = read_all(tmp_path / "false.gguf", damaged)
    assert outcomes.count("loaded") < len(outcomes) // 2


def encode_text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def make_header(keys: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, number, count) + keys + tensors + bytes(999)


def make_array_header(kind: int, count: int) -> bytes:
    """Create a header with one key, an array that claims this many items."""
    return make_header(encode_text("a") + struct.pack("<IIQ", 9, kind, count), 1)


def encode_tensor(*sizes: int, kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    return encode_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def make_tensor_header(*tensors: bytes) -> bytes:
    """Create a header with these tensors."""
    return make_header(ARCHITECTURE, 1, b"".join(tensors), len(tensors))


ARCHITECTURE = encode_text("general.architecture") + struct.pack("<I", 8) + encode_text("rwkv6")
BYTE_KEY = encode_text("a") + struct.pack("<IB", 0, 1)
ALIGNMENT = encode_text("general.alignment") + struct.pack("<I", 4)
HOSTILE_HEADERS: dict[str, tuple[bytes, str]] = {
    "many keys": (make_header(count=2**63), "claims 0 tensors and 9223372036854775808 keys"),
    "many tensors": (make_header(number=2**40), "claims 1099511627776 tensors"),
    "a long key": (make_header(struct.pack("<Q", 2**62), 1), "ends too early"),
    "a name of a kilobyte and more": (make_header(struct.pack("<Q", 1025) + bytes(2000), 1), "is not a valid name"),
    "many texts": (make_array_header(8, 2**50), "claims 1125899906842624 texts"),
    "texts past the end": (make_array_header(8, 2**20), "ends too early"),
    "many numbers": (make_array_header(4, 2**62), "ends too early"),
    "arrays of arrays": (make_array_header(9, 1), "array of the type 9"),
    "an unknown type": (make_header(encode_text("a") + struct.pack("<I", 77), 1), "unknown type 77"),
    "no UTF-8": (make_header(struct.pack("<Q", 2) + b"\xff\xfe", 1), "is not a valid name"),
    "a key twice": (make_header(BYTE_KEY * 2, 2), "'a' is repeated"),
    "alignment 3": (make_header(ARCHITECTURE + ALIGNMENT + struct.pack("<I", 3), 2), "not a power of two"),
    "alignment 0": (make_header(ARCHITECTURE + ALIGNMENT + struct.pack("<I", 0), 2), "not a power of two"),
    "100 axes": (make_tensor_header(encode_tensor(*[1] * 100)), "has 100 axes"),
    "no axes": (make_tensor_header(encode_tensor()), "has 0 axes"),
    "no size": (make_tensor_header(encode_tensor(0)), "impossible shape"),
    "a product that overflows": (make_tensor_header(encode_tensor(2**32, 2**32)), "impossible shape"),
    "half a block": (make_tensor_header(encode_tensor(33, kind=8)), "impossible shape"),
    "type 4000": (make_tensor_header(encode_tensor(32, kind=4000)), "type 4000 is unknown"),
    "between blocks": (make_tensor_header(encode_tensor(1, offset=8)), "multiple of 32"),
    "far away": (make_tensor_header(encode_tensor(1, offset=2**63)), "the file has"),
    "past the end": (make_tensor_header(encode_tensor(999)), "the file has"),
    "over another": (make_tensor_header(encode_tensor(8), encode_tensor(8, name="u")), "'t' and 'u' overlap"),
    "a tensor twice": (make_tensor_header(encode_tensor(8), encode_tensor(8)), "'t' is repeated"),
    "version 1": (make_header(version=1), "of version 1"),
    "big-endian": (make_header(version=3 << 24), "big-endian"),
    "nothing else": (b"GGUF", "ends too early"),
    "no architecture": (make_header(), "architecture None"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_headers_are_rejected(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE_HEADERS[name]
    (tmp_path / "h.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path / "h.gguf")
    assert "h.gguf" in str(raised.value) and "\n" not in str(raised.value)


def test_an_endless_header_is_rejected(tmp_path: Path) -> None:
    """Reading a header stops after a fixed number of bytes."""
    path = tmp_path / "endless.gguf"
    keys = encode_text("a") + struct.pack("<IIQ", 9, 0, 2**30)
    with open(path, "wb") as file:
        file.write(make_header(keys, 1))
        file.truncate(2**30 + 100)  # a hole
    with pytest.raises(CheckpointError, match=r"endless\.gguf is damaged: its header claims over 33554432 bytes"):
        read(path)


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t.reshape(-1), lambda t: t[None], lambda t: t.repeat(2, -1)]
)
@pytest.mark.parametrize("part", ["w1", "w2", "first", "lerp_fused", "decay", "decay_w1", "lerp_x", "ln", "key"])
def test_tensors_of_other_shapes_are_harmless_or_an_error(
    part: str, change: Callable[..., object], tmp_path: Path
) -> None:
    tensors = make_tensors("6.0", n_layer=2, n_embd=32, head_size=16)
    arrays = foreign.convert_tensors(tensors, 0)
    name = f"blk.1.time_mix_{part}.weight"
    try:
        arrays[name] = change(arrays[name])  # type: ignore[assignment]
        path = foreign.write(tmp_path / "m.gguf", arrays, foreign.make_keys(tensors, 0), kind=foreign.F32)
    except ValueError:
        pytest.skip("the package refuses to write it")
    try:
        loaded = read(path)
        assert torch.equal(loaded.tensors["head.weight"], tensors["head.weight"])
    except CheckpointError as error:
        assert "m.gguf" in str(error)
