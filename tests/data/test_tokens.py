"""The token store."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.errors import UsageError
from fledge.data.tokens import open_tokens, write_tokens


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
