"""The quality of text embeddings: pairs of sentences with human similarity scores.

The metric is Spearman's rank correlation between the scores and the cosines of the embeddings, by language. The
baseline needs no model: the cosine of the token counts of both texts ("words in common").
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fledge.bench.suite import Benchmark, Suite
from fledge.core.errors import UsageError
from fledge.core.files import hash_file
from fledge.data.documents import read_numbered_lines
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load

MIN_PAIRS = 3  # of a language


@dataclass(frozen=True)
class TextPair:
    """Two texts and their similarity, on any scale."""

    language: str
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class EmbeddingsBenchmark(Benchmark):
    """Settings: pairs is a file of JSON lines {"a", "b", "score"}, and "lang" if there are several languages.

    limit: pairs per language, from the start of the file.
    """

    kind: ClassVar[str] = "embeddings"

    pairs: Path
    model: str | None = None  # None: the bundled model
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < MIN_PAIRS:
            raise UsageError(f"limit is {self.limit}; a correlation needs at least {MIN_PAIRS} pairs")

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the name of the file only."""
        return {**super().settings(), "pairs": self.pairs.name}

    def measure(self, suite: Suite) -> None:
        """Compute the correlations, -1 to 1, by language.

        Raises UsageError for an invalid line of the file, and for a language with fewer than three pairs.
        """
        by_language = read_pairs(self.pairs, self.limit)
        llm = load(self.model)
        languages: dict[str, Any] = {}
        text = {"name": self.pairs.name, "sha256": hash_file(self.pairs)}
        suite.record |= {"model": llm.name, "text": text, "languages": languages}
        suite.total_runs = sum(map(len, by_language.values()))
        for language, pairs in by_language.items():
            cosines = []
            for pair in pairs:
                suite.report("measuring")
                cosines.append(float(llm.embed(pair.first) @ llm.embed(pair.second)))
                suite.finished_runs += 1
            scores = [pair.score for pair in pairs]
            languages[language] = {
                "pairs": len(pairs),
                "model": spearman(cosines, scores),
                "words_in_common": spearman([token_count_cosine(llm, pair) for pair in pairs], scores),
            }


def read_pairs(file: Path, limit: int | None) -> dict[str, list[TextPair]]:
    """Return the pairs by language, in the order of the file."""
    by_language: dict[str, list[TextPair]] = defaultdict(list)
    for number, line in read_numbered_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = TextPair(str(row.get("lang", "")), row["a"], row["b"], float(row["score"]))
            if not (pair.first.strip() and pair.second.strip() and math.isfinite(pair.score)):
                raise ValueError("a text is empty or the score is not finite")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"it has no field {error}" if isinstance(error, KeyError) else error
            raise UsageError(f"{file}, line {number}: not a pair with a, b and score: {reason}") from None
        if limit is None or len(by_language[pair.language]) < limit:
            by_language[pair.language].append(pair)
    few = [language or "any" for language, pairs in by_language.items() if len(pairs) < MIN_PAIRS]
    if few or not by_language:
        raise UsageError(f"{file}: fewer than {MIN_PAIRS} pairs of the language {', '.join(few) or 'any'}")
    return dict(by_language)


def token_count_cosine(llm: LLM, pair: TextPair) -> float:
    """Return the cosine of the token counts of both texts."""
    first, second = Counter(llm.tokenizer.encode(pair.first)), Counter(llm.tokenizer.encode(pair.second))
    squares = (sum(count * count for count in counts.values()) for counts in (first, second))
    return sum(count * second[token] for token, count in first.items()) / math.sqrt(math.prod(squares))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the correlation of the ranks. Equal values share their mean rank. 0 if either has only equal values."""
    a, b = (ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else 0.0


def ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the rank of each value, 1 for the smallest."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[index])
