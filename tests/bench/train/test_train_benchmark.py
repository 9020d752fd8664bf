"""The training benchmark: the order of its runs, its metrics, and one real run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.bench import suite
from fledge.bench.flops import count_matrix_weights, training_operations
from fledge.bench.random_model import config_of_shape
from fledge.bench.suite import run_benchmark
from fledge.bench.train import benchmark, worker
from fledge.bench.train.benchmark import TrainBenchmark, find_programs, plan_cases
from fledge.bench.train.metrics import model_flop_utilization, passing_growth
from fledge.core.errors import FledgeError, UsageError
from fledge.kernels import dispatch
from fledge.models import ModelConfig, build

TINY: dict[str, Any] = {"shape": "L2-D64", "vocab": 50, "tokens": 24, "device": "cpu", "threads": 1, "passing": 0}
SECONDS = {"finch": 1.0, "eagle": 1.0, "transformer": 2.0, "chunked": 1.5, "loop": 8.0, "fla": 0.5}
MEMORY = {"finch": 300, "eagle": 300, "transformer": 400, "chunked": 600, "loop": 900, "fla": 100}
KERNELS = {"native": [0.5], "chunked": [1.0, 3.0, 2.0], "reference": [50.0]}


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the native library is built."""
    monkeypatch.setattr(benchmark, "has_native_recurrence", lambda device: device == "cpu")


