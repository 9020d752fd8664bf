"""The CPU benchmark: the order of its runs, its metrics, failures of baselines, and one real run of Fledge."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.bench import suite
from fledge.bench.cpu import benchmark
from fledge.bench.cpu.benchmark import LIMITS, CpuBenchmark, find_programs, plan_cases
from fledge.bench.cpu.model_files import gguf_matrix_bytes, write_model_files, write_random_files
from fledge.bench.flops import count_matrix_weights
from fledge.bench.machine_limits import operations_limit
from fledge.bench.random_model import config_of_shape
from fledge.bench.suite import run_benchmark
from fledge.checkpoint import convert, get_expected_shapes, load_model, read
from fledge.checkpoint.quantization.quantizer import is_quantizable
from fledge.core.errors import CheckpointError, FledgeError, UsageError
from fledge.models.native_model import why_not_native

TINY: dict[str, Any] = {"shapes": ("L2-D64",), "vocab": 256, "prompt": 9, "tokens": 3, "batch": 4, "threads": 1}
NATIVE = why_not_native(config_of_shape("L2-D64", 256)) is None
FIND_SPEC = importlib.util.find_spec
LIMIT_RESULT = {
    "read": 1e9,
    "registers": {"float32": 1e9, "bfloat16": 2e9, "int16": 4e9},
    "products": {"float32": 3e9, "bfloat16": 1e9},
    "instruction_set": "some",
}


class FakeWorkers:
    """Answers every job with seconds that depend on the program. The logits of baselines differ by `noise`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0, crashing: str = "") -> None:
        self.noise, self.crashing, self.calls = noise, crashing, list[tuple[str, dict[str, Any], Any]]()
        monkeypatch.setattr(suite, "run_in_fresh_process", self.answer)

    def answer(self, module: str, job: dict[str, Any], environment: Any) -> dict[str, Any]:
        self.calls.append((module, job, environment))
        if module == "fledge.bench.machine_limits":
            return LIMIT_RESULT
        assert module == "fledge.bench.cpu.worker" and Path(job["checkpoint"]).is_file()
        program, jit = job["program"], environment["RWKV_JIT_ON"] == "1"
        if program == self.crashing:
            raise FledgeError("the worker failed with exit code -11: no output")
        seconds = {"fledge": 1.0, "llama.cpp": 2.0, "rwkv": 3.0 if jit else 4.0}[program]
        rng = np.random.default_rng(0)
        logits = {"prompt": rng.normal(size=50), "batch": rng.normal(size=(4, 50))}
        moved = {
            name: values + self.noise * (program != "fledge") * values[..., ::-1] for name, values in logits.items()
        }
        np.savez(job["logits"], **moved)
        times = dict.fromkeys(("import_s", "load_s", "first_token_s", "prefill_s", "decode_s"), seconds)
        batch = {} if program == "rwkv" else {"batch_s": 2 * seconds, "batch_peak_bytes": 300}
        reported = {"matrix_bytes": 1000} if program == "fledge" else {"build": "for tests"}
        return {**times, **batch, **reported, "peak_bytes": int(100 * seconds)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that all baselines are installed."""
    others = ("rwkv", "llama_cpp")
    monkeypatch.setattr(
        benchmark.importlib.util, "find_spec", lambda name: object() if name in others else FIND_SPEC(name)
    )


@pytest.mark.usefixtures("installed")
def test_all_programs_and_the_limits_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    fake, calls, saved = FakeWorkers(monkeypatch), list[Any](), list[int]()
    settings = CpuBenchmark(**{**TINY, "shapes": ("L2-D64", "l1-d64")}, widths=("bf16", "int4"), repeats=2)
    record = run_benchmark(
        settings, "", lambda *call: calls.append(call), lambda record: saved.append(len(record["models"]))
    )
    names = [
        *("fledge bf16", "llama.cpp BF16", "fledge int4", "llama.cpp Q4_0"),
        *("rwkv fp32", "rwkv jit fp32", "rwkv bf16", "rwkv jit bf16"),
    ]
    assert [list(block["figures"]) for block in record["models"]] == [names, names] and saved == [1, 2, 2]
    assert len(fake.calls) == 2 * 2 * 9 and calls[-1][1:] == (35, 36) and calls[1][0] == "L2-D64, fledge bf16"
    labels = [label.removeprefix("L2-D64, ") for label, *_ in calls[1:19]]
    assert labels[:9] == [*names, LIMITS] and labels[9:] == [*names[1:], LIMITS, names[0]]
    jobs = [job for module, job, _ in fake.calls if module.endswith("worker")]
    assert len({str((job["prompt"], job["batch"], job["tokens"], job["threads"])) for job in jobs}) == 1
    assert {environment["OMP_NUM_THREADS"] for _, _, environment in fake.calls} == {"1"}
    suffixes = {(job["program"], job["width"]): "".join(Path(job["checkpoint"]).suffixes) for job in jobs}
    assert suffixes["fledge", "int4"] == ".int4.safetensors" and suffixes["llama.cpp", "int4"] == ".q4_0.gguf"
    assert suffixes["fledge", "bf16"] == suffixes["rwkv", "fp32"] == ".pth"
    assert record["peers"]["llama.cpp"]["build"] == "for tests" and set(record["peers"]) == {"rwkv", "llama.cpp"}


@pytest.mark.usefixtures("installed")
def test_metrics_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    FakeWorkers(monkeypatch)
    (block,) = run_benchmark(CpuBenchmark(**TINY, widths=("bf16", "int8"), repeats=1))["models"]
    own, int8 = block["figures"]["fledge bf16"], block["figures"]["fledge int8"]
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s", "batch_tokens_per_s")
    assert [own[key]["median"] for key in rates] == [9.0, 3.0, 4 * 3 / 2]
    assert own["decode_bytes_per_s"] == 3.0 * 1000 and own["share_of_reading"] == 3e-6
    weights, head = count_matrix_weights(config_of_shape("L2-D64", 256))
    assert own["prefill_operations_per_s"] == 9.0 * 2 * (weights - head)
    assert own["share_of_arithmetic"] == pytest.approx(9.0 * 2 * (weights - head) / 2e9)
    assert int8["share_of_arithmetic"] == pytest.approx(9.0 * 2 * (weights - head) / 4e9)
    assert operations_limit(block["limits"], "fp32") == 3e9  # the better of the two measurements
    ceilings = own["ceilings_tokens_per_s"]
    assert ceilings["decode"] == 1e6 and ceilings["batch"] == 2e9 / (2 * weights)
    assert block["figures"]["rwkv bf16"]["matrix_bytes"] == 2 * weights
    targets = block["targets"]
    assert set(targets) == {"bf16", "int8"} and targets["bf16"]["batch_gain"] == 2.0
    same = {"prefill": 2.0, "decode": 2.0, "load": 2.0, "first_token": 2.0, "peak": 2.0}
    assert targets["int8"]["to_llama.cpp"] == {**same, "batch": 2.0, "batch_peak": 1.0}
    assert targets["int8"]["to_the_best_rwkv"] == dict.fromkeys(same, 3.0)


def test_without_baselines_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorkers(monkeypatch)
    monkeypatch.setitem(LIMIT_RESULT, "read", None)
    monkeypatch.setitem(LIMIT_RESULT, "registers", {})
    record = run_benchmark(CpuBenchmark(**TINY, widths=("bf16", "int8"), peers=False, repeats=1))
    (block,) = record["models"]
    assert record["notes"] == [] and record["peers"] == {} and set(block["figures"]) == {"fledge bf16", "fledge int8"}
    targets = block["targets"]
    assert targets["bf16"]["to_llama.cpp"] == targets["bf16"]["to_the_best_rwkv"] == {}
    assert targets["bf16"]["share_of_reading"] is None and targets["bf16"]["share_of_arithmetic"] is not None
    assert targets["int8"]["share_of_arithmetic"] is None
    ceilings = block["figures"]["fledge int8"]["ceilings_tokens_per_s"]
    assert ceilings == {"prefill": None, "decode": None, "batch": None}


def test_a_record_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorkers(monkeypatch)
    record = run_benchmark(CpuBenchmark(**TINY, widths=("int8",), peers=False, repeats=3), "the command")
    assert json.loads(json.dumps(record))["settings"]["shapes"] == ["L2-D64"]
    assert record["command"] == "the command" and record["benchmark"] == "cpu" and record["threads"] == 1
    (block,) = record["models"]
    assert block["model"]["name"] == "L2-D64" and block["model"]["file_bytes"].keys() == {"pth", "int8"}
    assert block["limits"]["read_bytes_per_s"]["values"] == [1e9] * 3
    metrics = block["figures"]["fledge int8"]
    assert metrics["decode_tokens_per_s"]["median"] == 3.0 and metrics["decode_bytes_per_s"] == 3000.0
    assert metrics["ceilings_tokens_per_s"]["decode"] == 1e6
    assert (metrics["program"], metrics["width"]) == ("fledge", "int8")
    assert metrics["process_s"]["median"] >= 0 and block["differences"] == {"reference": "fledge int8"}


@pytest.mark.usefixtures("installed")
def test_a_baseline_that_crashes_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    fake = FakeWorkers(monkeypatch, crashing="llama.cpp")
    record = run_benchmark(CpuBenchmark(**TINY, widths=("bf16",), repeats=2))
    (block,) = record["models"]
    row = block["figures"]["llama.cpp BF16"]
    assert (
        row["program"] == "llama.cpp"
        and "exit code -11" in row["error"]
        and set(row)
        == {
            "program",
            "width",
            "error",
        }
    )
    assert block["targets"]["bf16"]["to_llama.cpp"] == {} and block["targets"]["bf16"]["to_the_best_rwkv"]
    assert "llama.cpp BF16" not in block["differences"] and record["peers"]["llama.cpp"]["build"] is None
    assert sum(job.get("program") == "llama.cpp" for _, job, _ in fake.calls) == 1  # it is not started again
    FakeWorkers(monkeypatch, crashing="fledge")
    with pytest.raises(FledgeError, match="exit code -11"):
        run_benchmark(CpuBenchmark(**TINY, widths=("bf16",), repeats=2))


@pytest.mark.usefixtures("installed")
def test_no_metrics_if_programs_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    FakeWorkers(monkeypatch, noise=0.3)
    assert run_benchmark(CpuBenchmark(**TINY, widths=("int4",), repeats=1))["models"]  # rounding to 4 bits explains it
    with pytest.raises(FledgeError, match=r"after the prompt, the logits of llama\.cpp BF16 and of fledge bf16 differ"):
        run_benchmark(CpuBenchmark(**TINY, widths=("bf16",), repeats=1))


def test_notes_name_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _name: None)
    programs, notes = find_programs(CpuBenchmark(**TINY))
    assert programs == ["fledge"] and len(notes) == 2
    assert "`pip install llama-cpp-python gguf`" in notes[0] and '`pip install "fledge[bench]"`' in notes[1]
    assert find_programs(CpuBenchmark(**TINY, peers=False)) == (["fledge"], [])


@pytest.mark.usefixtures("installed")
def test_llama_cpp_has_no_eagle() -> None:
    programs, notes = find_programs(CpuBenchmark(**TINY, family="eagle"))
    assert programs == ["fledge", "rwkv", "rwkv jit"] and "only RWKV-6" in notes[0]
    cases = plan_cases(CpuBenchmark(**TINY, widths=("int4",)), ["fledge", "rwkv"])
    assert [case.name for case in cases] == ["fledge int4", "rwkv fp32", "rwkv bf16"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"widths": ("bf16", "int3")}, "widths is 'bf16,int3'; choose from fp32,bf16,int8,int4"),
        ({"widths": ()}, "choose from"),
        ({"family": "gosling"}, "family is 'gosling'; choose from finch, eagle"),
        ({"shapes": ("L2-D64", "L2")}, "shape 'L2' is not of the form L12-D768"),
        ({"model": "a.pth"}, "exclude each other"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_usage_errors(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CpuBenchmark(**{**TINY, **changed})


def test_files_are_written_once_and_used_again(tmp_path: Path) -> None:
    files = write_random_files("l2-d64", "eagle", 256, tmp_path, ["pth", "int8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eagle-L2-D64-V256.int8.safetensors",
        "eagle-L2-D64-V256.pth",
    ]
    assert files.config.version == "5.2" and files.path("rwkv", "fp32") == files.path("fledge", "bf16")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_random_files("L2-D64", "eagle", 256, tmp_path, ["int8"]).path("fledge", "int8") in times
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_checkpoint_is_rounded_to_bfloat16(tmp_path: Path) -> None:
    source = tmp_path / "mine.safetensors"
    files = write_random_files("L2-D64", "finch", 256, tmp_path, ["int4"])
    convert(files.path("fledge", "bf16"), source)
    mine = write_model_files(str(source), tmp_path / "new", ["pth"])
    tensors = read(mine.path("rwkv", "bf16")).tensors.values()
    assert mine.name == "mine" and {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    with pytest.raises(UsageError, match="is already quantized"):
        write_model_files(str(files.path("fledge", "int4")), tmp_path, ["pth"])
    with pytest.raises(CheckpointError):
        run_benchmark(CpuBenchmark(model=str(tmp_path / "none.pth")))


@pytest.mark.parametrize("family", ["finch", "eagle"])
def test_weights_are_counted_in_the_matrices(tmp_path: Path, family: str) -> None:
    files = write_random_files("L2-D64", family, 256, tmp_path, [])
    weights, head = count_matrix_weights(files.config)
    tensors = read(files.path("fledge", "bf16")).tensors
    names = [name for name in tensors if name != "emb.weight" and tensors[name].squeeze().dim() >= 2]
    plain = [name for name in names if not name.endswith(("time_faaaa", "time_decay"))]  # two axes, but no matrix
    assert weights == sum(tensors[name].numel() for name in plain) and head == 256 * 64
    if NATIVE:
        model: Any = load_model(files.path("fledge", "bf16"), pack=True).model
        packed = sum(matrix.rows * matrix.columns for matrix in model.matrices.values())
        assert packed == weights


def test_bytes_of_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    files = write_random_files("L2-D64", "finch", 256, tmp_path, ["bf16", "q8_0"])
    bfloat16, q8_0 = (gguf_matrix_bytes(files.path("llama.cpp", width)) for width in ("bf16", "int8"))
    shapes = get_expected_shapes(files.config)
    weights = sum(torch.Size(shape).numel() for name, shape in shapes.items() if is_quantizable(name))
    assert bfloat16 - q8_0 == weights * (2 - 34 / 32) and bfloat16 > 2 * count_matrix_weights(files.config)[0]


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    real = suite.run_in_fresh_process

    def without_limits(module: str, job: Any, environment: Any) -> dict[str, Any]:
        return LIMIT_RESULT if module == "fledge.bench.machine_limits" else real(module, job, environment)

    monkeypatch.setattr(suite, "run_in_fresh_process", without_limits)
    settings = CpuBenchmark(**TINY, widths=("bf16", "int4"), peers=False, repeats=1)
    (block,) = run_benchmark(settings)["models"]
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "batch_tokens_per_s", "load_s", "process_s")
    assert all(metrics[key]["median"] > 0 for metrics in block["figures"].values() for key in keys)
    difference = block["differences"]["fledge int4"]
    assert set(difference) == {"prompt", "batch"} and 0 < difference["prompt"]["deviation"] < 0.5


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("family", ["finch", "eagle"])
def test_a_real_comparison(family: str) -> None:
    if any(FIND_SPEC(name) is None for name in ("rwkv", "llama_cpp", "gguf")):
        pytest.skip("needs the PyPI packages rwkv, llama-cpp-python and gguf")
    settings = CpuBenchmark(**TINY, family=family, widths=("fp32", "bf16", "int8", "int4"), repeats=1)
    (block,) = run_benchmark(settings)["models"]
    assert len(block["figures"]) == (12 if family == "finch" else 8)
    if family == "finch":
        assert block["differences"]["llama.cpp F32"]["batch"]["deviation"] < 1e-4
        assert block["targets"]["int4"]["to_llama.cpp"].keys() >= {"prefill", "decode", "batch"}
    assert all(target["to_the_best_rwkv"]["prefill"] > 0 for target in block["targets"].values())
