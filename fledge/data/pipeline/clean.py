"""Cleaning steps: named, pure functions that return a text, or None to drop the document.

A config lists them in the order in which they run: `clean = ["newlines", "nfc", {min_characters = 50}]`.
List transformations before filters, so that the filters see the final text.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fledge.core.errors import ConfigError

Cleaner = Callable[[str], "str | None"]


class CleaningStep(NamedTuple):
    """A cleaning step with its name."""

    name: str
    run: Cleaner


LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
SINGLE_BREAKS = "\r\x0b\x0c\x85\u2028\u2029"
LOW_CONTROLS = bytes(code for code in [*range(0x20), 0x7F] if code not in b"\t\n\x0b\x0c\r")
HIGH_CONTROLS = [chr(code) for code in range(0x80, 0xA0) if code != 0x85] + ["\ufeff", "\ufffe", "\uffff"]
BLANK_LINES = re.compile(r"\n{4,}")

LETTER, SPACE, OTHER = 0, 1, 2


def newlines(text: str) -> str:
    """Replace every kind of line break by a line feed."""
    return LINE_BREAKS.sub("\n", text) if any(mark in text for mark in SINGLE_BREAKS) else text


def nfc(text: str) -> str:
    """Convert to Unicode normal form C: one code point for a letter with its accent."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def control_characters(text: str) -> str:
    """Remove control characters and byte order marks. Keep tabs and every kind of line break."""
    data = text.encode(errors="surrogatepass")
    # Testing for single characters is much faster than the regular expression, and most texts have none of them.
    has_no_low = len(data.translate(None, LOW_CONTROLS)) == len(data)
    if has_no_low and (text.isascii() or not any(mark in text for mark in HIGH_CONTROLS)):
        return text
    return CONTROL_CHARACTERS.sub("", text)


def edges(text: str) -> str:
    """Remove white space at line ends, and blank lines at both ends. Keep at most two blank lines in a row."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    if "\n\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n").rstrip()


def min_characters(text: str, limit: int) -> str | None:
    """Drop documents with fewer characters."""
    return text if len(text) >= limit else None


def max_characters(text: str, limit: int) -> str | None:
    """Drop documents with more characters."""
    return text if len(text) <= limit else None


def max_line_characters(text: str, limit: int) -> str | None:
    """Drop documents with a longer line, such as minified code and tables of numbers."""
    return text if len(text) <= limit or max(map(len, text.split("\n"))) <= limit else None


def max_repeated_lines(text: str, share: float) -> str | None:
    """Drop documents if more than this share of the text is in repeated lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return text
    repeated = sum(map(len, lines)) - sum(map(len, distinct))
    return text if repeated <= share * len(text) else None


def max_repeated_characters(text: str, share: float) -> str | None:
    """Drop documents if more than this share of the non-space characters repeat the previous character."""
    codes = _get_code_points(text)
    is_visible = _classify_characters()[codes] != SPACE
    repeated = np.count_nonzero((codes[1:] == codes[:-1]) & is_visible[1:])
    return text if repeated <= share * np.count_nonzero(is_visible) else None


def min_letters(text: str, share: float) -> str | None:
    """Drop documents if less than this share of the non-space characters are letters of any script."""
    classes = _classify_characters()[_get_code_points(text)]
    letters, others = np.count_nonzero(classes == LETTER), np.count_nonzero(classes == OTHER)
    return text if letters >= share * (letters + others) else None


def _get_code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@lru_cache(maxsize=1)
def _classify_characters() -> npt.NDArray[np.uint8]:
    """The class of each code point, 1.1 MB. Marks count as letters, because many scripts write vowels as marks."""
    by_category = np.full(128, OTHER, dtype=np.uint8)
    by_category[[ord("L"), ord("M")]] = LETTER
    by_category[ord("Z")] = SPACE
    categories = "".join(map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))[::2]  # "L" from "Lu"
    classes = by_category[np.frombuffer(categories.encode(), dtype=np.uint8)]
    classes[[ord(space) for space in "\t\n\r"]] = SPACE
    return classes


TRANSFORMATIONS: dict[str, Cleaner] = {
    function.__name__: function for function in (newlines, nfc, control_characters, edges)
}
FILTERS: dict[str, Callable[[str, Any], str | None]] = {
    function.__name__: function
    for function in (
        *(min_characters, max_characters, max_line_characters),
        *(max_repeated_lines, max_repeated_characters, min_letters),
    )
}


def make_steps(settings: Iterable[Any]) -> list[CleaningStep]:
    """The steps of a config. Raises ConfigError for an unknown step and an invalid limit."""
    return [_make_step(setting) for setting in settings]


def _make_step(setting: Any) -> CleaningStep:
    if isinstance(setting, str) and setting in TRANSFORMATIONS:
        return CleaningStep(setting, TRANSFORMATIONS[setting])
    if isinstance(setting, str) and setting in FILTERS:
        raise ConfigError(f"the cleaning step {setting} needs a limit, such as {{{setting} = 0.5}}")
    if isinstance(setting, dict) and len(setting) == 1:
        ((name, limit),) = setting.items()
        if name in FILTERS:
            return CleaningStep(name, _make_filter(name, limit))
    available = ", ".join([*TRANSFORMATIONS, *(f"{{{name} = ...}}" for name in FILTERS)])
    raise ConfigError(f"cleaning step {setting!r:.60} is unknown; steps: {available}")


def _make_filter(name: str, limit: Any) -> Cleaner:
    is_count = name.endswith("_characters") and not name.startswith("max_repeated")
    if not (type(limit) is int or (type(limit) is float and not is_count)) or limit < 0 or (not is_count and limit > 1):
        kind = "a whole number of characters" if is_count else "a share from 0 to 1"
        raise ConfigError(f"the limit of {name} is {limit!r:.60}; it must be {kind}")
    run = FILTERS[name]
    return lambda text: run(text, limit)
