"""Helpers for tests of the native library: the instruction sets to test, and the reason to skip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fledge.kernels import native_ops
from fledge.native.library import why_missing

INSTRUCTION_SETS = native_ops.instruction_sets() or ["none"]

needs_native = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
every_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)


@contextmanager
def use_instruction_set(instruction_set: str) -> Iterator[None]:
    """Run the block with one instruction set."""
    native_ops.choose_instruction_set(instruction_set)
    try:
        yield
    finally:
        native_ops.choose_instruction_set()
