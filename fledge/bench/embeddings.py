"""How near vectors of texts are to what people think of them: pairs of sentences with scores of likeness.

The measure is Spearman's rank correlation between the scores and the cosines of the vectors, by language. Beside the
model stands what needs no model at all: the cosine of how often each token occurs in both ("words in common").
Not here: how a vector is made (fledge.engine.llm.embedding).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fledge.bench.environment import machine_facts
from fledge.core.errors import UsageError
from fledge.core.files import hash_file
from fledge.data.documents import numbered_lines
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load

FEWEST = 3  # pairs of a language

Report = Callable[[int, int], None]
"""Called with (pairs read, pairs in all)."""


@dataclass(frozen=True)
class Pair:
    """Two texts and how alike they are, on any scale."""

    language: str
    one: str
    other: str
    score: float


@dataclass(frozen=True)
class Outcome:
    """Rank correlations, -1 to 1, by language."""

    model: str
    file: str
    sha256: str
    machine: dict[str, Any]
    pairs: dict[str, int]
    of_model: dict[str, float]
    of_words: dict[str, float]

    def record(self, command: str) -> dict[str, Any]:
        """As JSON."""
        found = {"benchmark": "embeddings", "command": command, "machine": self.machine, "model": self.model}
        by = {
            language: {"pairs": count, "model": self.of_model[language], "words_in_common": self.of_words[language]}
            for language, count in self.pairs.items()
        }
        return {**found, "text": {"name": self.file, "sha256": self.sha256}, "languages": by}


def run(file: Path, model: str | None = None, limit: int | None = None, report: Report = lambda *_: None) -> Outcome:
    """Measure. limit: pairs of each language, from the first on.

    file: JSON lines {"a", "b", "score"}, and "lang" where there are several. Raises UsageError for another file, with
    the line, and for a language of fewer than three pairs.
    """
    if limit is not None and limit < FEWEST:
        raise UsageError(f"limit is {limit}; a correlation needs at least {FEWEST} pairs")
    by_language = read_pairs(file, limit)
    llm, done, total = load(model), 0, sum(map(len, by_language.values()))
    vectors, words = dict[str, float](), dict[str, float]()
    for language, pairs in by_language.items():
        cosines = []
        for pair in pairs:
            cosines.append(float(llm.embed(pair.one) @ llm.embed(pair.other)))
            done += 1
            report(done, total)
        scores = [pair.score for pair in pairs]
        vectors[language] = spearman(cosines, scores)
        words[language] = spearman([common(llm, pair) for pair in pairs], scores)
    counts = {language: len(pairs) for language, pairs in by_language.items()}
    return Outcome(llm.name, file.name, hash_file(file), machine_facts(), counts, vectors, words)


def read_pairs(file: Path, limit: int | None) -> dict[str, list[Pair]]:
    """By language, in the order of the file."""
    found: dict[str, list[Pair]] = defaultdict(list)
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(str(row.get("lang", "")), row["a"], row["b"], float(row["score"]))
            if not (pair.one.strip() and pair.other.strip() and math.isfinite(pair.score)):
                raise ValueError("a text is empty or the score is no number")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"it has no field {error}" if isinstance(error, KeyError) else error
            raise UsageError(f"{file}, line {number}: not a pair with a, b and score: {reason}") from None
        if limit is None or len(found[pair.language]) < limit:
            found[pair.language].append(pair)
    few = [language or "any" for language, pairs in found.items() if len(pairs) < FEWEST]
    if few or not found:
        raise UsageError(f"{file}: fewer than {FEWEST} pairs of the language {', '.join(few) or 'any'}")
    return dict(found)


def common(llm: LLM, pair: Pair) -> float:
    """The cosine of how often each token occurs in both."""
    one, other = Counter(llm.tokenizer.encode(pair.one)), Counter(llm.tokenizer.encode(pair.other))
    sizes = (sum(count * count for count in counts.values()) for counts in (one, other))
    return sum(count * other[token] for token, count in one.items()) / math.sqrt(math.prod(sizes))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks; equals share the mean of theirs. 0 where either is all equal."""
    a, b = (ranks(np.asarray(values, dtype=np.float64)) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else 0.0


def ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """1 for the smallest."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])
