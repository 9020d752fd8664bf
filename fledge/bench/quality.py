"""What smaller weights cost: how well a model predicts a text in each format, and how far it is from itself in float32.

Each document is read from a fresh state after the end-of-text id (where the vocabulary has one), by windows with the
state carried on; every model reads the same windows side by side. For each format, by language and overall:

    perplexity, bits per byte    of the text
    KL                           mean over the tokens of KL(float32 || format), nats: how far the predictions moved
    agreement                    how often both find the same token the most probable

Nothing is drawn, so the same command gives the same figures. Not here: speed, and the quantising itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fledge import checkpoint
from fledge.bench.environment import machine_facts
from fledge.bench.sparsity import LayerSparsity, sparsity
from fledge.checkpoint.quantization.quantizer import SCHEMES, is_quantizable, quantize_tensors
from fledge.core.errors import UsageError
from fledge.core.files import hash_file
from fledge.data.texts import read_texts
from fledge.engine.llm.loading import locate_checkpoint
from fledge.models.state import State
from fledge.native.library import why_missing
from fledge.tokenizer import NO_EOS, Tokenizer

REFERENCE = "float32"
DENSE = {"float32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("bf16", *SCHEMES)
WINDOW = 256  # tokens; the logits of all models for so many exist at once
ALL = "all"

Report = Callable[[int, int], None]
"""Called with (tokens read, tokens in all)."""


@dataclass(frozen=True)
class Spec:
    """What to measure. model: None is the bundled one. formats: of FORMATS, or files. tokens: of each language."""

    text: Path
    model: str | None = None
    formats: tuple[str, ...] = FORMATS
    tokens: int | None = None
    sparsity: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in (REFERENCE, *FORMATS) and not Path(name).is_file()]
        if unknown or not self.formats:
            known = ", ".join(FORMATS)
            raise UsageError(f"format {','.join(unknown)!r:.80} is none of {known}, and there is no such file")
        names = [Path(name).name for name in dict.fromkeys(self.formats)]
        if len(set(names)) < len(names):
            raise UsageError(f"two of the files {', '.join(names)} have the same name; rename one, for the table")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"tokens is {self.tokens}; it must be at least 1")


@dataclass
class Tally:
    """What one model did on some text, summed up."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    squares: float = 0.0  # of the difference from the reference in nats, token by token
    divergence: float = 0.0  # KL, summed
    agreed: int = 0

    def add(self, other: Tally) -> None:
        """Take another text in."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)

    def record(self, reference: Tally) -> dict[str, float]:
        """The figures, and how the perplexity differs from the reference's on the same text, with the standard error
        that a text of this length leaves (taking its tokens for independent)."""
        mean = (self.nats - reference.nats) / self.tokens
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "perplexity": self.perplexity,
            "perplexity_change": math.expm1(mean),
            "perplexity_change_error": math.sqrt(max(self.squares / self.tokens - mean**2, 0.0) / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "kl": self.divergence / self.tokens,
            "agreement": self.agreed / self.tokens,
        }


@dataclass(frozen=True)
class Variant:
    """One model under measurement."""

    name: str
    model: nn.Module
    nbytes: int  # of the matrices that can be quantised
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Of those matrices."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Document:
    """Ids to read; all but the first are predicted. nbytes: of those."""

    language: str
    ids: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Outcome:
    """All figures of one measurement."""

    spec: Spec
    model: dict[str, Any]
    text: dict[str, Any]
    machine: dict[str, Any]
    bits: dict[str, float]  # format -> bits a weight of the matrices
    tallies: dict[str, dict[str, Tally]]  # format -> language or ALL -> sums
    sparsity: list[LayerSparsity] = field(default_factory=list)

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        """Format -> language or ALL -> figures."""
        reference = self.tallies[REFERENCE]
        return {
            name: {language: tally.record(reference[language]) for language, tally in by.items()}
            for name, by in self.tallies.items()
        }

    def record(self, command: str) -> dict[str, Any]:
        """As JSON."""
        figures = self.figures()
        return {
            "what": "quality",
            "command": command,
            "machine": self.machine,
            "model": self.model,
            "text": self.text,
            "formats": {name: {"bits_per_weight": self.bits[name], "figures": figures[name]} for name in figures},
            "sparsity": [layer.record() for layer in self.sparsity],
        }


def run(spec: Spec, report: Report = lambda *_: None) -> Outcome:
    """Measure. Raises UsageError where the reference is quantised, or a file is of another model."""
    machine = machine_facts()  # before the work, which is load too
    path = locate_checkpoint(spec.model)
    found = checkpoint.read(path)
    if found.quantized:
        raise UsageError(f"{path} is quantised; give the checkpoint it was made from, and this file among the formats")
    tokenizer = checkpoint.load_tokenizer(found.tokenizer_spec, found.config.vocab_size, str(path))
    documents = list(_documents(spec, tokenizer))
    if not documents:
        raise UsageError(f"{spec.text} holds no text of at least two tokens")
    variants = [_variant(name, found) for name in dict.fromkeys((REFERENCE, *spec.formats))]
    tallies = _measure(variants, documents, report)
    layers = sparsity(found, [list(document.ids[:-1]) for document in documents]) if spec.sparsity else []
    sizes = {"name": found.path.stem, "family": found.config.family, "version": found.config.version}
    sizes |= {name: getattr(found.config, name) for name in ("n_layer", "n_embd", "dim_ffn", "vocab_size")}
    text = {"name": spec.text.name, "sha256": hash_file(spec.text), "documents": len(documents)}
    return Outcome(
        spec,
        {**sizes, "sha256": hash_file(found.files[0]), "kernels": why_missing() or "native"},
        text,
        machine,
        {variant.name: variant.bits_per_weight for variant in variants},
        tallies,
        layers,
    )


def _documents(spec: Spec, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents in the order of the file, until every language has its tokens."""
    begin = () if tokenizer.eos_id == NO_EOS else (tokenizer.eos_id,)
    taken: defaultdict[str, int] = defaultdict(int)
    for document in read_texts(spec.text):
        ids = (*begin, *tokenizer.encode(document.text))
        if spec.tokens is not None:
            ids = ids[: spec.tokens - taken[document.language] + 1]
        if len(ids) > 1:
            taken[document.language] += len(ids) - 1
            yield Document(document.language, ids, len(tokenizer.decode_bytes(ids[1:])))


