"""Find and load the native library, and report why it is missing.

`pip install` builds the library from `native/` if a C++ compiler is present. Everything it does has a reference
implementation in Python, so a missing library is reported but is never an error.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from functools import lru_cache
from pathlib import Path

ABI = 8
"""The value of `fledge_abi()` in a library that matches this code."""

NAME = {"win32": "fledge_native.dll", "darwin": "libfledge_native.dylib"}.get(sys.platform, "libfledge_native.so")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None; `why_missing` gives the reason."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


@lru_cache(maxsize=1)
def why_missing() -> str | None:
    """None if the library is present, else the reason and what to do."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    path = find_library()
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


def find_library() -> Path | None:
    """The library's file: in the package, built by `make native`, or installed by an editable installation."""
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
