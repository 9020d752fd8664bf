"""The token store and its windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fledge.core.errors import UsageError
from fledge.data.tokens import Windows, open_tokens, write_tokens


def test_documents_are_separated_by_zero(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    assert write_tokens(path, iter([[5, 65535], [], [7]])) == 6
    assert open_tokens(path).tolist() == [5, 65535, 0, 0, 7, 0]
    with pytest.raises(UsageError, match="run the prepare step"):
        open_tokens(tmp_path / "absent")
    (tmp_path / "odd").write_bytes(b"12345")
    with pytest.raises(UsageError, match="run the prepare step"):
        open_tokens(tmp_path / "odd")
    with pytest.raises(UsageError, match="token id 65536 does not fit"):
        write_tokens(tmp_path / "large", iter([[65536]]))


def test_windows_visit_every_place_once_an_epoch_and_can_be_reopened() -> None:
    tokens = np.arange(1, 1015, dtype=np.uint16)
    windows = Windows(tokens, length=10, batch=4, seed=7)
    assert windows.per_epoch == 25
    phases = {int(windows[25 * epoch][0, 0] - 1) % 10 for epoch in range(40)}
    assert len(phases) > 5  # every epoch cuts elsewhere
    rows = np.concatenate([windows[n] for n in range(25)])
    assert rows.shape == (100, 11)
    assert (np.diff(rows, axis=1) == 1).all()
    starts = sorted(rows[:, 0])
    assert len(set(starts)) == 100 and (np.diff(starts) == 10).all()
    assert np.array_equal(Windows(tokens, 10, 4, seed=7)[13], windows[13])
    assert not np.array_equal(Windows(tokens, 10, 4, seed=8)[13], windows[13])
    assert not np.array_equal(windows[25], windows[0])


def test_too_few_tokens() -> None:
    with pytest.raises(UsageError, match="20 tokens are too few"):
        Windows(np.zeros(20, dtype=np.uint16), length=10, batch=4, seed=0)
