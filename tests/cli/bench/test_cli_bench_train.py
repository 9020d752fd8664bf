"""`fledge bench train`: its options, table and JSON line. The benchmark: tests/bench/train."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench import suite
from fledge.bench.train import benchmark

SMALL = ["--shape", "L2-D64", "--vocab", "50", "--tokens", "24", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs of the workers. Each is answered immediately."""
    received: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmark, "has_native_recurrence", lambda _device: False)

    def answer(_module: str, job: dict[str, Any], _environment: dict[str, str]) -> dict[str, Any]:
        received.append(job)
        if job["kind"] == "product":
            return {"operations_per_s": 1e9}
        if job["kind"] == "passing":
            return {"peak_bytes": 2**20 if job["length"] == 2048 else 2**21}
        if job["kind"] == "kernel":
            return {"seconds": [1.0 if job["backend"] == "chunked" else 30.0]}
        seconds = [2.0 if job["program"] == "transformer" else 1.0]
        times = dict.fromkeys(("forward_s", "backward_s", "update_s", "cpu_s"), seconds)
        return {**times, "loss": 3.9, "before_bytes": 50, "peak_bytes": 2**20}

    monkeypatch.setattr(suite, "run_in_fresh_process", answer)
    return received


def test_table_json_line_record_and_plot(fledge: Any, jobs: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    path, picture = tmp_path / "record.json", tmp_path / "again.png"
    command = ["bench", "train", "--lengths", "6,12", "--dtypes", "fp32", "--loop", "6", *SMALL, "--record", str(path)]
    monkeypatch.setattr("sys.argv", ["fledge", *command])
    result = fledge(*command)
    assert result.code == 0 and len(jobs) == 3 * (4 + 4 + 3 + 2), result.messages
    lines = result.text.splitlines()
    assert "the recurrence alone, 8 x 1024 tokens, 1 heads of 64: chunked 30.0x the speed of the loop" in lines
    rows = [" ".join(line.split()) for line in lines]
    assert "6 fp32 finch 8.0 ±0% 1.00 s 1.00 s 1.00 s 1 MiB 0 (1%)" in rows
    assert any(row.startswith("12 fp32 transformer 4.0 ±0% 2.00x 2.00 s") for row in rows)
    assert "state passing: peak memory of 2 MiB at 65,536 tokens, +100.0% to 2,048" in lines
    last = json.loads(lines[-1])
    assert last["passing_growth"] == 1.0 and last["targets"]["fp32 12"] == {
        "rate_to_transformer": 2.0,
        "cpu_time_of_transformer": 0.5,
        "memory_of_transformer": 1.0,
    }
    assert last["kernel_to_loop"] == {rows: {"chunked": 30.0} for rows in "18"} and "GPUs only" in result.messages
    record = json.loads(path.read_text())
    assert record["command"].startswith("fledge bench train --lengths") and len(record["groups"]) == 2
    if find_spec("matplotlib") is not None:
        assert fledge("bench", "plot", path, picture).code == 0 and picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "6,many"], ["lengths is '6,many'; give whole numbers"]),
        (["--lengths", "7"], ["each must divide the 24 tokens"]),
        (["--dtypes", "int8"], ["dtypes is 'int8'"]),
        (["--plot", "p.jpg"], ["a plot is a .png"]),
    ],
)
def test_usage_errors(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "train", *SMALL, *arguments).check_error(2, *words)
