"""The cost of quantization: how well each weight format predicts a text, and how far its predictions are from float32.

Each document starts from the initial state after the end-of-text id, if the vocabulary has one. It is read in windows,
and the state is carried over. All models read the same window before the next one. For each format, by language and in
total:

    perplexity, bits per byte    of the text
    KL                           mean of KL(float32 || format) over the tokens, in nats
    agreement                    the share of tokens for which both have the same most probable token

Nothing is sampled, so the same command gives the same metrics.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fledge import checkpoint
from fledge.bench.sparsity import count_sparsity
from fledge.bench.suite import Benchmark, Suite
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
WINDOW = 256  # tokens; the logits of a window exist for all models at the same time
ALL = "all"


@dataclass(frozen=True)
class QualityBenchmark(Benchmark):
    """Settings of the quality benchmark."""

    kind: ClassVar[str] = "quality"

    text: Path
    model: str | None = None  # None: the bundled model
    formats: tuple[str, ...] = FORMATS  # names, or quantized files
    tokens: int | None = None  # per language
    sparsity: bool = False  # also count the zeros of the channel mix

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in (REFERENCE, *FORMATS) and not Path(name).is_file()]
        if unknown or not self.formats:
            known = ", ".join(FORMATS)
            raise UsageError(f"format {','.join(unknown)!r:.80} is none of {known}, and there is no such file")
        names = [Path(name).name for name in dict.fromkeys(self.formats)]
        if len(set(names)) < len(names):
            raise UsageError(f"two of the files {', '.join(names)} have the same name; rename one of them")
        self.require_at_least(1, "tokens")

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the names of the files only."""
        formats = [Path(name).name for name in self.formats]
        return {**super().settings(), "text": self.text.name, "formats": formats}

    def measure(self, suite: Suite) -> None:
        """Evaluate all formats. Raises UsageError if the reference is quantized, or a file is of another model."""
        path = locate_checkpoint(self.model)
        source = checkpoint.read(path)
        if source.quantized:
            raise UsageError(f"{path} is quantized; pass the checkpoint it was made from, and this file as a format")
        tokenizer = checkpoint.load_tokenizer(source.tokenizer_spec, source.config.vocab_size, str(path))
        documents = list(self._read_documents(tokenizer))
        if not documents:
            raise UsageError(f"{self.text} has no text of at least two tokens")
        variants = [_build_variant(name, source) for name in dict.fromkeys((REFERENCE, *self.formats))]
        sums = _evaluate(variants, documents, suite)
        sequences = [list(document.ids[:-1]) for document in documents]
        layers = count_sparsity(source, sequences) if self.sparsity else []
        config = source.config
        sizes = {name: getattr(config, name) for name in ("n_layer", "n_embd", "dim_ffn", "vocab_size")}
        model = {"name": source.path.stem, "family": config.family, "version": config.version, **sizes}
        suite.record |= {
            "model": {**model, "sha256": hash_file(source.files[0]), "kernels": why_missing() or "native"},
            "text": {"name": self.text.name, "sha256": hash_file(self.text), "documents": len(documents)},
            "formats": {
                variant.name: {
                    "bits_per_weight": 8 * variant.nbytes / variant.weights,
                    "figures": {
                        language: prediction.metrics(sums[REFERENCE][language])
                        for language, prediction in sums[variant.name].items()
                    },
                }
                for variant in variants
            },
            "sparsity": [layer.record() for layer in layers],
        }

    def _read_documents(self, tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
        """The documents in the order of the file, up to the limit of tokens of each language."""
        prefix = () if tokenizer.eos_id == NO_EOS else (tokenizer.eos_id,)
        tokens: defaultdict[str, int] = defaultdict(int)
        for document in read_texts(self.text):
            ids = (*prefix, *tokenizer.encode(document.text))
            if self.tokens is not None:
                ids = ids[: self.tokens - tokens[document.language] + 1]
            if len(ids) > 1:
                tokens[document.language] += len(ids) - 1
                yield EncodedDocument(document.language, ids, len(tokenizer.decode_bytes(ids[1:])))


@dataclass
class PredictionSums:
    """How one model predicted some text, summed over its tokens."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    squares: float = 0.0  # of the difference from the reference in nats, token by token
    divergence: float = 0.0  # KL
    agreed: int = 0

    def add(self, other: PredictionSums) -> None:
        """Add the sums of another text."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def metrics(self, reference: PredictionSums) -> dict[str, float]:
        """Return the metrics, with the change of perplexity from the reference and its standard error.

        The standard error takes the tokens as independent.
        """
        mean = (self.nats - reference.nats) / self.tokens
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "perplexity": math.exp(self.nats / self.tokens),
            "perplexity_change": math.expm1(mean),
            "perplexity_change_error": math.sqrt(max(self.squares / self.tokens - mean**2, 0.0) / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "kl": self.divergence / self.tokens,
            "agreement": self.agreed / self.tokens,
        }


@dataclass(frozen=True)
class ModelVariant:
    """One model under measurement, with the size of the matrices that can be quantized."""

    name: str
    model: nn.Module
    nbytes: int
    weights: int


@dataclass(frozen=True)
class EncodedDocument:
    """The ids of a document. All but the first are predicted, and have `nbytes` in total."""

    language: str
    ids: tuple[int, ...]
    nbytes: int


def _build_variant(name: str, source: checkpoint.Checkpoint) -> ModelVariant:
    """The model of `source` in a format, or the model of a file. All but "bf16" run other tensors in float32."""
    tensors, quantized = source.tensors, source.quantized
    if name in SCHEMES:
        tensors, quantized = quantize_tensors(tensors, name)
    elif name not in DENSE:
        other = checkpoint.read(name)
        if other.config != source.config or other.tokenizer_spec != source.tokenizer_spec:
            raise UsageError(f"{name} is of another model than {source.path}: sizes or vocabularies differ")
        name, tensors, quantized = Path(name).name, other.tensors, other.quantized
    dtype = DENSE.get(name, torch.float32)
    dense = [tensor.numel() for key, tensor in tensors.items() if is_quantizable(key)]
    model = checkpoint.assemble(source.config, checkpoint.ModelWeights(tensors, quantized), dtype=dtype, pack=True)
    return ModelVariant(
        name,
        model,
        nbytes=sum(dense) * dtype.itemsize + sum(matrix.nbytes for matrix in quantized.values()),
        weights=sum(dense) + sum(matrix.rows * matrix.columns for matrix in quantized.values()),
    )


@torch.inference_mode()
def _evaluate(
    variants: Sequence[ModelVariant], documents: Sequence[EncodedDocument], suite: Suite
) -> dict[str, dict[str, PredictionSums]]:
    """Format -> language or ALL -> sums. The first variant is the reference."""
    sums: dict[str, defaultdict[str, PredictionSums]] = {v.name: defaultdict(PredictionSums) for v in variants}
    suite.total_runs = sum(len(document.ids) - 1 for document in documents)
    for document in documents:
        states: dict[str, State | None] = dict.fromkeys(sums)
        own = {name: PredictionSums(len(document.ids) - 1, document.nbytes) for name in sums}
        for start in range(0, len(document.ids) - 1, WINDOW):
            targets = torch.tensor(document.ids[start + 1 : start + WINDOW + 1])
            inputs = torch.tensor([document.ids[start : start + len(targets)]])
            reference: Tensor | None = None
            for variant in variants:
                logits, states[variant.name] = variant.model(inputs, states[variant.name])
                log_probs = torch.log_softmax(logits[0].float(), dim=-1)  # (T, V)
                reference = log_probs if reference is None else reference
                own[variant.name].add(_compare(reference, log_probs, targets))
            suite.finished_runs += len(targets)
            suite.report("measuring")
        for name, prediction in own.items():
            sums[name][document.language].add(prediction)
            sums[name][ALL].add(prediction)
    return {name: _sort_languages(by_language) for name, by_language in sums.items()}


def _compare(reference: Tensor, log_probs: Tensor, targets: Tensor) -> PredictionSums:
    """Compare the log probabilities (T, V) of both models on the target tokens."""
    divergence = torch.nn.functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)
    before, after = (-values.gather(1, targets[:, None]).double() for values in (reference, log_probs))
    return PredictionSums(
        nats=float(after.sum()),
        squares=float((after - before).square().sum()),
        divergence=float(divergence.double().sum()),
        agreed=int((reference.argmax(-1) == log_probs.argmax(-1)).sum()),
    )


def _sort_languages(sums: Mapping[str, PredictionSums]) -> dict[str, PredictionSums]:
    """ALL first, then the languages. Text without a language appears in ALL only."""
    return {ALL: sums[ALL], **{name: sums[name] for name in sorted(sums) if name not in (ALL, "")}}
