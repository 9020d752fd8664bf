"""Atomic writes, readable disk errors, secrets and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from racing import race

from fledge.core.files import (
    atomic_path,
    describe_disk_error,
    get_asset_path,
    get_cache_folder,
    hash_file,
    read_json,
    read_or_create_secret,
    write_json,
)


def test_a_file_is_replaced_only_if_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with atomic_path(target) as part:
        part.write_bytes(b"one")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_path(target) as part:
        part.write_bytes(b"half of tw")
        raise RuntimeError
    assert target.read_bytes() == b"one"
    assert list(target.parent.iterdir()) == [target], "a temporary file was left behind"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("5632 requested and 5109 written"),  # numpy's
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch's
    ],
    ids=["the system's", "numpy's", "torch's"],
)
def test_a_disk_full_error_names_the_file(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "file.bin"
    with pytest.raises(OSError, match="file") as caught, atomic_path(target):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    description = describe_disk_error(caught.value, tmp_path / "run", "two pieces are kept")
    free = (
        rf"the disk of {tmp_path}/run is full \(\d+\.\d GB are free\), {target} cannot be written; free some space and "
    )
    assert re.fullmatch(free + "run the same command again: two pieces are kept", description)
    assert list(tmp_path.iterdir()) == []


def test_other_write_errors_are_unchanged(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "Permission denied", "x"), RuntimeError("odd"), OSError("odd")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "file.bin"):
            raise error
        assert caught.value is error
    denied = PermissionError(errno.EACCES, "Permission denied", "x")
    assert describe_disk_error(denied, tmp_path) == "x: Permission denied; run the same command again"
    large = OSError(errno.EFBIG, "File too large", "x")
    assert "GB are free; File too large), x cannot be written; free some space" in describe_disk_error(large, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    ordinary, atomic = tmp_path / "ordinary", tmp_path / "atomic"
    ordinary.touch()
    with atomic_path(atomic) as part:
        part.write_bytes(b"")
    assert atomic.stat().st_mode == ordinary.stat().st_mode


CREATOR_CODE = """
import os, sys
from pathlib import Path
from fledge.core.files import read_or_create_secret
print("ready", flush=True)
sys.stdin.readline()
print(read_or_create_secret(Path(sys.argv[1]), os.urandom(16).hex().encode()).decode())
"""


def test_processes_that_create_a_secret_together_get_the_same_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "secret"
    secrets = set(race(CREATOR_CODE, str(target), count=4))
    assert secrets == {target.read_text(encoding="ascii")} and list(target.parent.iterdir()) == [target]
    assert read_or_create_secret(target, b"late") == target.read_bytes() != b"late"


@pytest.mark.parametrize("links", [True, False])
def test_a_secret_is_created_once_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    with ThreadPoolExecutor(8) as pool:
        secrets = set(
            pool.map(lambda number: read_or_create_secret(tmp_path / "secret", b"%d" % number * 32), range(8))
        )
    assert secrets == {(tmp_path / "secret").read_bytes()} and len(list(tmp_path.iterdir())) == 1
    if os.name == "posix":
        assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_an_empty_secret_is_not_created_again(tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    assert read_or_create_secret(tmp_path / "secret", b"new") == b""


def test_sha256_of_more_than_one_block(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    assert hash_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_assets_are_in_the_package() -> None:
    assert get_asset_path("world-vocabulary.xz").is_file()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_cache_folder() == tmp_path / "fledge" and not get_cache_folder().exists()
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name == "posix":
        assert tmp_path in get_cache_folder().parents


def test_json_is_written_and_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "r.json", {"a": [1, "é"]})
    assert json.loads((tmp_path / "new" / "r.json").read_text(encoding="utf-8")) == {"a": [1, "é"]}
    assert read_json(tmp_path / "new" / "r.json") == {"a": [1, "é"]}
