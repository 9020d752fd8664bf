"""The data guide works as it is written: its config, its commands in order, its Python."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from test_docs import REPO, blocks, check_options, parse, text_of

from fledge.cli.main import main
from fledge.data.pipeline.config import build_config, tomllib

PAGE = "docs/guides/data.md"


def test_commands_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> None:
    pytest.importorskip("rensa")
    for name in ("docs", "fledge"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    page = text_of(PAGE)
    configs = blocks(page, "toml")
    assert configs[0].startswith("# small.toml")
    (tmp_path / "small.toml").write_text(configs[0], encoding="utf-8")
    lines = [parse(PAGE, line) for block in blocks(page, "sh") for line in block.splitlines()]
    ran = []
    for line in filter(None, lines):
        check_options(line.arguments)
        if "--ray" in line.arguments:  # tests/peers/test_peer_ray.py
            continue
        code = main([*line.arguments, *(["--workers", "1"] if line.arguments[1] == "build" else [])])
        output, messages = capsysbinary.readouterr()
        assert code == 0 and output, f"{shlex.join(line.arguments)}: {messages.decode()}"
        ran.append(line.arguments[1])
    assert ran == ["build", "info", "check", "info", "steps", "recipe", "build"]
    (code,) = blocks(page, "python")
    exec(code, {})
    assert b"code:python" in capsysbinary.readouterr().out


def test_every_block_of_toml_is_a_config() -> None:
    for block in blocks(text_of(PAGE), "toml")[1:]:
        build_config({"sources": [{"path": "x"}], **tomllib.loads(block)})
