"""Cleaning: named, pure functions from a text to a text, or to None where the document is not wanted.

A config lists them in the order in which they run: `clean = ["newlines", "nfc", {min_characters = 50}]`.
Transformations come first, or filters see what is not kept. Here: the steps. Not here: who counts what they drop.
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
    """A named step, ready to run."""

    name: str
    run: Cleaner


BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
SINGLE_BREAKS = "\r\x0b\x0c\x85\u2028\u2029"
LOW_CONTROLS = bytes(code for code in [*range(0x20), 0x7F] if code not in b"\t\n\x0b\x0c\r")
HIGH_UNWANTED = [chr(code) for code in range(0x80, 0xA0) if code != 0x85] + ["\ufeff", "\ufffe", "\uffff"]
GAPS = re.compile(r"\n{4,}")

LETTER, SPACE, OTHER = 0, 1, 2


def newlines(text: str) -> str:
    """Every kind of line break becomes a line feed."""
    return BREAKS.sub("\n", text) if any(mark in text for mark in SINGLE_BREAKS) else text


def nfc(text: str) -> str:
    """Unicode normal form C: one code point for a letter with its accent."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def control_characters(text: str) -> str:
    """Control characters and byte order marks go; tabs and line breaks of every kind stay."""
    data = text.encode(errors="surrogatepass")
    # Looking for single characters is many times as fast as the expression, and most texts have none of them.
    clean = len(data.translate(None, LOW_CONTROLS)) == len(data)
    if clean and (text.isascii() or not any(mark in text for mark in HIGH_UNWANTED)):
        return text
    return UNWANTED.sub("", text)


def edges(text: str) -> str:
    """No white space at line ends, no more than two blank lines together, none at the beginning or the end."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    if "\n\n\n\n" in text:
        text = GAPS.sub("\n\n\n", text)
    return text.strip("\n").rstrip()


def min_characters(text: str, limit: int) -> str | None:
    """Documents of fewer characters go."""
    return text if len(text) >= limit else None


def max_characters(text: str, limit: int) -> str | None:
    """Documents of more characters go."""
    return text if len(text) <= limit else None


def max_line_characters(text: str, limit: int) -> str | None:
    """Documents with a longer line go: minified code, tables of numbers."""
    return text if len(text) <= limit or max(map(len, text.split("\n"))) <= limit else None


def max_repeated_lines(text: str, share: float) -> str | None:
    """Documents go in which more of the text than this share is in lines that came before."""
    lines = [line for line in text.split("\n") if line.strip()]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return text
    repeated = sum(map(len, lines)) - sum(map(len, distinct))
    return text if repeated <= share * len(text) else None


def max_repeated_characters(text: str, share: float) -> str | None:
    """Documents go in which more characters than this share, spaces apart, equal the one before them."""
    codes = _codes(text)
    written = _classes()[codes] != SPACE
    repeated = np.count_nonzero((codes[1:] == codes[:-1]) & written[1:])
    return text if repeated <= share * np.count_nonzero(written) else None


def min_letters(text: str, share: float) -> str | None:
    """Documents go in which fewer characters than this share, spaces apart, are letters of any script."""
    classes = _classes()[_codes(text)]
    letters, others = np.count_nonzero(classes == LETTER), np.count_nonzero(classes == OTHER)
    return text if letters >= share * (letters + others) else None


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """The code points."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@lru_cache(maxsize=1)
def _classes() -> npt.NDArray[np.uint8]:
    """The class of each code point, in 1.1 MB. Marks count as letters: many scripts write vowels with them."""
    of_kind = np.full(128, OTHER, dtype=np.uint8)
    of_kind[[ord("L"), ord("M")]] = LETTER
    of_kind[ord("Z")] = SPACE
    kinds = "".join(map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))[::2]  # "L" of "Lu"
    classes = of_kind[np.frombuffer(kinds.encode(), dtype=np.uint8)]
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


def steps(chosen: Iterable[Any]) -> list[CleaningStep]:
    """The steps of a config. Raises ConfigError for a name that there is not, and for a limit that cannot be."""
    return [_step(one) for one in chosen]


def _step(chosen: Any) -> CleaningStep:
    if isinstance(chosen, str) and chosen in TRANSFORMATIONS:
        return CleaningStep(chosen, TRANSFORMATIONS[chosen])
    if isinstance(chosen, str) and chosen in FILTERS:
        raise ConfigError(f"the cleaning step {chosen} needs a limit: {{{chosen} = 0.5}} or the like")
    if isinstance(chosen, dict) and len(chosen) == 1:
        ((name, limit),) = chosen.items()
        if name in FILTERS:
            return CleaningStep(name, _limited(name, limit))
    known = ", ".join([*TRANSFORMATIONS, *(f"{{{name} = ...}}" for name in FILTERS)])
    raise ConfigError(f"cleaning step {chosen!r:.60} is unknown; steps: {known}")


def _limited(name: str, limit: Any) -> Cleaner:
    whole = name.endswith("_characters") and not name.startswith("max_repeated")
    if not (type(limit) is int or (type(limit) is float and not whole)) or limit < 0 or (not whole and limit > 1):
        kind = "a whole number of characters" if whole else "a share from 0 to 1"
        raise ConfigError(f"the limit of {name} is {limit!r:.60}; it must be {kind}")
    run = FILTERS[name]
    return lambda text: run(text, limit)
