"""What a text says about each matrix of a model: which inputs are large, and which outputs the predictions hang on.

The model reads the text and draws, after every token, one of its own; for each matrix the mean squares of its inputs
and of the gradient of log p (that token) at its outputs are kept. Both together tell what rounding a weight costs
(fledge.checkpoint.quantization.sensitivity). Pieces of the text are read from a fresh state, in an order drawn with a
fixed seed, so
the same text gives the same numbers.
Not here: rounding, and what is done with the numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fledge.checkpoint import assemble, read
from fledge.checkpoint.quantization.quantizer import check_quantizable, is_quantizable
from fledge.checkpoint.quantization.sensitivity import MatrixImportance
from fledge.core.device import choose_dtype
from fledge.core.errors import CheckpointError, UsageError
from fledge.engine.llm.loading import tokenizer_of
from fledge.models import BaseModel
from fledge.models.layers import Linear
from fledge.tokenizer import NO_EOS, Tokenizer

TOKENS = 32_768
"""How many are read at most: the numbers are means over all of them, and more text changes them little."""

PIECE = 4096  # characters of one document that are read together
WINDOW = 256  # tokens whose activations exist at once
SEED = 0

Report = Callable[[int, int], None]
"""Called with (tokens read, tokens in all)."""


def calibrate(
    source: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    tokens: int = TOKENS,
    report: Report = lambda *_: None,
) -> dict[str, MatrixImportance]:
    """The importance of every matrix of the checkpoint `source` that can be quantised, on these texts.

    Runs the dense model on the CPU with gradients: memory holds all of it, and what WINDOW tokens leave in each layer.
    Raises CheckpointError where the checkpoint is quantised already, UsageError where there is no text.
    """
    found = read(source)
    check_quantizable(found.config, str(source))
    if found.quantized:
        raise CheckpointError(f"{source} is quantized already; give the checkpoint from before quantization")
    tokenizer = tokenizer_of(found.tokenizer_spec, found.config.vocab_size, str(source))
    numbers = sum(tensor.numel() for tensor in found.tensors.values())
    dtype, _ = choose_dtype(None, torch.device("cpu"), numbers)
    model = assemble(found.config, found.tensors, dtype=dtype)
    assert isinstance(model, BaseModel)
    return measure(model, _pieces(tokenizer, texts, tokens), report)


def measure(
    model: BaseModel, pieces: Sequence[Sequence[int]], report: Report = lambda *_: None
) -> dict[str, MatrixImportance]:
    """As `calibrate`, of a plain model and sequences of ids. The model's weights lose `requires_grad`."""
    model.requires_grad_(False)
    total = sum(len(piece) for piece in pieces)
    if not total:
        raise UsageError("there is no text to calibrate with; give at least some sentences")
    sums = {name: _Sums(linear) for name, linear in _linears(model)}
    # The weights are constants here; gradients begin at the embedding.
    embedding = model.emb.register_forward_hook(lambda _module, _inputs, out: out.float().requires_grad_())
    draw = torch.Generator().manual_seed(SEED)
    done = 0
    try:
        for piece in pieces:
            state = None
            for start in range(0, len(piece), WINDOW):
                idx = torch.tensor([list(piece[start : start + WINDOW])])
                logits, state = model(idx, state)  # (1, T, V)
                drawn = torch.multinomial(torch.softmax(logits[0].detach(), -1), 1, generator=draw)[:, 0]
                nn.functional.cross_entropy(logits[0], drawn, reduction="sum").backward()
                state = type(state)(**{name: tensor.detach() for name, tensor in state.tensors().items()})
                done += idx.shape[1]
                report(done, total)
    finally:
        embedding.remove()
        for one in sums.values():
            one.remove()
    return {
        name: MatrixImportance((one.inputs / total).float(), (one.outputs / total).float())
        for name, one in sums.items()
    }


class _Sums:
    """Sums of squares of what goes into one Linear, and of the gradients that come back to what comes out."""

    def __init__(self, linear: Linear) -> None:
        rows, columns = linear.weight.shape
        self.inputs = torch.zeros(columns, dtype=torch.float64)
        self.outputs = torch.zeros(rows, dtype=torch.float64)
        self._hook = linear.register_forward_hook(self._forward)

    def remove(self) -> None:
        """No more sums."""
        self._hook.remove()

    def _forward(self, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.inputs += inputs[0].detach().float().flatten(0, -2).square().sum(0)
        output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.outputs += gradient.float().flatten(0, -2).square().sum(0)


def _linears(model: BaseModel) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_quantizable(f"{name}.weight"):
            yield f"{name}.weight", module


def _pieces(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Ids of pieces from all over the texts, `tokens` of them or fewer, each after the end-of-text id."""
    places = [(number, start) for number, text in enumerate(texts) for start in range(0, len(text), PIECE)]
    random.Random(SEED).shuffle(places)
    begin = [] if tokenizer.eos_id == NO_EOS else [tokenizer.eos_id]
    found, left = [], tokens
    for number, start in places:
        if left <= len(begin):
            break
        ids = [*begin, *tokenizer.encode(texts[number][start : start + PIECE])][:left]
        found.append(ids)
        left -= len(ids)
    return found
