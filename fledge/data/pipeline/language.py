"""Which language a text is in, by the package py3langid: offline, numpy only, 97 languages.

Only for documents that do not say it themselves, and on their beginning only. Not here: deciding which documents those
are.
"""

from __future__ import annotations

from fledge.core.errors import UsageError


class LanguageIdentifier:
    """Texts to language codes such as "de". Safe only within one thread."""

    def __init__(self, characters: int) -> None:
        """characters: of a text that are looked at. Raises UsageError where py3langid is not installed."""
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
        """The likeliest language; "" for a text without a letter."""
        beginning = text[: self.characters]
        if not any(map(str.isalpha, beginning)):
            return ""
        return str(self._classify(beginning)[0])
