"""The native library: where it is, whether it can be used, and one handle on it.

`pip install` builds it from `native/` where a C++ compiler is present. Everything it does has a twin in Python, so its
absence is a fact to report and never an error. Here: finding and loading it. Not here: its functions, which each room
declares for itself.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from functools import lru_cache
from pathlib import Path

ABI = 6
"""What `fledge_abi()` of a library that fits this code answers."""

NAME = {"win32": "fledge_native.dll", "darwin": "libfledge_native.dylib"}.get(sys.platform, "libfledge_native.so")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None; `why_missing` says why."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


@lru_cache(maxsize=1)
def why_missing() -> str | None:
    """None where the library is there, else the reason and the next step."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    path = find()
    if path is None:
        return "the native library was not built; install a C++ compiler (g++ or clang++) and then Fledge again"
    try:
        loaded = ctypes.CDLL(os.fspath(path))
        loaded.fledge_abi.restype = ctypes.c_int
        abi = loaded.fledge_abi()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if abi != ABI:
        return f"{path.name} is from another version of Fledge (interface {abi}, needed {ABI}); install Fledge again"
    return loaded


def find() -> Path | None:
    """The library's file: in the package, built by `make native`, or where an editable installation has put it."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "_native" / NAME, package.parent / "build" / "native" / NAME):
        if path.is_file():
            return path
    try:
        files = importlib.metadata.files("fledge") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == NAME:
            path = Path(os.fspath(file.locate()))
            return path if path.is_file() else None
    return None
