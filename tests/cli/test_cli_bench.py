"""`fledge bench generate`: options in, table and one JSON line out. The measuring is tested in tests/bench."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fledge.bench import generate as benchmark


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs that would be measured; each is answered at once."""
    import torch

    found: list[dict[str, Any]] = []

    def answer(_module: str, job: dict[str, Any], _environment: dict[str, str]) -> dict[str, Any]:
        found.append(job)
        torch.save(torch.arange(5.0), job["logits"])
        fast = 1.0 if job["subject"] == "fledge" else 2.0
        times = dict.fromkeys(("import_s", "load_s", "first_token_s", "prefill_s", "decode_s"), fast)
        return {**times, "peak_bytes": int(fast * 2**20), "threads": job["threads"], "ids": [1]}

    monkeypatch.setattr(benchmark, "in_fresh_process", answer)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _name: object())
    return found


def test_table_json_line_and_record(fledge: Any, jobs: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "record.json"
    command = shlex.split(
        f"bench generate --shape L2-D64 --vocab 300 --peer --dtypes fp32 --prompt 6 --tokens 3 --repeats 3 "
        f"--threads 1 --record {path}"
    )
    monkeypatch.setattr("sys.argv", ["fledge", *command])
    result = fledge(*command)
    assert result.code == 0 and len(jobs) == 9 and len(jobs[0]["prompt"]) == 6 and jobs[0]["threads"] == 1
    assert "fledge fp32" in result.text and "rwkv jit fp32" in result.text and "prefill 2.00x" in result.text
    last = json.loads(result.text.splitlines()[-1])
    assert last["tokens_per_s"]["fledge fp32"] == {"prefill": 6.0, "decode": 3.0}
    assert last["ratios_to_the_best_peer"]["fp32"]["memory"] == 2.0
    record = json.loads(path.read_text())
    assert record["command"] == shlex.join(["fledge", *command]) and record["machine"]["torch"]
    assert record["figures"]["rwkv fp32"]["load_s"]["values"] == [2.0] * 3 and record["settings"]["repeats"] == 3


def test_a_model_in_any_format(fledge: Any, jobs: list[Any], pruned_model: Path) -> None:
    result = fledge("bench", "generate", "-m", pruned_model, "--dtypes", "bf16", "--repeats", "1", "--prompt", "2")
    assert result.code == 0 and len(jobs) == 1 and jobs[0]["checkpoint"].endswith("pruned.pth")
    assert "fewer than 3 repeats" in result.messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "12x768"], ["shape '12x768' is not like L12-D768"]),
        (["--shape", "L2-D65"], ["a width that 64 divides"]),
        (["--shape", "L2-D64", "--model", "m.pth"], ["exclude each other"]),
        (["--dtypes", "fp32,int4"], ["dtypes is 'fp32,int4'"]),
        (["--repeats", "0"], ["repeats is 0"]),
    ],
)
def test_mistakes(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "generate", *arguments).check_error(2, *words)


def test_a_peer_that_is_not_installed(fledge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _name: None)
    fledge("bench", "generate", "--peer").check_error(2, "rwkv is not installed", 'pip install "fledge[bench]"')
