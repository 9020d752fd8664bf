"""The training benchmark: what it measures in which order, what it computes from it, and one real run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.bench import train, train_worker
from fledge.bench.counting import matrix_numbers, training_operations
from fledge.bench.random_model import config_of
from fledge.bench.train import Spec, available, cases_of, run
from fledge.bench.train_figures import Case, utilisation
from fledge.core.errors import UsageError
from fledge.kernels import dispatch
from fledge.models import ModelConfig, build

TINY: dict[str, Any] = {"shape": "L2-D64", "vocab": 50, "tokens": 24, "device": "cpu", "threads": 1, "passing": 0}
SECONDS = {"finch": 1.0, "eagle": 1.0, "transformer": 2.0, "chunked": 1.5, "loop": 8.0, "fla": 0.5}
MEMORY = {"finch": 300, "eagle": 300, "transformer": 400, "chunked": 600, "loop": 900, "fla": 100}
KERNELS = {"native": [0.5], "chunked": [1.0, 3.0, 2.0], "reference": [50.0]}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library was there, whether it is or not."""
    monkeypatch.setattr(train, "native_runs", lambda device: device == "cpu")


class Fake:
    """Answers every measurement, in seconds by program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[dict[str, Any]] = []
        monkeypatch.setattr(train, "in_fresh_process", self.answer)

    def answer(self, module: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        assert module == "fledge.bench.train_worker" and environment == {"OMP_NUM_THREADS": "1"}
        self.jobs.append(json.loads(json.dumps(job)))
        if job["kind"] == "product":
            return {"operations_per_s": 1e9}
        if job["kind"] == "kernel":
            return {"seconds": KERNELS[job["backend"]], "peak_bytes": 7}
        if job["kind"] == "passing":
            return {"peak_bytes": 1000 + job["length"] // 1000 * 2, "loss": 3.9}
        unit = SECONDS[job["program"]] / 4
        parts = {"forward_s": [unit, unit], "backward_s": [2 * unit] * 2, "update_s": [unit, unit]}
        parts["cpu_s"] = [8 * unit, 8 * unit]
        return {**parts, "loss": 3.9, "before_bytes": 50, "peak_bytes": MEMORY[job["program"]]}


def test_programs_of_one_length_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, calls, kept = Fake(monkeypatch), list[Any](), list[int]()
    spec = Spec(**TINY, lengths=(6, 12), loop=6, repeats=2)
    outcome = run(spec, lambda *call: calls.append(call), lambda outcome: kept.append(len(outcome.groups)))
    assert [(group.dtype, group.length) for group in outcome.groups] == [
        ("fp32", 6),
        ("fp32", 12),
        ("bf16", 6),
        ("bf16", 12),
    ]
    kernels = 2 * 3 * 2  # batches, backends, repeats
    names = [job.get("program", job["kind"]) for job in fake.jobs[kernels:]]
    assert names[:6] == ["finch", "transformer", "chunked", "loop", "product", "transformer"]
    assert names[9:18] == ["finch", *["finch", "transformer", "chunked", "product"], *names[11:14], "finch"]
    assert not {"loop", "chunked"} & set(names[18:]) and len(fake.jobs) == kernels + 10 + 8 + 2 * 6
    assert [call[1:] for call in calls] == [(done, len(fake.jobs)) for done in range(len(fake.jobs))]
    assert calls[kernels][0] == "fp32, 6 tokens, finch" and kept == [0, 0, 1, 2, 3, 4]
    steps = {job["program"]: job for job in fake.jobs if job["kind"] == "step" and job["length"] == 6}
    assert (steps["finch"]["rows"], steps["loop"]["rows"], steps["finch"]["steps"]) == (4, 1, 2)
    assert steps["loop"]["config"] == steps["finch"]["config"] == asdict(config_of("L2-D64", 50))
    assert ModelConfig(**steps["transformer"]["config"]) == ModelConfig.transformer(2, 64, 50)
    assert {job["threads"] for job in fake.jobs} == {1} and {job["device"] for job in fake.jobs} == {"cpu"}


def test_rates_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    outcome = run(Spec(**TINY, lengths=(6,), loop=6, repeats=3, dtypes=("fp32",)))
    (group,), record = outcome.groups, outcome.record("the command")
    ours, loop = group.figures[Case("finch", "fp32", 6, 4)], group.figures[Case("loop", "fp32", 6, 1)]
    assert ours.rate.values == (24.0,) * 3 and loop.rate.median == 6 / 8
    assert (ours.forward.median, ours.backward.median, ours.update.median) == (0.25, 0.5, 0.25)
    assert group.targets("finch") == {
        "rate_to_transformer": 2.0,
        "cpu_time_of_transformer": 0.5,
        "memory_of_transformer": 0.75,
        "rate_to_chunked": 1.5,
        "cpu_time_of_chunked": pytest.approx(2 / 3),
        "memory_of_chunked": 0.5,
        "rate_to_loop": 32.0,
    }
    operations = training_operations(config_of("L2-D64", 50), 6)
    found = json.loads(json.dumps(record))["groups"][0]["programs"]["finch"]
    assert found["share_of_product"] == pytest.approx(operations * 24.0 / 1e9)
    assert found["model_flop_utilisation"] is None and found["peak_bytes"]["median"] == 300
    assert [kernel.gains for kernel in outcome.kernels] == [{"native": 100.0, "chunked": 25.0}] * 2
    assert record["kernel"][1]["shape"] == [8, 1024, 1, 64] and record["kernel"][0]["shape"][0] == 1
    sizes = [record["models"][name]["parameters"] for name in ("finch", "transformer")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.015) and record["command"] == "the command"
    assert "GPUs only" in record["notes"][0]


def test_operations_are_those_of_the_matrices_and_of_what_mixes_tokens() -> None:
    rwkv = config_of("L2-D64", 50)
    model = build(rwkv, "meta")
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and min(p.shape[-2:]) > 1}
    expected = sum(matrices.values()) - matrices["emb.weight"]
    assert matrix_numbers(rwkv) == (expected, 50 * 64)
    assert training_operations(rwkv, 6) == training_operations(rwkv, 600) == 6 * expected + 18 * 2 * 64 * 64
    transformer = rwkv.as_transformer()
    products = 6 * matrix_numbers(transformer)[0]
    # A text of 3 tokens has 1 + 2 + 3 meetings, each 2 products of A numbers, in 2 layers; backward twice as much.
    assert 3 * training_operations(transformer, 3) == 3 * products + 3 * 2 * (2 * 2 * 64 * 6)
    assert utilisation(98.9e12, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(0.1)
    assert utilisation(1.0, "some other", "bf16") is None


def test_what_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(**TINY, lengths=(6, 12), loop=6)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object() if name == "fla" else None)
    assert available(spec, "cuda") == (["loop", "fla"], ()) and available(spec, "cpu")[0] == ["chunked", "loop"]
    cases = [case for case in cases_of(spec, ["loop", "fla"]) if case.dtype == "bf16"]
    assert [case.program for case in cases] == ["finch", "transformer", "fla"] * 2
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    others, notes = available(spec, "cuda:1")
    assert others == ["loop"] and "pip install flash-linear-attention" in notes[0]
    others, notes = available(Spec(**TINY, lengths=(6,), family="eagle", loop=0), "cuda")
    assert others == [] and "no RWKV-5" in notes[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": (6, 7)}, "lengths is '6,7'; each must divide the 24 tokens"),
        ({"lengths": ()}, "lengths is ''"),
        ({"dtypes": ("fp16",)}, "dtypes is 'fp16'"),
        ({"steps": 0}, "steps is 0"),
        ({"family": "gosling"}, "family is 'gosling'"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Spec(**{**TINY, "lengths": (6,), **wrong})


@pytest.mark.parametrize("program", ["finch", "eagle", "transformer", "chunked", "loop"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_every_program(program: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_worker, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(dispatch, "_preferred", None)
    config = Spec(**TINY, lengths=(6,), family="eagle" if program == "eagle" else "finch").configs[program]
    job = {"kind": "step", "program": program, "config": asdict(config), "dtype": dtype, "length": 6, "rows": 2}
    found = train_worker.measure({**job, "steps": 3, "threads": torch.get_num_threads(), "device": "cpu"})
    assert len(found["cpu_s"]) == len(found["forward_s"]) == len(found["backward_s"]) == len(found["update_s"]) == 3
    assert min(found["forward_s"] + found["backward_s"]) > 0 and 0 < found["loss"] < 4.3  # ln 50 = 3.9, before training
    assert dispatch._preferred == {"chunked": "chunked", "loop": "reference"}.get(program)


def test_memory_of_state_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    outcome = run(Spec(**{**TINY, "lengths": (24,), "loop": 0, "kernel": False, "passing": 50_000}, repeats=2))
    lengths = [job["length"] for job in fake.jobs if job["kind"] == "passing"]
    assert lengths == [2048, 50_000, 50_000, 2048]  # in turn
    assert outcome.growth == pytest.approx(1100 / 1004 - 1)
    assert outcome.record("")["passing"]["peak_bytes"][50_000]["values"] == [1100, 1100]
    with pytest.raises(UsageError, match="passing is 2048; it is compared with 2048 tokens and must be more"):
        Spec(**{**TINY, "passing": 2048})


def test_a_row_is_read_by_windows() -> None:
    job = {"kind": "passing", "config": asdict(config_of("L2-D64", 50)), "length": 21, "window": 4, "through": 2}
    found = train_worker.measure({**job, "steps": 2, "threads": torch.get_num_threads(), "device": "cpu"})
    assert 0 < found["loss"] < 4.3 and found["peak_bytes"] > 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_recurrence_and_the_product_are_timed(backend: str) -> None:
    shared = {"threads": torch.get_num_threads(), "device": "cpu"}
    job = {"kind": "kernel", "backend": backend, "shape": [2, 5, 3, 4], "repeats": 2, **shared}
    assert len(train_worker.measure(job)["seconds"]) == 2
    product = train_worker.measure({"kind": "product", "dtype": "bf16", "size": 16, **shared})
    assert product["operations_per_s"] > 0


def test_a_small_run_in_real_processes(tmp_path: Path) -> None:
    spec = Spec(**{**TINY, "lengths": (24,), "loop": 24, "dtypes": ("fp32",), "kernel": False}, steps=1, repeats=1)
    (group,) = run(spec).groups
    assert [case.program for case in group.figures] == ["finch", "transformer", "chunked", "loop"]
    assert group.product.median > 0 and all(found.rate.median > 0 for found in group.figures.values())
