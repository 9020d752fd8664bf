"""Fakes with the real interfaces: a tokenizer with chosen tokens, and a model that generates chosen replies.

`FakeModel` has the properties of a model: it takes and returns a state, several calls equal one call with all tokens,
and no state is modified. Its state records the tokens read, so two states are equal exactly if the same tokens led to
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from random_checkpoints import random_checkpoint
from torch import Tensor, nn

from fledge.models import build
from fledge.models.config import ModelConfig
from fledge.models.state import State, WkvState, zero_state

EOS = 0
PRIME = 16_777_213  # below 2**24, so float32 represents every remainder exactly


class ByteTokenizer:
    """Id 0 ends a text, ids 1 to 256 are the bytes, higher ids are the tokens `longer`. The longest match is used."""

    def __init__(self, *longer: bytes | str) -> None:
        extra = [token.encode() if isinstance(token, str) else token for token in longer]
        self.tokens = [b"", *(bytes([value]) for value in range(256)), *extra]
        self.eos_id = EOS
        self.vocab_size = len(self.tokens)
        self._longest_first = sorted(range(1, self.vocab_size), key=lambda token: -len(self.tokens[token]))

    def encode(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids, position = [], 0
        while position < len(data):
            token = next(token for token in self._longest_first if data.startswith(self.tokens[token], position))
            ids.append(token)
            position += len(self.tokens[token])
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def get_id(self, token: bytes | str) -> int:
        """The id of one token."""
        return self.tokens.index(token.encode() if isinstance(token, str) else token)


class FakeModel(nn.Module):
    """After each `cue` it reads, it generates the tokens of the next of `replies`, then the eos id.

    The last reply repeats forever. The state contains: tokens read, a hash of them, the reply, the position in it.
    `sharpness` is the logit of the expected token; all others have 0.
    """

    def __init__(self, replies: Sequence[Sequence[int]], cue: int, vocab_size: int, sharpness: float = 50.0) -> None:
        super().__init__()
        self.config = ModelConfig("6.0", vocab_size, 1, 4, 4, 8, n_head=2, mix_rank=1, decay_rank=1)
        self.replies, self.cue, self.sharpness = [list(reply) for reply in replies], cue, sharpness
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[int] = []  # number of tokens of each call
        self.fail_after: int | None = None  # number of calls before KeyboardInterrupt

    def initial_state(self, batch: int) -> State:
        return zero_state(self.config, batch)

    def forward(
        self, idx: Tensor, state: State | None = None, *, lengths: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, State]:
        if idx.shape[0] > 1:
            return self._batch(idx, state, last)
        assert lengths is None
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise KeyboardInterrupt
        self.calls.append(idx.shape[1])
        state = self.initial_state(1) if state is None else state
        assert isinstance(state, WkvState)
        memory = [int(number) for number in state.att_shift[0, 0]]
        logits = torch.zeros(1, idx.shape[1], self.config.vocab_size)
        for t, token in enumerate(idx[0].tolist()):
            memory = self._read(memory, token)
            logits[0, t, self._expected(memory)] = self.sharpness
        after = WkvState(torch.tensor(memory).float().view(1, 1, 4), state.wkv, state.ffn_shift)
        return logits[:, -1:] if last else logits, after

    def _batch(self, idx: Tensor, state: State | None, last: bool) -> tuple[Tensor, State]:
        rows = [self(idx[b : b + 1], None if state is None else state.rows(b), last=last) for b in range(len(idx))]
        return torch.cat([logits for logits, _ in rows]), WkvState.stack([after for _, after in rows])

    def _read(self, memory: list[int], token: int) -> list[int]:
        count, digest, reply, position = memory
        digest = (digest * 257 + token + 1) % PRIME
        if token == self.cue:
            return [count + 1, digest, reply + 1, 0]
        return [count + 1, digest, reply, position + 1]

    def _expected(self, memory: list[int]) -> int:
        reply = self.replies[min(max(memory[2] - 1, 0), len(self.replies) - 1)]
        return reply[memory[3]] if memory[3] < len(reply) else EOS


def random_finch(vocab_size: int = 257, tuned_state: bool = False) -> nn.Module:
    """A small real model with random weights."""
    config = ModelConfig("6.0", vocab_size, 2, 32, 32, 96, n_head=4, mix_rank=8, decay_rank=12, tuned_state=tuned_state)
    model = build(config, "meta")
    tensors = random_checkpoint("6.0", n_layer=2, n_embd=32, vocab_size=vocab_size, tuned_state=tuned_state)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def equal_states(one: State, other: State) -> bool:
    """Whether two states contain the same numbers."""
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
