"""Prompts: one text or token ids, or several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

Prompt = str | bytes | Sequence[int]
"""Text, its bytes, or token ids."""

Prompts = Sequence[str] | Sequence[bytes] | Sequence[Sequence[int]]
"""Several prompts."""


def split_prompts(prompt: Prompt | Prompts) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether the argument was a list of prompts.

    An empty list is one prompt without ids.
    """
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0
    if is_list and isinstance(prompt[0], str | bytes | Sequence):
        return cast("list[Prompt]", list(prompt)), True
    return [cast("Prompt", prompt)], False
