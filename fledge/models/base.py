"""What surrounds the blocks, the same in every family: embedding, the walk through the layers, the head.

Also the one place that deals with ragged batches and with borders between documents, so that no kernel needs to know.
Rows are padded on the right and `lengths` says how many tokens of each row are real. Padding must not touch any state,
exactly: a padded token gets k = 0 (it writes nothing) and log decay 0 (it forgets nothing), and the shifts are taken
from the last real token. `fresh` marks tokens at which a document begins. Such a token sees nothing of what was before
it, exactly: its decay forgets all, its own output is its bonus alone, and it finds zeros in place of the token before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.models.config import ModelConfig
from fledge.models.layers import LayerNorm, Linear, last_token, token_shift
from fledge.models.state import State, tuned_state, zero_state

Readout = Callable[[Linear, Tensor], Tensor]

FORGET = -1e30
"""A log decay after which nothing is left, and which is still a number to add to."""


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch are real, and at which a document begins. Without either, every method is free."""

    lengths: Tensor | None = None  # (B,) int64
    real: Tensor | None = None  # (B, T, 1) bool
    fresh: Tensor | None = None  # (B, T, 1) bool

    @staticmethod
    def of(lengths: Tensor | None, fresh: Tensor | None, idx: Tensor) -> TokenMask:
        """Check both against idx (B, T) and build the masks."""
        B, T = idx.shape
        if fresh is not None:
            if fresh.shape != (B, T) or fresh.dtype != torch.bool:
                raise UsageError(f"fresh is {fresh.dtype} of shape {tuple(fresh.shape)}; it must be bool of {(B, T)}")
            fresh = fresh.to(idx.device)[:, :, None]
        if lengths is None:
            return TokenMask(fresh=fresh)
        if lengths.shape != (B,) or (B and (int(lengths.min()) < 0 or int(lengths.max()) > T)):
            raise UsageError(f"lengths must hold {B} numbers between 0 and {T}, not {lengths.tolist()}")
        lengths = lengths.to(device=idx.device, dtype=torch.long)
        real = (torch.arange(T, device=idx.device) < lengths[:, None])[:, :, None]
        return TokenMask(lengths, real, None if fresh is None else fresh & real)

    def zero(self, x: Tensor) -> Tensor:
        """x (B, T, N) with padded tokens set to zero."""
        return self.fill(x, 0.0)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """x (B, T, N) with padded tokens set to `value`."""
        return x if self.real is None else x.masked_fill(~self.real, value)

    def decay(self, w: Tensor) -> Tensor:
        """The log decay w (B, T, N): padded tokens forget nothing, those at which a document begins everything."""
        w = self.zero(w)
        return w if self.fresh is None else w.masked_fill(self.fresh, FORGET)

    def shifted(self, x: Tensor, previous: Tensor) -> Tensor:
        """The input one token earlier: x (B, T, C) and the last token before it (B, C) -> (B, T, C)."""
        before = token_shift(x, previous)
        return before if self.fresh is None else before.masked_fill(self.fresh, 0.0)

    def last(self, x: Tensor, previous: Tensor) -> Tensor:
        """What the next call's `shifted` needs as `previous`, (B, C)."""
        return last_token(x, previous, self.lengths)

    def alone(self, y: Tensor, own: Callable[[], Tensor]) -> Tensor:
        """y (B, T, ...), with `own()`, what a token says without a past, where a document begins."""
        if self.fresh is None:
            return y
        return torch.where(self.fresh if y.dim() == 3 else self.fresh[..., None], own(), y)


class BaseModel(nn.Module):
    """Embedding, blocks, norm, head. A family names its `block_class` and `state_class`.

    One forward serves training, prefill and decoding: `logits, state = model(idx, state)`.
    """

    block_class: Callable[..., nn.Module]
    state_class: type[State]

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        # Given its weight, because drawing one costs time, and on "meta" seconds of imports.
        rows = torch.empty(config.vocab_size, config.n_embd, device=device)
        self.emb = nn.Embedding(config.vocab_size, config.n_embd, _weight=rows)
        self.blocks = nn.ModuleList(self.block_class(config, layer, device) for layer in range(config.n_layer))
        self.ln_out = LayerNorm(config.n_embd, config.norm_eps, device)
        self.head = Linear(config.n_embd, config.vocab_size, device)

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros, or the tuned state the checkpoint came with."""
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
        fresh: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """Read tokens: logits for what follows each of them, and the state after them.

        idx: (B, T) int64, T >= 0. state: of B rows, never changed; None begins anew. lengths: (B,) real tokens a row
        for right-padded batches; logits at padded places mean nothing. fresh: (B, T) bool, True for tokens at which a
        document begins, with a state of zeros (a tuned initial state counts for a row's first token only). readout:
        what is to be done with the head and its input (B, T, C), whose answer then comes in place of logits. Returns
        float32 logits (B, T, vocab_size), or with `last=True` only those after each row's last real token,
        (B, 1, vocab_size), which spares the head's product for all others. Raises TokenizerError for an id outside the
        vocabulary and StateError for a state of another model.
        """
        self._check(idx, state, last)
        layout = TokenMask.of(lengths, fresh, idx)
        before = self.initial_state(idx.shape[0]) if state is None else state
        x = cast(Any, self.blocks[0]).ln0(self.emb(idx).float())  # (B, T, C)
        layers: list[dict[str, Tensor]] = []
        for number, block in enumerate(self.blocks):
            x, after = block(x, before, number, layout)
            layers.append(after)
        new_state = self.state_class(**{name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})
        return self._read_out(x, layout, last, readout), new_state

    def _read_out(self, x: Tensor, layout: TokenMask, last: bool, readout: Readout | None) -> Tensor:
        """What `forward` answers of the last block's output x (B, T, C)."""
        if last:
            x = self._last(x, layout)
        x = self.ln_out(x)
        logits: Tensor = self.head(x) if readout is None else readout(self.head, x)
        return logits

    def _last(self, x: Tensor, layout: TokenMask) -> Tensor:
        if layout.lengths is None:
            return x[:, -1:]
        if bool((layout.lengths < 1).any()):
            raise UsageError("last=True needs at least one token in every row")
        return x[torch.arange(x.shape[0], device=x.device), layout.lengths - 1][:, None]

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
