"""The packaged World vocabulary: its layout both ways, the facts published about it, and damage."""

from __future__ import annotations

import importlib.util
import lzma
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fledge.core.errors import TokenizerError
from fledge.core.files import get_asset_path
from fledge.tokenizer import vocabulary_file

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts" / "make_world_vocabulary.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


def test_published_facts() -> None:
    tokens = vocabulary_file.read()
    assert len(tokens) == len(set(tokens)) == 65529
    assert tokens == sorted(tokens, key=lambda token: (len(token), token))
    assert tokens[:256] == [bytes([value]) for value in range(256)]
    assert tokens[-1] == b" " * 128
    lengths = Counter(map(len, tokens))
    assert (lengths[1], lengths[2], lengths[3]) == (256, 3063, 15913)
    replaced = [token for token in tokens if "\ufffd" in token.decode(errors="replace")]
    real = [token for token in replaced if "\ufffd".encode() in token]
    assert (len(replaced) - len(real), len(real)) == (486, 6)
    assert sum(b"\n" in token for token in tokens) == 154


def test_digits_come_alone_or_in_pairs() -> None:
    bare = [token.strip(b" ") for token in vocabulary_file.read()]
    assert {len(token) for token in bare if token.isdigit()} == {1, 2}


@pytest.mark.parametrize("tokens", [[b"a"], [b"a", b"b", b"aa"], [b"\x00", b"\xff", b"  ", b"x" * 200]])
def test_pack_and_unpack(tokens: list[bytes]) -> None:
    assert vocabulary_file.unpack(vocabulary_file.pack(tokens)) == tokens


def test_compression_is_deterministic() -> None:
    payload = vocabulary_file.pack([b"a", b"bb"])
    assert vocabulary_file.compress(payload) == vocabulary_file.compress(payload)
    assert lzma.decompress(vocabulary_file.compress(payload)) == payload


def test_the_packaged_file_is_small() -> None:
    assert get_asset_path(vocabulary_file.FILE_NAME).stat().st_size < 120_000


def test_damage_is_named(tmp_path: Path) -> None:
    good = get_asset_path(vocabulary_file.FILE_NAME).read_bytes()
    for name, content in {
        "empty": b"",
        "cut": good[:50_000],
        "text": b"no xz here",
        "other": lzma.compress(b"another payload"),
        "bomb": lzma.compress(bytes(5_000_000)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            vocabulary_file.read(tmp_path / name)
    with pytest.raises(TokenizerError, match="missing"):
        vocabulary_file.read(tmp_path / "missing")


@pytest.mark.peer
def test_the_script_finds_the_packaged_file_up_to_date() -> None:
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("needs the package rwkv")
    command = [sys.executable, str(SCRIPT), "--check"]
    run = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_script_refuses_another_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("1 'a' 1\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "vocabulary.txt"), "--check"]
    run = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "SHA-256" in run.stderr
