"""Read and write the official `.pth`: a zip archive with a pickled dict of names, and one record of bytes per tensor.

The pickle is read only by torch's restricted unpickler (`weights_only=True`), which accepts tensors and refuses
everything else before it runs. Weights are mapped, not copied. Records must be uncompressed, as torch.save writes them:
a compressed record can unpack to any size. The old torch format (before 1.6, one bare pickle) is refused, with advice
on how to convert it.
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

MAX_PICKLE_BYTES = 64 << 20  # the largest real one, of Finch 14B, is below half a megabyte
DOWNLOAD_AGAIN = "Download or copy it again and compare its size and SHA-256 with the source's"
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)  # of a damaged archive
REFUSED_NAME = re.compile(r"(?:GLOBAL|global) '?([\w.]+)")


def read_pth(path: Path, *, weights: bool = True) -> dict[str, Tensor]:
    """Return name -> tensor, in the order and the dtypes of the file.

    With `weights` the tensors are views of the mapped file, private to this process; without, they are on "meta" and
    only the list of names is read. Raises CheckpointError if the file is damaged, contains code, holds no tensors, or
    holds fewer bytes than its tensors need.
    """
    data_bytes = _check_archive(path)
    tensors = _check_tensors(_torch_load(path, "cpu" if weights else "meta"), path)
    # Tensors, not storages: with strides of 0 a tensor is larger than its storage, and so is its copy in another dtype.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > data_bytes:
        raise CheckpointError(
            f"{path} is damaged or its tensors share memory: its tensors need {needed} bytes, it "
            f"holds {data_bytes}. {DOWNLOAD_AGAIN}"
        )
    return tensors


def write_pth(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write name -> tensor atomically as an official `.pth`, with the same order and dtypes."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # A file object, because torch would write the name of a temporary path into the archive.
        torch.save({name: _copy_to_own_storage(tensor) for name, tensor in tensors.items()}, file)


def verify_checksums(path: Path) -> None:
    """Compare every record with its CRC-32 in the archive, which mapping the file does not do. Reads all bytes.

    torch can be configured to write no checksums; they are then 0, and such records are accepted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:
                    with archive.open(record) as stream:
                        while stream.read(1 << 22):
                            pass
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{path} is damaged: {_get_first_line(error)}. {DOWNLOAD_AGAIN}") from error


def _check_archive(path: Path) -> int:
    """Return the number of tensor bytes in the archive. Raises CheckpointError unless it can be read safely."""
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
            if lists[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: its list of tensors takes {lists[0].file_size} bytes, which no checkpoint needs; refused"
                )
            with archive.open(lists[0]) as stream:
                protocol = stream.read(2)
                if lists[0].CRC:
                    stream.read()  # to the end, where zipfile verifies the checksum
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{path} is truncated or damaged ({_get_first_line(error)}). {DOWNLOAD_AGAIN}") from error
    if protocol[:1] == b"\x80" and protocol[1:] > b"\x03":
        raise CheckpointError(
            f"{path} was refused: its pickle has protocol {protocol[1]}, which torch cannot read without running it; "
            "nothing was run. Get the model saved with protocol 2, the default of torch.save"
        )
    # The sizes in the archive may be false; the length of the file is not.
    return min(sum(record.file_size for record in records if "/data/" in record.filename), path.stat().st_size)


def _torch_load(path: Path, device: str, *, mapped: bool = True) -> Any:
    """Call torch.load such that it cannot run code, with readable errors."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # protocol 3 is read like 2
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _make_refusal(path, str(error)) from None
    except Exception as error:  # a damaged pickle can cause any error
        if mapped and "Cannot allocate memory" in str(error):
            return _load_without_mapping(path, device, error)
        raise CheckpointError(f"{path} is damaged ({_get_first_line(error)}). {DOWNLOAD_AGAIN}") from error


def _load_without_mapping(path: Path, device: str, error: Exception) -> Any:
    """Read only the names: Linux does not map a file that is larger than RAM and swap together for writing."""
    if device != "meta":
        raise CheckpointError(
            f"{path} needs more memory than this machine has ({path.stat().st_size / 1e9:.1f} GB of weights); use a "
            "smaller model or a larger machine"
        ) from error
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, rarely needed

    # The documented method of torch to read names without data. Its tensors are valid only inside the mode.
    with FakeTensorMode():
        fakes = _check_tensors(_torch_load(path, device, mapped=False), path)
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in fakes.items()}


def _make_refusal(path: Path, message: str) -> CheckpointError:
    match = REFUSED_NAME.search(message)
    if match is None:
        return CheckpointError(
            f"{path} was refused: its pickle is damaged or holds something other than tensors; nothing was "
            f"run. {DOWNLOAD_AGAIN}"
        )
    return CheckpointError(
        f"{path} was refused: its pickle requires {match[1]}, which is code and not weights; nothing was run. Get "
        "the model as .safetensors, or as a plain dict of tensors"
    )


def _check_tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """Return a dict of dense tensors. Raises CheckpointError, with a description, if the value is anything else."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a dict of tensors; export the state dict")
    if "_strategy" in value:
        raise UnsupportedError(
            f"{path} was converted in advance by the rwkv package for the strategy {value['_strategy']!r:.40}; give "
            "the original .pth instead"
        )
    if value.keys() >= {"step", "identity", "optimizer"}:
        raise CheckpointError(
            f"{path} is the checkpoint from which `fledge train` or `fledge tune` resumes with the same command, not "
            "its result; give the model, adapter or state (.safetensors) that the run writes beside it at its end"
        )
    for name, item in value.items():
        if isinstance(item, dict) and item:
            raise CheckpointError(
                f"{path} holds more than a model; the model may be its part {name!r:.40}: save that dict on its own"
            )
        if not isinstance(name, str) or not isinstance(item, Tensor) or item.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name!r:.60} is a {type(item).__name__}, not a dense tensor with a name; export the state "
                "dict"
            )
    return {name: item.detach() for name, item in value.items()}


def _copy_to_own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor with a storage that holds nothing else.

    torch.save writes the whole storage of a view, and a shared storage once.
    """
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + size]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _get_first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text.splitlines()[0][:160])
