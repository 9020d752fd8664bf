"""Atomic writes, readable disk errors, hashes and standard folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LIBRARY_MESSAGES = ("requested and", "unexpected pos", "PytorchStreamWriter failed")
"""Parts of the errors that numpy and torch raise if the disk is full."""


@contextmanager
def add_path_to_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a disk-full error within the block into an OSError with an errno and the name of `target`.

    Otherwise the system's error has no file name after a write to an open file, numpy's has no errno, and torch raises
    a RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and any(message in str(error) for message in LIBRARY_MESSAGES):
            number = errno.ENOSPC
        if number not in DISK_FULL or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(target)) from error


def describe_disk_error(error: OSError, path: Path, saved: str = "") -> str:
    """Describe an error of writing to `path` in a sentence: the file, the free space, and what to do.

    saved: what is not lost if the user runs the same command again.
    """
    retry = f"run the same command again{f': {saved}' if saved else ''}"
    if error.errno not in DISK_FULL:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}; {retry}"
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    reason = "" if error.errno == errno.ENOSPC else f"; {error.strerror}"
    name = f", {error.filename} cannot be written" if error.filename else ""
    return f"the disk of {path} is full ({free:.1f} GB are free{reason}){name}; free some space and {retry}"


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `target`; it replaces `target` if the block succeeds, else it is removed.

    A reader therefore sees the old file or the new one, never a part. A full disk raises the error that
    `add_path_to_errors` describes.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with add_path_to_errors(target):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        # mkstemp makes files private to the user; the result gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_or_create_secret(path: Path, content: bytes) -> bytes:
    """Read a file that only its user may read, after creating it with `content` if it is missing.

    If several processes call this at the same time, one creates the file and all return its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)  # with mode 0600
        try:
            with open(handle, "wb") as file, add_path_to_errors(path):
                file.write(content)
                file.flush()
                os.fsync(handle)
            _link_or_create(Path(name), path, content)
        finally:
            os.unlink(name)
    for _ in range(100):
        if secret := path.read_bytes():
            return secret
        time.sleep(0.01)  # created a moment ago by the fallback of `_link_or_create`, and still empty
    return b""


def _link_or_create(temporary: Path, target: Path, content: bytes) -> None:
    """Give a file its final name, unless that exists."""
    with suppress(FileExistsError):
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: the file appears before its content
            with open(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented for diffs."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_name(name: str) -> bytes:
    """Return the SHA-256 that stands for a name on disk: the name may be a secret and have any characters."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def get_asset_path(name: str) -> Path:
    """Return the path of a file that ships inside the package (the World vocabulary, the bundled model)."""
    return Path(__file__).resolve().parent.parent / "assets" / name


def get_cache_folder() -> Path:
    """Return this user's folder for files that Fledge can create again. The folder itself is not created."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if not base:
        base = os.path.join("~", *(("Library", "Caches") if sys.platform == "darwin" else (".cache",)))
    return Path(os.path.expanduser(base)) / "fledge"
