"""Resolve a name that the user gave to a local path, with a download from the Hugging Face hub if necessary.

    folder or file              used directly
    owner/name                  the folder of that repository, downloaded once and cached by huggingface_hub
    owner/name/file.pth         one file of it (official weights are published this way; also .safetensors, .gguf)

An existing path always has precedence, and nothing is downloaded for a name that looks like a path.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib.util import find_spec
from pathlib import Path

from fledge.core.errors import CheckpointError

PART = r"[A-Za-z0-9][\w.-]*"
REPOSITORY = re.compile(rf"({PART}/{PART})(?:/([\w./ -]+\.(?:pth|safetensors|gguf)))?")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".gguf")
DOWNLOADED = ("config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin")


def locate(name: str | os.PathLike[str]) -> Path:
    """Return the file or folder called `name`. Raises CheckpointError, with the most similar name, if there is none."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # too long, not allowed, or the home folder of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{os.fspath(name)!r:.80} cannot be looked up ({reason}); give another path") from error
    text = os.fspath(name)
    match = REPOSITORY.fullmatch(text) if isinstance(name, str) else None
    if match is None or (match[2] is None and text.endswith(SUFFIXES)) or Path(path.parts[0]).is_dir():
        raise CheckpointError(f"there is no {path}{_find_hint(path)}")
    return _download(match[1], match[2])


def _find_hint(path: Path) -> str:
    """Suggest a name, based on the deepest existing folder of the path."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        return f"; {folder.resolve()} exists, but the rest of the path does not"
    similar = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1)
    if similar:
        return f"; did you mean {folder / similar[0]}?"
    models = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIXES))
    return f"; that folder holds {', '.join(models[:3])}" if models else ""


def _download(repository: str, file: str | None) -> Path:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"there is no local {repository}, and huggingface_hub is not installed to download it; install it with "
            '`pip install "fledge[hub]"`, or give the path of a file'
        )
    import huggingface_hub

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # huggingface_hub raises its own errors and those of two network libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{repository} is not a local path and could not be downloaded from the hub ({reason:.200}); check the "
            "name and the network, or download the model and give its path"
        ) from error