def _variant(name: str, found: checkpoint.Checkpoint) -> Variant:
    """The model of `found` in a format, or that of a file. What is not quantised runs in float32, but for "bf16"."""
    tensors, quantized = found.tensors, found.quantized
    if name in SCHEMES:
        tensors, quantized = quantize_tensors(tensors, name)
    elif name not in DENSE:
        other = checkpoint.read(name)
        if other.config != found.config or other.tokenizer_spec != found.tokenizer_spec:
            raise UsageError(f"{name} is of another model than {found.path}: sizes or vocabularies differ")
        name, tensors, quantized = Path(name).name, other.tensors, other.quantized
    dtype = DENSE.get(name, torch.float32)
    dense = [tensor.numel() for key, tensor in tensors.items() if is_quantizable(key)]
    model = checkpoint.assemble(found.config, checkpoint.ModelWeights(tensors, quantized), dtype=dtype, pack=True)
    return Variant(
        name,
        model,
        nbytes=sum(dense) * dtype.itemsize + sum(matrix.nbytes for matrix in quantized.values()),
        weights=sum(dense) + sum(matrix.rows * matrix.columns for matrix in quantized.values()),
    )


@torch.inference_mode()
def _measure(variants: Sequence[Variant], documents: Sequence[Document], report: Report) -> dict[str, dict[str, Tally]]:
    """Format -> language or ALL -> sums. The first variant is the reference."""
    found: dict[str, defaultdict[str, Tally]] = {variant.name: defaultdict(Tally) for variant in variants}
    total, done = sum(len(document.ids) - 1 for document in documents), 0
    for document in documents:
        states: dict[str, State | None] = dict.fromkeys(found)
        here = {name: Tally(len(document.ids) - 1, document.nbytes) for name in found}
        for start in range(0, len(document.ids) - 1, WINDOW):
            targets = torch.tensor(document.ids[start + 1 : start + WINDOW + 1])
            inputs = torch.tensor([document.ids[start : start + len(targets)]])
            reference: Tensor | None = None
            for variant in variants:
                logits, states[variant.name] = variant.model(inputs, states[variant.name])
                expected = torch.log_softmax(logits[0].float(), dim=-1)  # (T, V)
                reference = expected if reference is None else reference
                here[variant.name].add(_compared(reference, expected, targets))
            done += len(targets)
            report(done, total)
        for name, tally in here.items():
            found[name][document.language].add(tally)
            found[name][ALL].add(tally)
    return {name: _sorted(by) for name, by in found.items()}


def _compared(reference: Tensor, expected: Tensor, targets: Tensor) -> Tally:
    """Log probabilities (T, V) of both, and the tokens that came."""
    divergence = torch.nn.functional.kl_div(expected, reference, reduction="none", log_target=True).sum(-1)
    before, after = (-one.gather(1, targets[:, None]).double() for one in (reference, expected))
    return Tally(
        nats=float(after.sum()),
        squares=float((after - before).square().sum()),
        divergence=float(divergence.double().sum()),
        agreed=int((reference.argmax(-1) == expected.argmax(-1)).sum()),
    )


def _sorted(by: Mapping[str, Tally]) -> dict[str, Tally]:
    """ALL first, then the languages; a text without any has ALL only."""
    return {ALL: by[ALL], **{language: by[language] for language in sorted(by) if language not in (ALL, "")}}
