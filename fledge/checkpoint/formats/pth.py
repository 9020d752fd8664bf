"""The official `.pth`: a zip archive with a pickled dict of names and one record of raw bytes a tensor.

The pickle is only ever read by torch's restricted unpickler (`weights_only=True`), which knows tensors and refuses
everything else before it runs; weights are mapped, not copied. Records must be stored as they are, which torch.save
always does: a compressed one can unpack to any size. Here: bytes to dict and back. Not here: what the names mean. The
old torch format (before 1.6, one bare pickle) is refused with the way to convert it.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.core.errors import CheckpointError, UnsupportedError
from fledge.core.files import atomic_path

LARGEST_PICKLE = 64 << 20  # bytes; the largest real one, of Finch 14B, is below half a megabyte
AGAIN = "Download or copy it again and compare its size and SHA-256 with the source's"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)  # what zipfile stumbles with
REFUSED_NAME = re.compile(r"(?:GLOBAL|global) '?([\w.]+)")


def read_pth(path: Path, *, weights: bool = True) -> dict[str, Tensor]:
    """Name -> tensor, in file order and the file's dtypes.

    With `weights` the tensors are views of the mapped file, private to this process; without, they are on "meta" and
    only the list of names is read. Raises CheckpointError for a file that is damaged, runs code, holds no tensors or
    fewer bytes than its tensors have together.
    """
    held = _examine(path)
    tensors = _tensors_of(_torch_load(path, "cpu" if weights else "meta"), path)
    # Not the storages: strides of 0 make a large tensor of a small storage, and a copy in another dtype has its size.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > held:
        raise CheckpointError(
            f"{path} is damaged or its tensors share memory: its tensors need {needed} bytes, it holds {held}. {AGAIN}"
        )
    return tensors


def write_pth(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write name -> tensor as an official `.pth`, whole or not at all, in the order and dtypes given."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # A file object, not a path: torch would put the temporary name into the archive.
        torch.save({name: _own_storage(tensor) for name, tensor in tensors.items()}, file)


def verify_checksums(path: Path) -> None:
    """Compare every record with the CRC-32 the archive keeps of it, which reading by map does not. Reads all bytes.

    torch can be told to write no sums (they are 0 then); such records pass.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:
                    with archive.open(record) as stream:
                        while stream.read(1 << 22):
                            pass
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}. {AGAIN}") from error


def _examine(path: Path) -> int:
    """The bytes of tensor data in an archive that can be read safely; CheckpointError for any other."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename.rpartition("/")[2] for record in records}
            lists = [record for record in records if record.filename.endswith("/data.pkl")]
            if "constants.pkl" in names:
                raise UnsupportedError(f"{path} is a TorchScript program, not a checkpoint; give the original .pth")
            if len(lists) != 1:
                raise CheckpointError(
                    f"{path} is a zip archive, but not one that torch.save wrote (it has no data.pkl); unpack it, the "
                    "checkpoint may be inside"
                )
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError(
                    f"{path} is compressed, which torch.save never does, and could unpack to any size; refused. Get "
                    "the original, or load and save it with torch if you trust it"
                )
            if lists[0].file_size > LARGEST_PICKLE:
                raise CheckpointError(
                    f"{path}: its list of tensors takes {lists[0].file_size} bytes, which no checkpoint needs; refused"
                )
            with archive.open(lists[0]) as stream:
                protocol = stream.read(2)
                if lists[0].CRC:
                    stream.read()  # to the end, where zipfile compares the checksum
    except DAMAGE as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_first_line(error)}). {AGAIN}") from error
    if protocol[:1] == b"\x80" and protocol[1:] > b"\x03":
        raise CheckpointError(
            f"{path} was refused: its pickle has protocol {protocol[1]}, which torch cannot read without running it; "
            "nothing was run. Ask for the model saved with torch.save's own protocol 2"
        )
    # The archive's own list of sizes may lie; the length of the file cannot.
    return min(sum(record.file_size for record in records if "/data/" in record.filename), path.stat().st_size)


def _torch_load(path: Path, device: str, *, mapped: bool = True) -> Any:
    """torch.load without the power to run anything, with errors for people."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # 3 is read as well as 2
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # a damaged pickle can make the unpickler stumble in any way
        if mapped and "Cannot allocate memory" in str(error):
            return _without_map(path, device, error)
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}). {AGAIN}") from error


def _without_map(path: Path, device: str, error: Exception) -> Any:
    """Linux maps no file larger than RAM and swap together for writing; the names can be read all the same."""
    if device != "meta":
        raise CheckpointError(
            f"{path} needs more memory than this machine has ({path.stat().st_size / 1e9:.1f} GB of weights); use a "
            "smaller model or a larger machine"
        ) from error
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, rarely needed

    # torch's documented way to see names without data; its tensors only live inside the mode.
    with FakeTensorMode():
        found = _tensors_of(_torch_load(path, device, mapped=False), path)
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in found.items()}


def _refusal(path: Path, message: str) -> CheckpointError:
    found = REFUSED_NAME.search(message)
    if found is None:
        return CheckpointError(
            f"{path} was refused: its pickle is damaged or holds something other than tensors; nothing was run. {AGAIN}"
        )
    return CheckpointError(
        f"{path} was refused: its pickle asks for {found[1]}, which is code and not weights; nothing was run. Ask for "
        "the model as .safetensors, or as a plain dict of tensors"
    )


def _tensors_of(found: Any, path: Path) -> dict[str, Tensor]:
    """The dict of plain tensors that a checkpoint must be; says what else it was."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a dict of tensors; export the state dict")
    if "_strategy" in found:
        raise UnsupportedError(
            f"{path} was converted in advance by the rwkv package for the strategy {found['_strategy']!r:.40}; give "
            "the original .pth instead"
        )
    if found.keys() >= {"step", "identity", "optimizer"}:
        raise CheckpointError(
            f"{path} is what a run of `fledge train` or `fledge tune` goes on from, by the command that began it, not "
            "its result; give the model, adapter or state (.safetensors) that it leaves beside this when it ends"
        )
    for name, value in found.items():
        if isinstance(value, dict) and value:
            raise CheckpointError(
                f"{path} holds more than a model; the model may be its part {name!r:.40}: save that dict on its own"
            )
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name!r:.60} is a {type(value).__name__}, not a dense tensor with a name; export the state "
                "dict"
            )
    return {name: value.detach() for name, value in found.items()}


def _own_storage(tensor: Tensor) -> Tensor:
    """The same values as the only contents of a storage of their own.

    torch.save writes a view's whole storage, however large, and one storage for tensors that share it.
    """
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + size]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text.splitlines()[0][:160])