class FakeWorkers:
    """Answers every job with seconds that depend on the program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, crashing: str = "") -> None:
        self.crashing, self.jobs = crashing, list[dict[str, Any]]()
        monkeypatch.setattr(suite, "run_in_fresh_process", self.answer)

    def answer(self, module: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        assert module == "fledge.bench.train.worker" and environment == {"OMP_NUM_THREADS": "1"}
        self.jobs.append(json.loads(json.dumps(job)))
        if job["kind"] == "product":
            return {"operations_per_s": 1e9}
        if job["kind"] == "kernel":
            return {"seconds": KERNELS[job["backend"]], "peak_bytes": 7}
        if job["kind"] == "passing":
            return {"peak_bytes": 1000 + job["length"] // 1000 * 2, "loss": 3.9}
        if job["program"] == self.crashing:
            raise FledgeError("exit code -9")
        unit = SECONDS[job["program"]] / 4
        parts = {"forward_s": [unit, unit], "backward_s": [2 * unit] * 2, "update_s": [unit, unit]}
        parts["cpu_s"] = [8 * unit, 8 * unit]
        return {**parts, "loss": 3.9, "before_bytes": 50, "peak_bytes": MEMORY[job["program"]]}


def test_programs_of_one_length_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, calls, saved = FakeWorkers(monkeypatch), list[Any](), list[int]()
    settings = TrainBenchmark(**TINY, lengths=(6, 12), loop=6, repeats=2)
    record = run_benchmark(
        settings, "", lambda *call: calls.append(call), lambda record: saved.append(len(record["groups"]))
    )
    assert [(group["dtype"], group["length"]) for group in record["groups"]] == [
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
    assert calls[kernels][0] == "fp32, 6 tokens, finch" and saved == [0, 0, 1, 2, 3, 4, 4]
    steps = {job["program"]: job for job in fake.jobs if job["kind"] == "step" and job["length"] == 6}
    assert (steps["finch"]["rows"], steps["loop"]["rows"], steps["finch"]["steps"]) == (4, 1, 2)
    assert steps["loop"]["config"] == steps["finch"]["config"] == asdict(config_of_shape("L2-D64", 50))
    assert ModelConfig(**steps["transformer"]["config"]) == ModelConfig.transformer(2, 64, 50)
    assert {job["threads"] for job in fake.jobs} == {1} and {job["device"] for job in fake.jobs} == {"cpu"}


def test_rates_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorkers(monkeypatch)
    settings = TrainBenchmark(**TINY, lengths=(6,), loop=6, repeats=3, dtypes=("fp32",))
    record = run_benchmark(settings, "the command")
    (group,) = record["groups"]
    own, loop = group["programs"]["finch"], group["programs"]["loop"]
    assert own["tokens_per_s"]["values"] == [24.0] * 3 and loop["tokens_per_s"]["median"] == 6 / 8
    assert [own[key]["median"] for key in ("forward_s", "backward_s", "update_s")] == [0.25, 0.5, 0.25]
    assert (own["rows"], loop["rows"]) == (4, 1)
    assert group["targets"] == {
        "rate_to_transformer": 2.0,
        "cpu_time_of_transformer": 0.5,
        "memory_of_transformer": 0.75,
        "rate_to_chunked": 1.5,
        "cpu_time_of_chunked": pytest.approx(2 / 3),
        "memory_of_chunked": 0.5,
        "rate_to_loop": 32.0,
    }
    operations = training_operations(config_of_shape("L2-D64", 50), 6)
    assert json.loads(json.dumps(record))["groups"][0]["programs"]["finch"] == own
    assert own["share_of_product"] == pytest.approx(operations * 24.0 / 1e9)
    assert own["model_flop_utilisation"] is None and own["peak_bytes"]["median"] == 300
    assert [kernel["times_the_loop"] for kernel in record["kernel"]] == [{"native": 100.0, "chunked": 25.0}] * 2
    assert record["kernel"][1]["shape"] == [8, 1024, 1, 64] and record["kernel"][0]["shape"][0] == 1
    sizes = [record["models"][name]["parameters"] for name in ("finch", "transformer")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.015) and record["command"] == "the command"
    assert "GPUs only" in record["notes"][0]


def test_a_baseline_that_crashes_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorkers(monkeypatch, crashing="fla")
    monkeypatch.setattr(benchmark, "find_programs", lambda *_: (["fla"], []))
    settings = TrainBenchmark(**TINY, lengths=(6,), kernel=False, dtypes=("fp32",), repeats=2)
    (group,) = run_benchmark(settings)["groups"]
    assert group["programs"]["fla"] == {"rows": 4, "error": "exit code -9"}
    assert "rate_to_transformer" in group["targets"] and "rate_to_fla" not in group["targets"]


def test_operations_of_the_matrices_and_of_mixing_tokens() -> None:
    rwkv = config_of_shape("L2-D64", 50)
    model = build(rwkv, "meta")
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and min(p.shape[-2:]) > 1}
    expected = sum(matrices.values()) - matrices["emb.weight"]
    assert count_matrix_weights(rwkv) == (expected, 50 * 64)
    assert training_operations(rwkv, 6) == training_operations(rwkv, 600) == 6 * expected + 18 * 2 * 64 * 64
    transformer = rwkv.as_transformer()
    products = 6 * count_matrix_weights(transformer)[0]
    # 3 tokens attend to 1 + 2 + 3 tokens, each with 2 products of A numbers, in 2 layers. Backward takes twice as much.
    assert 3 * training_operations(transformer, 3) == 3 * products + 3 * 2 * (2 * 2 * 64 * 6)
    assert model_flop_utilization(98.9e12, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(0.1)
    assert model_flop_utilization(1.0, "some other", "bf16") is None


def test_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainBenchmark(**TINY, lengths=(6, 12), loop=6)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object() if name == "fla" else None)
    assert find_programs(settings, "cuda") == (["loop", "fla"], []) and find_programs(settings, "cpu")[0] == [
        "chunked",
        "loop",
    ]
    cases = [case for case in plan_cases(settings, ["loop", "fla"]) if case.dtype == "bf16"]
    assert [case.program for case in cases] == ["finch", "transformer", "fla"] * 2
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    programs, notes = find_programs(settings, "cuda:1")
    assert programs == ["loop"] and "pip install flash-linear-attention" in notes[0]
    programs, notes = find_programs(TrainBenchmark(**TINY, lengths=(6,), family="eagle", loop=0), "cuda")
    assert programs == [] and "no RWKV-5" in notes[0]


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
def test_usage_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainBenchmark(**{**TINY, "lengths": (6,), **wrong})


@pytest.mark.parametrize("program", ["finch", "eagle", "transformer", "chunked", "loop"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_every_program(program: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(dispatch, "_preferred", None)
    family = "eagle" if program == "eagle" else "finch"
    config = TrainBenchmark(**TINY, lengths=(6,), family=family).configs[program]
    job = {"kind": "step", "program": program, "config": asdict(config), "dtype": dtype, "length": 6, "rows": 2}
    result = worker.measure({**job, "steps": 3, "threads": torch.get_num_threads(), "device": "cpu"})
    parts = ("forward_s", "backward_s", "update_s", "cpu_s")
    assert [len(result[part]) for part in parts] == [3] * 4 and min(result["forward_s"] + result["backward_s"]) > 0
    assert 0 < result["loss"] < 4.3  # ln 50 = 3.9, before training
    assert dispatch._preferred == {"chunked": "chunked", "loop": "reference"}.get(program)


def test_memory_of_state_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWorkers(monkeypatch)
    settings = TrainBenchmark(**{**TINY, "lengths": (24,), "loop": 0, "kernel": False, "passing": 50_000}, repeats=2)
    record = run_benchmark(settings)
    lengths = [job["length"] for job in fake.jobs if job["kind"] == "passing"]
    assert lengths == [2048, 50_000, 50_000, 2048]  # in turn
    assert passing_growth(record) == pytest.approx(1100 / 1004 - 1)
    assert passing_growth(json.loads(json.dumps(record))) == passing_growth(record)
    assert record["passing"]["peak_bytes"][50_000]["values"] == [1100, 1100]
    with pytest.raises(UsageError, match="passing is 2048; it must be above the 2048 tokens of the short row"):
        TrainBenchmark(**{**TINY, "passing": 2048})


def test_a_row_is_trained_by_windows() -> None:
    job = {
        "kind": "passing",
        "config": asdict(config_of_shape("L2-D64", 50)),
        "length": 21,
        "window": 4,
        "tbptt_windows": 2,
    }
    result = worker.measure({**job, "steps": 2, "threads": torch.get_num_threads(), "device": "cpu"})
    assert 0 < result["loss"] < 4.3 and result["peak_bytes"] > 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_recurrence_and_the_product_are_timed(backend: str) -> None:
    shared = {"threads": torch.get_num_threads(), "device": "cpu"}
    job = {"kind": "kernel", "backend": backend, "shape": [2, 5, 3, 4], "repeats": 2, **shared}
    assert len(worker.measure(job)["seconds"]) == 2
    product = worker.measure({"kind": "product", "dtype": "bf16", "size": 16, **shared})
    assert product["operations_per_s"] > 0


def test_a_small_run_in_real_processes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**TINY, "lengths": (24,), "loop": 24, "dtypes": ("fp32",), "kernel": False}
    (group,) = run_benchmark(TrainBenchmark(**sizes, steps=1, repeats=1))["groups"]
    assert list(group["programs"]) == ["finch", "transformer", "chunked", "loop"]
    assert group["product_operations_per_s"]["median"] > 0
    assert all(program["tokens_per_s"]["median"] > 0 for program in group["programs"].values())
