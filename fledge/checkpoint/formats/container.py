"""Detect the format of a file from its first bytes, with a helpful error for each common mistake.

The file name is not used, because it may be wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

from fledge.core.errors import CheckpointError, UnsupportedError

# (first bytes, description, advice); the first match is reported.
MISTAKES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the model itself", "run `git lfs pull` or download it"),
    (rb"\s*<(!doctype|html)", "a web page, not a model", "use the download link instead of the page's address"),
    (rb"PK\x05\x06", "an empty zip archive", "download or export it again"),
    (rb"\x80[\x02-\x05]", "a bare pickle, the torch format from before 1.6",
     "load it once with a current torch (weights_only=True) and save it again with torch.save"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed archive", "unpack it first"),
)  # fmt: skip
UNSUPPORTED = ((b"fmgg", "an rwkv.cpp file, which is not supported"),)


def detect_container(path: Path) -> str:
    """Return "pth", "safetensors" or "gguf". Raises CheckpointError for others, with the type of the file if known."""
    start = _read_start(path)
    if start.startswith(b"PK\x03\x04"):
        if path.suffix == ".safetensors":  # torch itself uses this suffix to choose a reader
            raise CheckpointError(f"{path} is a zip archive of torch.save with the wrong suffix; rename it to .pth")
        return "pth"
    if start.startswith(b"GGUF"):
        return "gguf"
    for magic, description in UNSUPPORTED:
        if start.startswith(magic):
            raise UnsupportedError(f"{path} is {description}; give the official .pth or a .safetensors")
    for pattern, description, advice in MISTAKES:
        if re.match(pattern, start, re.IGNORECASE):
            raise CheckpointError(f"{path} is {description}; {advice}")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    raise CheckpointError(
        f"{path} is neither a .pth (a zip archive of torch.save) nor a .safetensors nor a .gguf file; it begins with "
        f"{start[:8].hex(' ')}"
    )


def _read_start(path: Path) -> bytes:
    """Return the first bytes of a file. Raises CheckpointError for an empty file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty; download or export it again")
    return start
