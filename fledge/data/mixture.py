"""Which documents a model learns from, and which it never sees: caps by language and source, and a fixed split.

The choice depends on each document's own hash alone, so it is the same on every machine and in every order of files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fledge.data.documents import Document

LONG = 200_000  # characters; longer documents are cut into pieces of this size, so that caps can be met


@dataclass(frozen=True)
class Mixture:
    """How many bytes of text to take. Languages not named are left out; a cap may be passed by one document's piece."""

    language_bytes: Mapping[str, int]
    source_bytes: Mapping[str, int] = field(default_factory=dict)  # from one source, in each of its languages
    validation_share: float = 0.01  # of the documents of each language, but at least 3
    validation_bytes: int = 100_000  # kept aside a language, at most


@dataclass(frozen=True)
class Selection:
    """What a mixture took from a corpus."""

    train: list[Document]
    validation: list[Document]


def select(documents: Iterable[Document], mixture: Mixture) -> Selection:
    """Split and cap. Whole documents go aside for validation first; the caps apply to what is left."""
    wanted = _distinct(document for document in documents if document.language in mixture.language_bytes)
    validation, held = _hold_out(wanted, mixture)
    train: list[Document] = []
    taken: Counter[str] = Counter()
    pieces = sorted(_pieces(d for d in wanted if id(d) not in held), key=_rank)
    for piece in pieces:
        size = len(piece.text.encode())
        if taken[piece.language] >= mixture.language_bytes[piece.language]:
            continue
        source = f"{piece.source}/{piece.language}"
        if taken[source] >= mixture.source_bytes.get(piece.source, mixture.language_bytes[piece.language]):
            continue
        taken[piece.language] += size
        taken[source] += size
        train.append(piece)
    return Selection(train, validation)


def _hold_out(wanted: list[Document], mixture: Mixture) -> tuple[list[Document], set[int]]:
    """The validation documents (a long one gives only its beginning, the rest is not used), and their identities."""
    count = Counter(document.language for document in wanted)
    left = {language: max(3, int(count[language] * mixture.validation_share)) for language in count}
    room = dict.fromkeys(count, mixture.validation_bytes)
    validation, held = [], set()
    for document in wanted:
        if left[document.language] > 0 and room[document.language] > 0:
            part = _at_most(document.text, min(mixture.validation_bytes // 4, room[document.language]))
            validation.append(Document(part, document.language, document.source))
            held.add(id(document))
            left[document.language] -= 1
            room[document.language] -= len(part.encode())
    return validation, held


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Each text once, whatever order the documents come in, sorted by hash."""
    by_rank: dict[bytes, Document] = {}
    for document in documents:
        if not document.text:
            continue
        rank = _rank(document)
        known = by_rank.get(rank, document)
        by_rank[rank] = min(known, document, key=lambda one: (one.language, one.source))
    return [by_rank[rank] for rank in sorted(by_rank)]


def _at_most(text: str, size: int) -> str:
    """The beginning of `text` that takes no more than `size` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _pieces(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        for start in range(0, len(document.text), LONG):
            yield Document(document.text[start : start + LONG], document.language, document.source)


def _rank(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()
