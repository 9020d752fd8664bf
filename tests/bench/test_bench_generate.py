"""The generation benchmark: what it computes from measurements, and one real run of each program."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.bench import generate
from fledge.bench.generate import Configuration, Spec, run
from fledge.core.errors import FledgeError

TINY: dict[str, Any] = {"shape": "L2-D64", "vocab": 300, "prompt": 9, "tokens": 3, "threads": 1}


def fake(monkeypatch: pytest.MonkeyPatch, difference: float = 0.0) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Answer every measurement; `rwkv` takes twice as long, with JIT only to load, and its logits differ."""
    seen: list[tuple[dict[str, Any], dict[str, str]]] = []

    def answer(module: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        assert module == "fledge.bench.worker" and Path(job["checkpoint"]).is_file()
        seen.append((job, environment))
        peer, jit = job["subject"] == "rwkv", environment["RWKV_JIT_ON"] == "1"
        torch.save(torch.tensor([1.0, 1.0 + peer * difference]), job["logits"])
        slow = 2.0 if peer else 1.0
        return {
            "import_s": 1.0,
            "load_s": 2 * slow if jit else slow,
            "first_token_s": slow,
            "prefill_s": 1.0 if jit else slow,
            "decode_s": slow,
            "peak_bytes": 100,
        }

    monkeypatch.setattr(generate, "in_fresh_process", answer)
    return seen


def test_every_program_gets_the_same_and_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake(monkeypatch)
    calls: list[tuple[str, int, int]] = []
    outcome = run(Spec(**TINY, peer=True, repeats=2), lambda *call: calls.append(call))
    assert len(seen) == 12 and [call[1:] for call in calls] == [(done, 12) for done in range(12)]
    assert len({(str(job["prompt"]), job["checkpoint"], job["tokens"], job["threads"]) for job, _ in seen}) == 1
    assert {environment["OMP_NUM_THREADS"] for _, environment in seen} == {"1"}
    assert [call[0] for call in calls[:6]] != [call[0] for call in calls[6:]]
    assert list(outcome.figures) == [
        Configuration(program, dtype) for dtype in ("fp32", "bf16") for program in ("fledge", "rwkv", "rwkv jit")
    ]


def test_ratios_are_against_the_better_of_the_peer_in_each_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    outcome = run(Spec(**TINY, peer=True, dtypes=("fp32",), repeats=1))
    expected = {"prefill": 1.0, "decode": 2.0, "load": 2.0, "first_token": 2.0, "memory": 1.0}
    assert outcome.ratios() == {"fp32": expected}
    record = outcome.record("the command")
    assert record["command"] == "the command" and record["model"]["parameters"] > 0
    assert record["figures"]["fledge fp32"]["prefill_tokens_per_s"]["median"] == 9.0


def test_no_figures_where_the_programs_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    for difference in (0.1, float("nan")):
        fake(monkeypatch, difference)
        with pytest.raises(FledgeError, match=r"in fp32 the logits of fledge and rwkv differ"):
            run(Spec(**TINY, peer=True, dtypes=("fp32",), repeats=1))
        assert run(Spec(**TINY, peer=True, dtypes=("bf16",), repeats=1)).differences.keys() == {"bf16"}


def test_without_a_peer_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    outcome = run(Spec(**TINY, dtypes=("fp32",), repeats=1))
    assert outcome.ratios() == {} and outcome.record("")["peer"] is None


def test_a_real_measurement() -> None:
    outcome = run(Spec(**TINY, dtypes=("bf16",), repeats=1))
    (figures,) = outcome.figures.values()
    assert figures.prefill.median > 0 and figures.decode.median > 0 and figures.load.median > 0
    assert figures.peak is None or figures.peak.median > 1e7
    assert outcome.model["file_dtype"] == "bfloat16" and outcome.model["n_layer"] == 2


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs the PyPI package rwkv")
def test_a_real_comparison() -> None:
    outcome = run(Spec(**TINY, peer=True, repeats=1))
    assert 0 < outcome.differences["fp32"] < 0.03 and outcome.differences["bf16"] < 0.2
    assert set(outcome.ratios()) == {"fp32", "bf16"} and all(ratio > 0 for ratio in outcome.ratios()["fp32"].values())
