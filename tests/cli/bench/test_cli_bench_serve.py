"""`fledge bench serve`: its options and tables. The benchmark: tests/bench/serve."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.cli.bench.serve import _print_tables


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients", "two"], ["clients is 'two'; give whole numbers"]),
        (["--tokens", "0"], ["tokens is 0; it must be at least 1"]),
        (["--plot", "p.jpg"], ["a plot is a .png"]),
    ],
)
def test_usage_errors(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "serve", *arguments).check_error(2, *words)


def test_the_tables_of_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"first_s": {"median": 0.01, "p95": 0.02}, "gaps_s": {"median": 0.003, "p95": 0.004}}
    load = {"clients": 4, "tokens_per_s": {"median": 100.0}, **times, "engine_tokens_per_s": {"median": 110.0}}
    document = {"tokens": 300, "cold_s": [0.2], "warm_s": [0.1], "peer_error": "it crashed"}
    target = {"name": "overhead at 4 clients", "value": 0.09, "limit": 0.05, "met": False}
    record = {"model": "some", "loads": [load | {"peer_error": "it crashed"}], "documents": [document]}
    _print_tables({**record, "targets": [target]})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "4 server 100 10.0 ms 20.0 ms 3.0 ms 4.0 ms" in lines and "4 engine alone 110" in lines
    assert "4 clients, llama-cpp-python failed: it crashed" in lines
    assert "300 tokens, to the first token: cold 200.0 ms, warm 100.0 ms, llama-cpp-python failed: it crashed" in lines
    assert "overhead at 4 clients 0.05 0.09 missed" in lines
