"""The official .pth: reading, mapping, and the error for every kind of invalid file."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import are_equal, make_tensors, save_pth

from fledge.checkpoint import load, verify
from fledge.checkpoint.formats import pth
from fledge.checkpoint.formats.pth import read_pth, write_pth
from fledge.core.errors import CheckpointError, UnsupportedError


def rewrite_archive(
    source: Path,
    target: Path,
    change: Callable[[str, bytes], bytes],
    method: Callable[[str], int] = lambda name: zipfile.ZIP_STORED,
) -> Path:
    """Rewrite an archive. `change` modifies each record, and `method` gives its compression."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            name = record.filename
            new.writestr(name, change(name, old.read(record)), compress_type=method(name))
    return target


class HostileObject:
    """An object that creates a file when unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"echo ran > '{self.victim}'",))


def test_a_real_checkpoint_is_mapped_not_copied(shared: Path) -> None:
    config, tensors = load(shared / "models/tiny-eagle/model.pth")
    assert (config.version, config.n_layer, config.n_embd, config.n_head, config.vocab_size) == ("5.2", 12, 64, 8, 256)
    assert config.dim_ffn == 256 and len(tensors) == 270
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors.values())


def test_a_written_file_is_read_exactly(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 in bfloat16")
    write_pth(tmp_path / "a.pth", tensors)
    loaded = read_pth(tmp_path / "a.pth")
    assert are_equal(tensors, loaded) and list(loaded) == list(tensors)
    write_pth(tmp_path / "b.pth", loaded)  # from the mapped file
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    storage = torch.arange(100_000.0)
    write_pth(tmp_path / "a.pth", {"part": storage[10:16].view(2, 3), "turned": storage[:6].view(2, 3).t()})
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    loaded = read_pth(tmp_path / "a.pth")
    assert torch.equal(loaded["part"], storage[10:16].view(2, 3))
    assert torch.equal(loaded["turned"], storage[:6].view(2, 3).t())


def test_names_are_read_onto_meta(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    loaded = read_pth(save_pth(tmp_path, tensors), weights=False)
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in loaded.items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in tensors.items()
    }


def test_names_are_read_even_if_the_file_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, torch_load = save_pth(tmp_path, make_tensors("5.2")), torch.load

    def load_without_mapping(*args: Any, mmap: bool, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 15 bytes: Cannot allocate memory (12)")
        return torch_load(*args, mmap=mmap, **options)

    monkeypatch.setattr(pth.torch, "load", load_without_mapping)
    assert len(read_pth(path, weights=False)) == len(make_tensors("5.2"))
    with pytest.raises(CheckpointError, match="needs more memory than this machine has"):
        read_pth(path)


def test_the_prefix_of_deepspeed_is_removed(tmp_path: Path) -> None:
    tensors = make_tensors("6.0")
    config, loaded = load(save_pth(tmp_path, {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}))
    assert config.version == "6.0" and are_equal(tensors, loaded)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("flip", [0, 0xFF])
@pytest.mark.parametrize("part", ["data/0", "data.pkl"])
def test_compressed_archives_are_rejected_before_reading(part: str, flip: int, method: int, tmp_path: Path) -> None:
    """A small archive can unpack to any size, and each method has its own exception for damage."""
    path = save_pth(tmp_path, {"a": torch.zeros(100_000)})
    packed = rewrite_archive(
        path, tmp_path / "packed.pth", lambda name, data: data, lambda name: method * (part in name)
    )
    with zipfile.ZipFile(packed) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith(part))
    content = bytearray(packed.read_bytes())
    content[record.header_offset + 30 + len(record.filename) + record.compress_size // 2] ^= flip
    packed.write_bytes(content)
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=r"packed\.pth is compressed.*refused"):
            read_pth(packed, weights=weights)


@pytest.mark.parametrize("weights", [True, False])
def test_tensors_that_share_memory_are_rejected(weights: bool, tmp_path: Path) -> None:
    """A file of kilobytes would become a model of gigabytes on the first change of dtype."""
    expanded, shared = torch.zeros(1).expand(6000, 6000), torch.zeros(100, 100)
    for tensors, needed in (({"a": expanded}, 144_000_000), ({str(i): shared for i in range(100)}, 4_000_000)):
        with pytest.raises(CheckpointError, match=f"tensors share memory: its tensors need {needed} bytes"):
            read_pth(save_pth(tmp_path, tensors), weights=weights)


def test_overlapping_records_count_only_once(tmp_path: Path) -> None:
    path = save_pth(tmp_path, {"a": torch.zeros(1000).expand(1000, 1000)})
    with zipfile.ZipFile(path, "a") as archive:
        record = archive.getinfo("model/data/0")
        for number in range(1, 1000):
            duplicate = copy.copy(record)
            duplicate.filename = f"model/data/{number}"
            archive.filelist.append(duplicate)
        archive.writestr("model/last", b"")  # makes zipfile write the list of records again
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=f"its tensors need 4000000 bytes, it holds {path.stat().st_size}"):
            read_pth(path, weights=weights)


def test_tensors_that_share_memory_are_written_separately(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    write_pth(tmp_path / "a.pth", {"emb": tensor, "head": tensor.view(2, 3)})
    assert are_equal({"emb": tensor, "head": tensor.view(2, 3)}, read_pth(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_rejected_and_nothing_runs(zipped: bool, protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    hostile = pickle.dumps({"emb.weight": HostileObject(victim)}, protocol=protocol)
    path = tmp_path / "evil.pth"
    if zipped:
        rewrite_archive(
            save_pth(tmp_path, make_tensors("4")),
            path,
            lambda name, data: hostile if name.endswith("data.pkl") else data,
        )
    else:
        path.write_bytes(hostile)
    for call in (load, lambda path: read_pth(path, weights=False)):
        with pytest.raises(CheckpointError) as raised:
            call(path)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)
        if zipped:
            assert "refused" in str(raised.value) and "nothing was run" in str(raised.value)
    assert not victim.exists()
    assert pickle.loads(hostile) and victim.exists()  # a plain unpickler runs these bytes


def test_truncated_files_are_rejected(tmp_path: Path) -> None:
    data = save_pth(tmp_path, make_tensors("5.2", n_layer=1)).read_bytes()
    path = tmp_path / "cut.pth"
    for length in (0, 3, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth .*(ownload|neither)"):
            load(path)


def test_a_damaged_list_of_names_is_rejected(tmp_path: Path) -> None:
    data = bytearray(save_pth(tmp_path, make_tensors("4", n_layer=1)).read_bytes())
    data[data.index(b"blocks.0.ln1")] ^= 0xFF
    path = tmp_path / "bad.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad.pth is truncated or damaged .*SHA-256"):
        load(path)


def test_a_flipped_byte_is_harmless_or_an_error(tmp_path: Path) -> None:
    data = save_pth(tmp_path, make_tensors("6.0", n_layer=1, n_embd=16)).read_bytes()
    path = tmp_path / "bad.pth"
    for position in range(0, len(data), len(data) // 150):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        for weights in (True, False):
            try:
                read_pth(path, weights=weights)
            except CheckpointError as error:
                assert str(path) in str(error)


def test_flipped_weights_are_found_by_verify(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    path = save_pth(tmp_path, tensors)
    assert verify(path).config.version == "5.2"
    data = bytearray(path.read_bytes())
    data[data.index(tensors["head.weight"].numpy().tobytes()) + 99] ^= 1
    bad = tmp_path / "bad.pth"
    bad.write_bytes(data)
    load(bad)  # load reads no weights, so it does not detect the damage
    with pytest.raises(CheckpointError, match=r"bad.pth is damaged: Bad CRC-32"):
        verify(bad)


def test_numbers_that_are_not_finite_are_found_by_verify(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    tensors["blocks.1.att.key.weight"][3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.key\.weight contains non-finite values"):
        verify(save_pth(tmp_path, tensors))


def test_pickle_protocol_3_is_read_and_4_is_rejected(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    torch.save(tensors, tmp_path / "three.pth", pickle_protocol=3)
    assert are_equal(tensors, read_pth(tmp_path / "three.pth"))
    torch.save(tensors, tmp_path / "four.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="its pickle has protocol 4"):
        read_pth(tmp_path / "four.pth")


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(make_tensors("5.2"), tmp_path / "plain.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert verify(tmp_path / "plain.pth").config.version == "5.2"


def test_a_record_shorter_than_its_tensor_is_rejected(tmp_path: Path) -> None:
    path = save_pth(tmp_path, {"a": torch.arange(10.0)})

    def lengthen(name: str, data: bytes) -> bytes:
        """Turn the 10 numbers of the only tensor into 20."""
        return data.replace(b"K\x0a", b"K\x14") if name.endswith("data.pkl") else data

    with pytest.raises(CheckpointError, match="its tensors need 80 bytes, it holds 40"):
        read_pth(rewrite_archive(path, tmp_path / "short.pth", lengthen))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "torch format from before 1.6.*torch.save"),
        (b"\x1f\x8b\x08\x00rest", "a compressed archive"),
        (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
        (b"just some text", "neither a .pth .* nor a .safetensors"),
    ],
)
def test_other_types_of_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize(("magic", "message"), [(b"fmgg\0\0\0\0", "an rwkv.cpp")])
def test_formats_of_other_programs_are_named(magic: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(magic + bytes(64))
    with pytest.raises(UnsupportedError, match=message):
        load(path)


def test_the_old_torch_format_is_recognized(tmp_path: Path) -> None:
    torch.save(make_tensors("4"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"bare pickle, the torch format from before 1.6"):
        load(tmp_path / "old.pth")


def test_other_zip_archives_are_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "docs.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        load(tmp_path / "docs.pth")
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
        archive.writestr("m/data.pkl", "x")
        archive.writestr("m/constants.pkl", "x")
    with pytest.raises(UnsupportedError, match="TorchScript"):
        load(tmp_path / "script.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, not a dict"),
        ({"state_dict": {"emb.weight": torch.zeros(2)}, "step": 3}, "may be its part 'state_dict'"),
        ({"emb.weight": 5}, "'emb.weight' is a int, not a dense tensor"),
        ({"_strategy": "cpu fp32", "emb.weight": torch.zeros(2)}, "rwkv package for the strategy 'cpu fp32'"),
        ({"conv.weight": torch.zeros(2, 2)}, "is not an RWKV checkpoint.*found 'conv.weight'"),
    ],
)
def test_contents_that_are_not_a_model_are_rejected(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "odd.pth")


def test_quantized_tensors_are_rejected(tmp_path: Path) -> None:
    tensors = make_tensors("4")
    tensors["emb.weight"] = tensors["emb.weight"].to(torch.int8)
    with pytest.raises(UnsupportedError, match=r"emb.weight has dtype int8"):
        load(save_pth(tmp_path, tensors))
