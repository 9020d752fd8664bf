"""Language identification with the package py3langid: offline, numpy only, 97 languages."""

from __future__ import annotations

from fledge.core.errors import UsageError


class LanguageIdentifier:
    """Returns the language code of a text, such as "de". Not thread-safe."""

    def __init__(self, characters: int) -> None:
        """characters: the number of characters to examine. Raises UsageError if py3langid is not installed."""
        try:
            from py3langid import langid
        except ImportError:
            raise UsageError(
                'identifying languages needs the package py3langid: pip install "fledge[data]", '
                "or identify = false under [languages]"
            ) from None
        self._classify = langid.classify
        self.characters = characters

    def __call__(self, text: str) -> str:
        """The most likely language; "" for a text without letters."""
        beginning = text[: self.characters]
        if not any(map(str.isalpha, beginning)):
            return ""
        return str(self._classify(beginning)[0])
