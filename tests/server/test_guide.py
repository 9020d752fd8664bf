"""The Python code of the serving guide runs against a server with the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from live_server import serving

import fledge

pytest.importorskip("openai", reason="openai is not installed")
pytestmark = pytest.mark.peer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "serving.md"


def test_the_code_of_the_guide_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 4
    with serving(fledge.load(), tmp_path) as server:
        code = "\n".join(blocks).replace("http://127.0.0.1:8000", server.url)
        names: dict[str, object] = {}
        exec(compile(code, str(GUIDE), "exec"), names)
        names["client"].close()  # type: ignore[attr-defined]
    output = capsys.readouterr().out
    assert '{"name":' in output and "tokens read" in output and len(output.splitlines()) >= 6
