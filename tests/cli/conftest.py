"""The command line, run in this process: arguments and standard input in, exit code and both streams out."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from random_checkpoints import random_checkpoint

from fledge import checkpoint
from fledge.cli.main import main
from fledge.tokenizer import prune, world_vocabulary


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    code: int
    output: bytes  # standard output
    messages: str  # standard error

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.output.decode("utf-8")

    def check_error(self, code: int, *words: str) -> None:
        """Assert one `error:` line with all `words`, nothing on standard output, and this exit code."""
        lines = self.messages.splitlines()
        assert self.output == b"" and len(lines) == 1 and lines[0].startswith("error: "), (self.output, lines)
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert self.code == code


Command = Callable[..., Result]


@pytest.fixture
def fledge(capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `fledge ARGUMENTS` with the bytes `stdin`, or None for a terminal at which nobody types."""

    def run(*arguments: str | int | Path, stdin: bytes | None = b"") -> Result:
        stream = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        if stdin is None:
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", stream)
        code = main([str(argument) for argument in arguments])
        output, messages = capsysbinary.readouterr()
        return Result(code, output, messages.decode("utf-8"))

    return run


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Finch with 256 rows: its tokens are bytes."""
    path = tmp_path_factory.mktemp("models") / "bytes.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=16, vocab_size=256), path)
    return path


@pytest.fixture(scope="session")
def pruned_model(byte_model: Path) -> Path:
    """A random Finch with a pruned World vocabulary and extras in its file."""
    vocabulary = prune(world_vocabulary(), range(300, 400))
    tensors = random_checkpoint("6.0", n_layer=2, n_embd=16, vocab_size=vocabulary.size)
    plain, path = byte_model.with_name("pruned.pth"), byte_model.with_name("pruned.safetensors")
    torch.save(tensors, plain)
    config, tensors = checkpoint.load(plain)
    extra = {"steps": 7, "corpus": "[bold]none[/bold]"}
    checkpoint.save(path, config, tensors, tokenizer_spec=vocabulary.to_spec(), extra=extra)
    return path
