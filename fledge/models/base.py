"""The parts around the blocks, the same in every family: embedding, the loop over the layers, the head.

This module also handles padding and document boundaries, so that kernels need not. Rows are padded on the right, and
`lengths` is the number of real tokens of each row. Padding leaves every state exactly unchanged: a padded token gets
k = 0 (it writes nothing) and log decay 0 (it forgets nothing), and the shifts are those of the last real token.
`document_start` marks tokens at which a document begins. They are exactly independent of all earlier tokens: the decay
forgets everything, the output is the bonus alone, and the token shift reads zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.kernels.fused import mix_tokens
from fledge.models.config import ModelConfig
from fledge.models.layers import LayerNorm, Linear, last_token, token_shift
from fledge.models.state import State, tuned_state, zero_state

Readout = Callable[[Linear, Tensor], Tensor]

FORGET = -1e30
"""A log decay that forgets everything but is finite, so that sums with it are finite too."""


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch are real, and at which a document begins. Without both, every method costs nothing."""

    lengths: Tensor | None = None  # (B,) int64
    is_real: Tensor | None = None  # (B, T, 1) bool
    document_start: Tensor | None = None  # (B, T, 1) bool

    @staticmethod
    def create(lengths: Tensor | None, document_start: Tensor | None, idx: Tensor) -> TokenMask:
        """Check both against idx (B, T) and build the masks. Raises UsageError if they do not fit."""
        B, T = idx.shape
        if document_start is not None:
            if document_start.shape != (B, T) or document_start.dtype != torch.bool:
                have = f"{document_start.dtype} of shape {tuple(document_start.shape)}"
                raise UsageError(f"document_start is {have}; it must be bool of {(B, T)}")
            document_start = document_start.to(idx.device)[:, :, None]
        if lengths is None:
            return TokenMask(document_start=document_start)
        if lengths.shape != (B,) or (B and (int(lengths.min()) < 0 or int(lengths.max()) > T)):
            raise UsageError(f"lengths must hold {B} numbers between 0 and {T}, not {lengths.tolist()}")
        lengths = lengths.to(device=idx.device, dtype=torch.long)
        is_real = (torch.arange(T, device=idx.device) < lengths[:, None])[:, :, None]
        return TokenMask(lengths, is_real, None if document_start is None else document_start & is_real)

    def zero_padding(self, x: Tensor) -> Tensor:
        """x (B, T, N) with padded tokens set to zero."""
        return self.fill_padding(x, 0.0)

    def fill_padding(self, x: Tensor, value: float) -> Tensor:
        """x (B, T, N) with padded tokens set to `value`."""
        return x if self.is_real is None else x.masked_fill(~self.is_real, value)

    def mask_decay(self, w: Tensor) -> Tensor:
        """The log decay w (B, T, N): padded tokens forget nothing, tokens that start a document forget everything."""
        w = self.zero_padding(w)
        return w if self.document_start is None else w.masked_fill(self.document_start, FORGET)

    def shift(self, x: Tensor, previous: Tensor) -> Tensor:
        """The token shift: x (B, T, C) and the last input before it (B, C) -> the previous inputs (B, T, C)."""
        shifted = token_shift(x, previous)
        return shifted if self.document_start is None else shifted.masked_fill(self.document_start, 0.0)

    def mix(
        self,
        x: Tensor,
        previous: Tensor,
        mix: Sequence[Tensor],
        dtype: torch.dtype,
        low: Tensor | None = None,
        up: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Each token of x (B, T, C) mixed with the one before it, once for each of the weights `mix`.

        See `fledge.kernels.fused.reference.mix_tokens`.
        """
        weights = torch.stack([weight.float().flatten() for weight in mix])  # (n, C)
        return mix_tokens(x, previous, weights, low, up, document_start=self.document_start, dtype=dtype)

    @property
    def is_empty(self) -> bool:
        """Whether every token is real and no document begins after the first one."""
        return self.lengths is None and self.document_start is None

    def last_input(self, x: Tensor, previous: Tensor) -> Tensor:
        """The `previous` of the next call's `shift`, (B, C)."""
        return last_token(x, previous, self.lengths)

    def replace_starts(self, y: Tensor, compute_own: Callable[[], Tensor]) -> Tensor:
        """y (B, T, ...), with `compute_own()`, the output without earlier tokens, where a document begins."""
        if self.document_start is None:
            return y
        starts = self.document_start if y.dim() == 3 else self.document_start[..., None]
        return torch.where(starts, compute_own(), y)


class BaseModel(nn.Module):
    """Embedding, blocks, norm, head. A family sets `block_class` and `state_class`.

    Training, prefill and decode use the same call: `logits, state = model(idx, state)`.
    """

    block_class: Callable[..., nn.Module]
    state_class: type[State]

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        # An explicit weight, because random initialization costs time, and on "meta" seconds of imports.
        rows = torch.empty(config.vocab_size, config.n_embd, device=device)
        self.emb = nn.Embedding(config.vocab_size, config.n_embd, _weight=rows)
        self.blocks = nn.ModuleList(self.block_class(config, layer, device) for layer in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd, config.norm_eps, device)
        self.head = Linear(config.n_embd, config.vocab_size, device)

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros, or the tuned state of the checkpoint."""
        device = self.emb.weight.device
        if not self.config.tuned_state:
            return zero_state(self.config, batch, device)
        return tuned_state(self.config, [cast(Any, block).att.time_state for block in self.blocks], batch, device)

    def forward(
        self,
        idx: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        last: bool = False,
        document_start: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """Read tokens. Returns the logits after each token and the state after the last one.

        idx: (B, T) int64, T >= 0.
        state: a state of B sequences, never changed; None: the initial state.
        lengths: (B,) number of real tokens of each row of a right-padded batch; logits of padding are undefined.
        document_start: (B, T) bool, True at the first token of a document, which then starts from a state of zeros (a
        tuned initial state applies to the first token of a row only).
        readout: called with the head and its input (B, T, C); its result replaces the logits.

        Returns float32 logits (B, T, vocab_size), or with `last=True` only those after the last real token of each row,
        (B, 1, vocab_size), without computing the others. Raises TokenizerError for an id outside the vocabulary and
        StateError for a state of another model.
        """
        self._check(idx, state, last)
        mask = TokenMask.create(lengths, document_start, idx)
        before = self.initial_state(idx.shape[0]) if state is None else state
        x = cast(Any, self.blocks[0]).ln0(self.emb(idx).float())  # (B, T, C)
        layers: list[dict[str, Tensor]] = []
        for layer, block in enumerate(self.blocks):
            x, after = block(x, before, layer, mask)
            layers.append(after)
        new_state = self.state_class(**{name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})
        return self._compute_logits(x, mask, last, readout), new_state

    def _compute_logits(self, x: Tensor, mask: TokenMask, last: bool, readout: Readout | None) -> Tensor:
        """The first result of `forward`, from the last block's output x (B, T, C)."""
        if last:
            x = self._select_last(x, mask)
        x = self.ln_out(x)
        logits: Tensor = self.head(x).float() if readout is None else readout(self.head, x)
        return logits

    def _select_last(self, x: Tensor, mask: TokenMask) -> Tensor:
        if mask.lengths is None:
            return x[:, -1:]
        if bool((mask.lengths < 1).any()):
            raise UsageError("last=True needs at least one token in every row")
        return x[torch.arange(x.shape[0], device=x.device), mask.lengths - 1][:, None]

    def _check(self, idx: Tensor, state: State | None, last: bool) -> None:
        if idx.dim() != 2:
            raise UsageError(f"idx has shape {tuple(idx.shape)}; the model needs (batch, time)")
        if last and idx.shape[1] == 0:
            raise UsageError("last=True needs at least one token in every row")
        if idx.numel() and not torch.compiler.is_compiling():
            low, high = int(idx.min()), int(idx.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise TokenizerError(f"token id {bad} is outside this model's vocabulary of {self.config.vocab_size}")
        if state is not None:
            if not isinstance(state, self.state_class):
                raise StateError(f"a {type(state).__name__} does not fit a {self.config.family} model")
            state.check(self.config, idx.shape[0])
