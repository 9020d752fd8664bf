"""`fledge bench cpu` and `fledge bench plot`: their options, tables and JSON line. The benchmark: tests/bench/cpu."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench import suite
from fledge.core.errors import FledgeError

SMALL = ["--vocab", "256", "--prompt", "6", "--tokens", "3", "--batch", "2", "--threads", "1", "--no-peers"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs of the workers. Each is answered immediately."""
    import numpy as np

    received: list[dict[str, Any]] = []

    def answer(module: str, job: dict[str, Any], _environment: dict[str, str]) -> dict[str, Any]:
        if module == "fledge.bench.machine_limits":
            arithmetic = {"float32": 1e9, "bfloat16": 2e9, "int16": 4e9}
            return {"read": 1e6, "registers": arithmetic, "products": {}, "instruction_set": "some"}
        received.append(job)
        np.savez(job["logits"], prompt=np.arange(9.0))
        times = dict.fromkeys(("import_s", "load_s", "first_token_s", "prefill_s", "decode_s", "batch_s"), 2.0)
        return {**times, "peak_bytes": 2**20, "batch_peak_bytes": 2**21, "matrix_bytes": 200_000}

    monkeypatch.setattr(suite, "run_in_fresh_process", answer)
    return received


def test_tables_json_line_record_and_plot(fledge: Any, jobs: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    path, picture = tmp_path / "record.json", tmp_path / "again.png"
    options = ["--shape", "L2-D64,l1-d64", "--shape", "L1-D128", "--widths", "bf16,int8", "--repeats", "3"]
    command = ["bench", "cpu", *options, *SMALL, "--record", str(path)]
    monkeypatch.setattr("sys.argv", ["fledge", *command])
    result = fledge(*command)
    assert result.code == 0 and len(jobs) == 3 * 2 * 3, result.messages
    lines = result.text.splitlines()
    assert "limits: 0.0 GB/s read, 1 GFLOP/s float32, 2 GFLOP/s bfloat16, 4 GFLOP/s int16" in lines
    row = " ".join(next(line for line in lines if line.startswith("fledge int8")).split())
    assert row == "fledge int8 3.0 ±0% 0 (0%) 1.5 ±0% 0.0 (30%) 3.0 ±0% 1 MiB 2.00 s 2.00 s"
    assert (
        lines.count(
            "int8: 30% of the memory bandwidth; 0% of the arithmetic; batch of 2: 2.0x the throughput of one text"
        )
        == 3
    )
    last = json.loads(lines[-1])
    assert list(last) == ["L2-D64", "L1-D64", "L1-D128"]
    assert last["L1-D128"]["tokens_per_s"]["fledge bf16"] == {"prefill": 3.0, "decode": 1.5, "batch": 3.0}
    record = json.loads(path.read_text())
    assert record["command"].startswith("fledge bench cpu --shape") and len(record["models"]) == 3
    if find_spec("matplotlib") is not None:
        assert fledge("bench", "plot", path, picture).code == 0 and picture.stat().st_size > 1000


def test_batch_of_one_is_not_measured(fledge: Any, jobs: list[Any]) -> None:
    small = [*SMALL, "--batch", "1"]
    result = fledge("bench", "cpu", "--shape", "L1-D64", "--widths", "int8", "--repeats", "1", *small)
    assert result.code == 0 and len(jobs[0]["batch"]) == 1 and "fewer than 3 repeats" in result.messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--widths", "bf16,int3"], ["widths is 'bf16,int3'"]),
        (["--shape", "L2-D64,big"], ["shape 'big' is not of the form L12-D768"]),
        (["--shape", "L2-D64", "--model", "m.pth"], ["exclude each other"]),
        (["--plot", "p.jpg"], ["a plot is a .png"]),
        (["--family", "gosling", "--shape", "L2-D64"], ["family is 'gosling'"]),
    ],
)
def test_usage_errors(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "cpu", *arguments).check_error(2, *words)


def test_a_missing_record(fledge: Any, tmp_path: Path) -> None:
    fledge("bench", "plot", tmp_path / "none.json", tmp_path / "p.png").check_error(2, "cannot be read as a record")


def test_a_baseline_that_crashes_is_reported(fledge: Any, jobs: list[Any], monkeypatch: Any) -> None:
    pytest.importorskip("rwkv")
    answer = suite.run_in_fresh_process

    def crash(module: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        if job.get("program") == "rwkv":
            raise FledgeError("exit code -11")
        return answer(module, job, environment)

    monkeypatch.setattr(suite, "run_in_fresh_process", crash)
    settings = ["--family", "eagle", "--shape", "L1-D64", "--widths", "bf16", "--repeats", "1", *SMALL, "--peers"]
    result = fledge("bench", "cpu", *settings)
    assert result.code == 0 and "rwkv fp32  failed: exit code -11" in result.text.splitlines()
    assert json.loads(result.text.splitlines()[-1])["L1-D64"]["tokens_per_s"]["rwkv bf16"] == {"error": "exit code -11"}
