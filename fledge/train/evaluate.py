"""How well a model predicts text it has never seen: bits per byte, comparable across vocabularies."""

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
    """A document to score, or its beginning: `ids` stand for `size` bytes of `language`."""

    language: str
    size: float
    ids: Sequence[int]

    def beginning(self, size: float) -> ValidationText:
        """About the first `size` bytes, at least one token."""
        if size >= self.size or not self.ids:
            return self
        keep = min(len(self.ids), max(1, int(len(self.ids) * size / self.size)))
        return ValidationText(self.language, self.size * keep / len(self.ids), self.ids[:keep])


@dataclass(frozen=True)
class Validation:
    """Called with a model: bits per byte by language as {"bpb_en": ...}, and "bpb_mean", the mean of the languages.

    size: bytes a language that are read at most; None: all. rows: documents at once; window: tokens at once.
    """

    texts: Sequence[ValidationText]
    size: float | None = None
    rows: int = 8
    window: int = 512
    _chosen: list[ValidationText] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        left: defaultdict[str, float] = defaultdict(lambda: math.inf if self.size is None else self.size)
        for text in self.texts:
            if left[text.language] > 0 and text.ids:
                part = text.beginning(left[text.language])
                left[text.language] -= part.size
                self._chosen.append(part)

    def __call__(self, model: Any) -> dict[str, float]:
        """Score them; empty where there is no text."""
        nats: defaultdict[str, float] = defaultdict(float)
        sizes: defaultdict[str, float] = defaultdict(float)
        for group in self._groups():
            found = documents_nats(model, [text.ids for text in group], window=self.window)
            for text, value in zip(group, found, strict=True):
                nats[text.language] += value
                sizes[text.language] += text.size
        scores = {f"bpb_{language}": bits_per_byte(nats[language], sizes[language]) for language in sorted(nats)}
        return {**scores, "bpb_mean": sum(scores.values()) / len(scores)} if scores else {}

    def _groups(self) -> Iterator[list[ValidationText]]:
        """Documents of like length together, so that little is padded."""
        ordered = sorted(self._chosen, key=lambda text: len(text.ids))
        for start in range(0, len(ordered), self.rows):
            yield ordered[start : start + self.rows]


@torch.no_grad()
def documents_nats(model: Any, documents: Sequence[Sequence[int]], *, start: int = 0, window: int = 512) -> list[float]:
    """For each document the sum of -ln p over its tokens, read from a fresh state after the end-of-text id `start`.

    The states are carried from window to window, so documents of any length are scored in constant memory.
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
        left = (lengths - begin).clamp(0, inputs.shape[1]).to(device)
        logits, state = model(inputs, state, lengths=left)
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        real = torch.arange(inputs.shape[1], device=device) < left[:, None]
        totals += each.masked_fill(~real, 0.0).sum(1).double().cpu()
    found: list[float] = totals.tolist()
    return found


def bits_per_byte(nats: float, size: float) -> float:
    """Nats over a text of `size` bytes -> bits per byte."""
    return nats / math.log(2) / size
