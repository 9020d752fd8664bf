"""What a file is, by its first bytes: the name of a file proves nothing.

Here: magic numbers, and an error with the next step for each kind of file people give by mistake.
Not here: reading the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from fledge.core.errors import CheckpointError, UnsupportedError

# (first bytes, what the file is, what to do); the first that fits is reported.
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
    """ "pth", "safetensors" or "gguf". Raises CheckpointError for anything else, saying what it is where known."""
    start = _start(path)
    if start.startswith(b"PK\x03\x04"):
        if path.suffix == ".safetensors":  # torch itself goes by this suffix
            raise CheckpointError(f"{path} is a zip archive of torch.save with the wrong suffix; rename it to .pth")
        return "pth"
    if start.startswith(b"GGUF"):
        return "gguf"
    for magic, what in UNSUPPORTED:
        if start.startswith(magic):
            raise UnsupportedError(f"{path} is {what}; give the official .pth or a .safetensors")
    for pattern, what, then in MISTAKES:
        if re.match(pattern, start, re.IGNORECASE):
            raise CheckpointError(f"{path} is {what}; {then}")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    raise CheckpointError(
        f"{path} is neither a .pth (a zip archive of torch.save) nor a .safetensors nor a .gguf file; it begins with "
        f"{start[:8].hex(' ')}"
    )


def _start(path: Path) -> bytes:
    """The first bytes of a file that has some."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty; download or export it again")
    return start
