"""Files written whole or not at all, hashed, and found again."""

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

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNNUMBERED = ("requested and", "unexpected pos", "PytorchStreamWriter failed")  # in what numpy and torch raise instead


@contextmanager
def add_path_to_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Around writing `target`: an error for want of room is an OSError with a number and a file's name.

    The system's own has no name where an open file is written to; numpy's has no number; torch's is a RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and any(words in str(error) for words in UNNUMBERED):
            number = errno.ENOSPC
        if number not in FULL or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(target)) from error


def describe_disk_error(error: OSError, where: Path, kept: str = "") -> str:
    """An error of writing in or to `where`, as a sentence: which file, how much room there is, what to do.

    kept: what is not lost, said to who gives the same command again.
    """
    again = f"give the same command again{f': {kept}' if kept else ''}"
    if error.errno not in FULL:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}; {again}"
    there = next(place for place in (where, *where.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    reason = "" if error.errno == errno.ENOSPC else f"; {error.strerror}"
    name = f", {error.filename} cannot be written" if error.filename else ""
    return f"the disk of {where} is full ({free:.1f} GB are free{reason}){name}; make room and {again}"


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it when the block ends well, and vanishes when it does not.

    A reader therefore sees the old file or the new one, never half of one. Where the disk is full, the error is as
    `add_path_to_errors` has it.
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
        # mkstemp makes files private to the user; a result should have the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_or_create_secret(path: Path, content: bytes) -> bytes:
    """What a file holds that its user alone may read; it is made of `content` where it is not there yet.

    Of many processes that come at once one makes it, and all get what that one wrote.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)  # with mode 0600
        try:
            with open(handle, "wb") as file, add_path_to_errors(path):
                file.write(content)
                file.flush()
                os.fsync(handle)
            _placed(Path(name), path, content)
        finally:
            os.unlink(name)
    for _ in range(100):
        if found := path.read_bytes():
            return found
        time.sleep(0.01)  # made just now by the second way of `_placed`
    return b""


def _placed(temporary: Path, target: Path, content: bytes) -> None:
    """Give a file its name, unless somebody else has it."""
    with suppress(FileExistsError):
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a disk without links: a name that is taken before its content is there
            with open(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(content)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, indented for diffs."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_name(name: str) -> bytes:
    """What stands on the disk for a name that may be a secret, whatever characters are in it."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def get_asset_path(name: str) -> Path:
    """Path of a file that ships inside the package (the World vocabulary, the bundled model)."""
    return Path(__file__).resolve().parent.parent / "assets" / name


def get_cache_folder() -> Path:
    """Where Fledge keeps what it could make again, for this user. Not made here."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if not base:
        base = os.path.join("~", *(("Library", "Caches") if sys.platform == "darwin" else (".cache",)))
    return Path(os.path.expanduser(base)) / "fledge"
