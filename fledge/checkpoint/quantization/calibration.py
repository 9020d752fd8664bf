"""Calibration: measure on a text which weights of a model matter most for its predictions.

The model reads the text and samples one token after each token. For each matrix, the mean squares of its inputs are
collected, and those of the gradient of log p(sampled token) at its outputs. Together they predict the cost of rounding
a weight (fledge.checkpoint.quantization.sensitivity). Segments of the text are read from an empty state in an order
drawn with a fixed seed, so the same text gives the same numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fledge.checkpoint.model_loader import assemble
from fledge.checkpoint.quantization.quantizer import check_quantizable, is_quantizable
from fledge.checkpoint.quantization.sensitivity import MatrixImportance
from fledge.checkpoint.reader import read
from fledge.checkpoint.tokenizers import load_tokenizer
from fledge.core.device import choose_dtype
from fledge.core.errors import CheckpointError, UsageError
from fledge.models import BaseModel
from fledge.models.layers import Linear
from fledge.tokenizer import NO_EOS, Tokenizer

MAX_TOKENS = 32_768
"""The numbers are means over all tokens; more text changes them little."""

SEGMENT_LENGTH = 4096  # characters of one document that are read together
WINDOW = 256  # tokens whose activations are in memory at the same time
SEED = 0

ProgressCallback = Callable[[int, int], None]
"""Called with (tokens read, total tokens)."""


def calibrate(
    source: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    tokens: int = MAX_TOKENS,
    report: ProgressCallback = lambda *_: None,
) -> dict[str, MatrixImportance]:
    """The importance of each matrix of the checkpoint `source` that can be quantized, measured on `texts`.

    Runs the dense model on the CPU with gradients: memory holds all weights and the activations of WINDOW tokens. Reads
    at most `tokens` tokens. Raises CheckpointError if the checkpoint is already quantized, UsageError if there is no
    text.
    """
    loaded = read(source)
    check_quantizable(loaded.config, str(source))
    if loaded.quantized:
        raise CheckpointError(f"{source} is already quantized; use the unquantized checkpoint")
    tokenizer = load_tokenizer(loaded.tokenizer_spec, loaded.config.vocab_size, str(source))
    parameters = sum(tensor.numel() for tensor in loaded.tensors.values())
    dtype, _ = choose_dtype(None, torch.device("cpu"), parameters)
    model = assemble(loaded.config, loaded.tensors, dtype=dtype)
    assert isinstance(model, BaseModel)
    return measure(model, _make_segments(tokenizer, texts, tokens), report)


def measure(
    model: BaseModel, segments: Sequence[Sequence[int]], report: ProgressCallback = lambda *_: None
) -> dict[str, MatrixImportance]:
    """As `calibrate`, for a plain model and sequences of ids. Sets `requires_grad` of all weights to False."""
    model.requires_grad_(False)
    total = sum(len(segment) for segment in segments)
    if not total:
        raise UsageError("there is no text to calibrate with; give at least some sentences")
    sums = {name: _SquareSums(linear) for name, linear in _iter_linears(model)}
    # The weights are constants here; gradients begin at the embedding.
    embedding = model.emb.register_forward_hook(lambda _module, _inputs, out: out.float().requires_grad_())
    generator = torch.Generator().manual_seed(SEED)
    done = 0
    try:
        for segment in segments:
            state = None
            for start in range(0, len(segment), WINDOW):
                idx = torch.tensor([list(segment[start : start + WINDOW])])
                logits, state = model(idx, state)  # (1, T, V)
                sampled = torch.multinomial(torch.softmax(logits[0].detach(), -1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits[0], sampled, reduction="sum").backward()
                state = type(state)(**{name: tensor.detach() for name, tensor in state.tensors().items()})
                done += idx.shape[1]
                report(done, total)
    finally:
        embedding.remove()
        for square_sums in sums.values():
            square_sums.remove()
    return {
        name: MatrixImportance((square_sums.inputs / total).float(), (square_sums.outputs / total).float())
        for name, square_sums in sums.items()
    }


class _SquareSums:
    """Sums of squares of the inputs of one Linear, and of the gradients at its outputs."""

    def __init__(self, linear: Linear) -> None:
        rows, columns = linear.weight.shape
        self.inputs = torch.zeros(columns, dtype=torch.float64)
        self.outputs = torch.zeros(rows, dtype=torch.float64)
        self._hook = linear.register_forward_hook(self._forward)

    def remove(self) -> None:
        """Stop collecting."""
        self._hook.remove()

    def _forward(self, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.inputs += inputs[0].detach().float().flatten(0, -2).square().sum(0)
        output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.outputs += gradient.float().flatten(0, -2).square().sum(0)


def _iter_linears(model: BaseModel) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_quantizable(f"{name}.weight"):
            yield f"{name}.weight", module


def _make_segments(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Ids of segments from all texts, at most `tokens` ids, each segment after the end-of-text id."""
    positions = [(number, start) for number, text in enumerate(texts) for start in range(0, len(text), SEGMENT_LENGTH)]
    random.Random(SEED).shuffle(positions)
    prefix = [] if tokenizer.eos_id == NO_EOS else [tokenizer.eos_id]
    segments, left = list[list[int]](), tokens
    for number, start in positions:
        if left <= len(prefix):
            break
        ids = [*prefix, *tokenizer.encode(texts[number][start : start + SEGMENT_LENGTH])][:left]
        segments.append(ids)
        left -= len(ids)
    return segments
