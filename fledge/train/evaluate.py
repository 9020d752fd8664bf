"""Bits per byte of a model on held-out text. The metric is comparable between vocabularies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class ValidationText:
    """A document to score, or its beginning: the token ids of `size` bytes in `language`."""

    language: str
    size: float
    ids: Sequence[int]

    def truncate(self, size: float) -> ValidationText:
        """About the first `size` bytes, at least one token."""
        if size >= self.size or not self.ids:
            return self
        count = min(len(self.ids), max(1, int(len(self.ids) * size / self.size)))
        return ValidationText(self.language, self.size * count / len(self.ids), self.ids[:count])


@dataclass(frozen=True)
class Validation:
    """Computes bits per byte of a model: {"bpb_en": ..., "bpb_mean": ...}; the mean is over the languages.

    size: the maximum of bytes read per language; None: all. rows: the batch size; window: tokens of a forward pass.
    """

    texts: Sequence[ValidationText]
    size: float | None = None
    rows: int = 8
    window: int = 512
    _selected: list[ValidationText] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        remaining: defaultdict[str, float] = defaultdict(lambda: math.inf if self.size is None else self.size)
        for text in self.texts:
            if remaining[text.language] > 0 and text.ids:
                part = text.truncate(remaining[text.language])
                remaining[text.language] -= part.size
                self._selected.append(part)

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the scores; an empty dict without texts."""
        nats: defaultdict[str, float] = defaultdict(float)
        sizes: defaultdict[str, float] = defaultdict(float)
        for batch in self._batches():
            document_nats = score_documents(model, [text.ids for text in batch], window=self.window)
            for text, value in zip(batch, document_nats, strict=True):
                nats[text.language] += value
                sizes[text.language] += text.size
        scores = {f"bpb_{language}": bits_per_byte(nats[language], sizes[language]) for language in sorted(nats)}
        return {**scores, "bpb_mean": sum(scores.values()) / len(scores)} if scores else {}

    def _batches(self) -> Iterator[list[ValidationText]]:
        """Batches of documents with similar lengths, which need little padding."""
        ordered = sorted(self._selected, key=lambda text: len(text.ids))
        for start in range(0, len(ordered), self.rows):
            yield ordered[start : start + self.rows]


@torch.no_grad()
def score_documents(
    model: Any, documents: Sequence[Sequence[int]], *, start: int = 0, window: int = 512
) -> list[float]:
    """For each document, the sum of -ln p over its tokens. The model starts with the end-of-text id `start`.

    The state is passed on from window to window, so memory does not depend on the lengths of the documents.
    """
    device = next(model.parameters()).device
    longest = max(map(len, documents))
    rows = torch.full((len(documents), longest + 1), start, dtype=torch.long)
    for row, ids in zip(rows, documents, strict=True):
        row[1 : len(ids) + 1] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in documents])
    totals, state = torch.zeros(len(documents), dtype=torch.float64), None
    for begin in range(0, longest, window):
        inputs = rows[:, begin : min(begin + window, longest)].to(device)
        targets: Tensor = rows[:, begin + 1 : begin + inputs.shape[1] + 1].to(device)
        window_lengths = (lengths - begin).clamp(0, inputs.shape[1]).to(device)
        logits, state = model(inputs, state, lengths=window_lengths)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        is_real = torch.arange(inputs.shape[1], device=device) < window_lengths[:, None]
        totals += losses.masked_fill(~is_real, 0.0).sum(1).double().cpu()
    result: list[float] = totals.tolist()
    return result


def bits_per_byte(nats: float, size: float) -> float:
    """Convert the nats of a text of `size` bytes to bits per byte."""
    return nats / math.log(2) / size
