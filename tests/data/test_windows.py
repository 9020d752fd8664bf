"""Training windows: each position once per epoch, resuming, document starts, and the order of RWKV-LM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fledge.core.errors import UsageError
from fledge.data.windows import OfficialWindows, Windows, find_magic_prime


def test_windows_visit_every_position_once_per_epoch_and_are_reproducible() -> None:
    tokens = np.arange(1, 1015, dtype=np.uint16)
    windows = Windows(tokens, length=10, batch=4, seed=7)
    assert windows.per_epoch == 25
    offsets = {int(windows[25 * epoch].idx[0, 0] - 1) % 10 for epoch in range(40)}
    assert len(offsets) > 5  # each epoch has a random offset
    rows = np.concatenate([windows[n].idx.numpy() for n in range(25)])
    assert rows.shape == (100, 11)
    assert (np.diff(rows, axis=1) == 1).all()
    starts = sorted(rows[:, 0])
    assert len(set(starts)) == 100 and (np.diff(starts) == 10).all()
    assert torch.equal(Windows(tokens, 10, 4, seed=7)[13].idx, windows[13].idx)
    assert not torch.equal(Windows(tokens, 10, 4, seed=8)[13].idx, windows[13].idx)
    assert not torch.equal(windows[25].idx, windows[0].idx)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="20 tokens are too few"):
        Windows(np.zeros(20, dtype=np.uint16), length=10, batch=4, seed=0)


def test_a_document_starts_at_a_separator() -> None:
    tokens = np.arange(1, 201, dtype=np.uint16)
    tokens[::7] = 0
    assert Windows(tokens, 10, 2, seed=0)[0].document_start is None
    batch = Windows(tokens, 10, 2, seed=0, reset_at_document=True)[3]
    assert batch.document_start is not None and batch.document_start.any()
    assert torch.equal(batch.document_start, batch.idx[:, :-1] == 0)
    assert batch.targets == 20 and batch.rows(slice(0, 1)).targets == 10


def test_official_windows_have_the_order_of_rwkv_lm() -> None:
    # The published values for the 1,498,226,207 tokens of MiniPile.
    assert find_magic_prime(1_498_226_207 // 4096) == 365_759
    assert find_magic_prime(1_498_226_207 // 512) == 2_926_181
    tokens = np.arange(301, dtype=np.uint16)
    windows = OfficialWindows(tokens, length=10, batch=3)
    assert windows.prime == 29 and windows.per_epoch == 9
    starts = [int(windows[number].idx[row, 0]) for number in range(9) for row in range(3)]
    assert starts[:3] == [17 % 29 * 10, 17 * 8 % 29 * 10, 17 * 27 % 29 * 10]
    assert len(set(starts)) == 27 and all(start % 10 == 0 for start in starts)
    with pytest.raises(UsageError, match="too few for the official order"):
        find_magic_prime(2)
