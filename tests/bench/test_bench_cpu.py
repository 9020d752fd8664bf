"""The CPU benchmark: what it measures in which order, what it computes from it, and one real run of this program."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.bench import cpu
from fledge.bench.counting import matrix_numbers
from fledge.bench.cpu import LIMITS, Spec, available, cases_of, run
from fledge.bench.cpu_figures import Case
from fledge.bench.cpu_files import gguf_bytes, model_files, random_files
from fledge.bench.random_model import config_of
from fledge.checkpoint import convert, get_expected_shapes, load_model, read
from fledge.checkpoint.quantization.quantizer import is_quantizable
from fledge.core.errors import CheckpointError, FledgeError, UsageError
from fledge.models.native_model import why_not_native

TINY: dict[str, Any] = {"shapes": ("L2-D64",), "vocab": 256, "prompt": 9, "tokens": 3, "batch": 4, "threads": 1}
NATIVE = why_not_native(config_of("L2-D64", 256)) is None
FOUND = importlib.util.find_spec
MEASURED = {
    "read": 1e9,
    "registers": {"float32": 1e9, "bfloat16": 2e9, "int16": 4e9},
    "products": {"float32": 3e9, "bfloat16": 1e9},
    "instruction_set": "some",
}


class Fake:
    """Answers every measurement: in seconds, by program; scores differ from one another by `noise`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0) -> None:
        self.noise, self.seen = noise, list[tuple[str, dict[str, Any], Any]]()
        monkeypatch.setattr(cpu, "in_fresh_process", self.answer)

    def answer(self, module: str, job: dict[str, Any], environment: Any) -> dict[str, Any]:
        self.seen.append((module, job, environment))
        if module == "fledge.bench.limits":
            return MEASURED
        assert module == "fledge.bench.cpu_worker" and Path(job["checkpoint"]).is_file()
        subject, jit = job["subject"], environment["RWKV_JIT_ON"] == "1"
        seconds = {"fledge": 1.0, "llama.cpp": 2.0, "rwkv": 3.0 if jit else 4.0}[subject]
        draw = np.random.default_rng(0)
        scores = {"prompt": draw.normal(size=50), "batch": draw.normal(size=(4, 50))}
        moved = {
            what: values + self.noise * (subject != "fledge") * values[..., ::-1] for what, values in scores.items()
        }
        np.savez(job["logits"], **moved)
        times = dict.fromkeys(("import_s", "load_s", "first_token_s", "prefill_s", "decode_s"), seconds)
        batch = {} if subject == "rwkv" else {"batch_s": 2 * seconds, "batch_peak_bytes": 300}
        told = {"matrix_bytes": 1000 if subject == "fledge" else None, "build": "for tests"}
        return {**times, **batch, **told, "peak_bytes": int(100 * seconds)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all programs were there."""
    others = ("rwkv", "llama_cpp")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object() if name in others else FOUND(name))


@pytest.mark.usefixtures("installed")
def test_every_program_and_the_limits_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    fake, calls, kept = Fake(monkeypatch), list[Any](), list[int]()
    spec = Spec(**{**TINY, "shapes": ("L2-D64", "l1-d64")}, widths=("bf16", "int4"), repeats=2)
    outcome = run(spec, lambda *call: calls.append(call), lambda outcome: kept.append(len(outcome.blocks)))
    names = [
        *("fledge bf16", "llama.cpp BF16", "fledge int4", "llama.cpp Q4_0"),
        *("rwkv fp32", "rwkv jit fp32", "rwkv bf16", "rwkv jit bf16"),
    ]
    assert [[case.name for case in block.figures] for block in outcome.blocks] == [names, names] and kept == [1, 2]
    assert len(fake.seen) == 2 * 2 * 9 and calls[-1][1:] == (35, 36) and calls[1][0] == "L2-D64, fledge bf16"
    labels = [label.removeprefix("L2-D64, ") for label, *_ in calls[1:19]]
    assert labels[:9] == [*names, LIMITS] and labels[9:] == [*names[1:], LIMITS, names[0]]
    jobs = [job for module, job, _ in fake.seen if module.endswith("worker")]
    assert len({str((job["prompt"], job["batch"], job["tokens"], job["threads"])) for job in jobs}) == 1
    assert {environment["OMP_NUM_THREADS"] for _, _, environment in fake.seen} == {"1"}
    suffixes = {(job["subject"], job["width"]): "".join(Path(job["checkpoint"]).suffixes) for job in jobs}
    assert suffixes["fledge", "int4"] == ".int4.safetensors" and suffixes["llama.cpp", "int4"] == ".q4_0.gguf"
    assert suffixes["fledge", "bf16"] == suffixes["rwkv", "fp32"] == ".pth"
    assert outcome.peers["llama.cpp"]["build"] == "for tests" and set(outcome.peers) == {"rwkv", "llama.cpp"}


@pytest.mark.usefixtures("installed")
def test_figures_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    Fake(monkeypatch)
    (block,) = run(Spec(**TINY, widths=("bf16", "int8"), repeats=1)).blocks
    ours, figures = Case("fledge", "bf16"), block.figures[Case("fledge", "bf16")]
    assert (figures.prefill.median, figures.decode.median) == (9.0, 3.0)
    assert figures.batch is not None and figures.batch.median == 4 * 3 / 2
    assert block.bytes_per_s(ours) == 3.0 * 1000 and block.share_of_reading(ours) == 3e-6
    numbers, head = matrix_numbers(config_of("L2-D64", 256))
    assert block.operations_per_s(ours) == 9.0 * 2 * (numbers - head)
    assert block.share_of_arithmetic(ours) == pytest.approx(9.0 * 2 * (numbers - head) / 2e9)
    assert block.share_of_arithmetic(Case("fledge", "int8")) == pytest.approx(9.0 * 2 * (numbers - head) / 4e9)
    assert block.limits.operations_per_s("fp32") == 3e9  # the better of the two views
    assert block.ceilings(ours)["decode"] == 1e6 and block.ceilings(ours)["batch"] == 2e9 / (2 * numbers)
    assert block.figures[Case("rwkv", "bf16")].matrix_bytes == 2 * numbers
    targets = block.targets()
    assert set(targets) == {"bf16", "int8"} and targets["bf16"]["batch_gain"] == 2.0
    alike = {"prefill": 2.0, "decode": 2.0, "load": 2.0, "first_token": 2.0, "peak": 2.0}
    assert targets["int8"]["to_llama.cpp"] == {**alike, "batch": 2.0, "batch_peak": 1.0}
    assert targets["int8"]["to_the_best_rwkv"] == dict.fromkeys(alike, 3.0)


def test_without_other_programs_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    monkeypatch.setitem(MEASURED, "read", None)
    monkeypatch.setitem(MEASURED, "registers", {})
    outcome = run(Spec(**TINY, widths=("bf16", "int8"), peers=False, repeats=1))
    (block,) = outcome.blocks
    assert (
        outcome.notes == ()
        and outcome.peers == {}
        and set(block.figures)
        == {
            Case("fledge", "bf16"),
            Case("fledge", "int8"),
        }
    )
    targets = block.targets()
    assert targets["bf16"]["to_llama.cpp"] == targets["bf16"]["to_the_best_rwkv"] == {}
    assert targets["bf16"]["share_of_reading"] is None and targets["bf16"]["share_of_arithmetic"] is not None
    assert targets["int8"]["share_of_arithmetic"] is None
    assert block.ceilings(Case("fledge", "int8")) == {"prefill": None, "decode": None, "batch": None}


def test_a_record_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    record = run(Spec(**TINY, widths=("int8",), peers=False, repeats=3)).record("the command")
    assert json.loads(json.dumps(record))["settings"]["shapes"] == ["L2-D64"]
    assert record["command"] == "the command" and record["benchmark"] == "cpu" and record["threads"] == 1
    (model,) = record["models"]
    assert model["model"]["name"] == "L2-D64" and model["model"]["file_bytes"].keys() == {"pth", "int8"}
    assert model["limits"]["read_bytes_per_s"]["values"] == [1e9] * 3
    figures = model["figures"]["fledge int8"]
    assert figures["decode_tokens_per_s"]["median"] == 3.0 and figures["decode_bytes_per_s"] == 3000.0
    assert figures["ceilings_tokens_per_s"]["decode"] == 1e6 and (figures["program"], figures["width"]) == (
        "fledge",
        "int8",
    )
    assert figures["process_s"]["median"] >= 0 and model["differences"] == {"reference": "fledge int8"}


@pytest.mark.usefixtures("installed")
def test_no_figures_where_programs_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    Fake(monkeypatch, noise=0.3)
    assert run(Spec(**TINY, widths=("int4",), repeats=1)).blocks  # so much can be rounding to 4 bits
    with pytest.raises(FledgeError, match=r"after the prompt, the scores of llama\.cpp BF16 and of fledge bf16 differ"):
        run(Spec(**TINY, widths=("bf16",), repeats=1))


def test_programs_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda _name: None)
    programs, notes = available(Spec(**TINY))
    assert programs == ["fledge"] and len(notes) == 2
    assert "`pip install llama-cpp-python gguf`" in notes[0] and '`pip install "fledge[bench]"`' in notes[1]
    assert available(Spec(**TINY, peers=False)) == (["fledge"], ())


@pytest.mark.usefixtures("installed")
def test_llama_cpp_has_no_eagle() -> None:
    programs, notes = available(Spec(**TINY, family="eagle"))
    assert programs == ["fledge", "rwkv", "rwkv jit"] and "RWKV-6 only" in notes[0]
    assert [case.name for case in cases_of(Spec(**TINY, widths=("int4",)), ["fledge", "rwkv"])] == [
        *("fledge int4", "rwkv fp32", "rwkv bf16")
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"widths": ("bf16", "int3")}, "widths is 'bf16,int3'; choose from fp32,bf16,int8,int4"),
        ({"widths": ()}, "choose from"),
        ({"family": "gosling"}, "family is 'gosling'; choose from finch, eagle"),
        ({"shapes": ("L2-D64", "L2")}, "shape 'L2' is not like L12-D768"),
        ({"model": "a.pth"}, "exclude each other"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_mistakes(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Spec(**{**TINY, **changed})


def test_files_are_written_once_and_used_again(tmp_path: Path) -> None:
    files = random_files("l2-d64", "eagle", 256, tmp_path, ["pth", "int8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eagle-L2-D64-V256.int8.safetensors",
        "eagle-L2-D64-V256.pth",
    ]
    assert files.config.version == "5.2" and files.of("rwkv", "fp32") == files.of("fledge", "bf16")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert random_files("L2-D64", "eagle", 256, tmp_path, ["int8"]).of("fledge", "int8") in times
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_checkpoint_is_rounded_to_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine.safetensors"
    files = random_files("L2-D64", "finch", 256, tmp_path, ["int4"])
    convert(files.of("fledge", "bf16"), source)
    mine = model_files(str(source), tmp_path / "new", ["pth"])
    assert mine.name == "mine" and {t.dtype for t in read(mine.of("rwkv", "bf16")).tensors.values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="is quantised already"):
        model_files(str(files.of("fledge", "int4")), tmp_path, ["pth"])
    with pytest.raises(CheckpointError):
        run(Spec(model=str(tmp_path / "none.pth")))


@pytest.mark.parametrize("family", ["finch", "eagle"])
def test_numbers_are_those_of_the_matrices(tmp_path: Path, family: str) -> None:
    files = random_files("L2-D64", family, 256, tmp_path, [])
    numbers, head = matrix_numbers(files.config)
    tensors = read(files.of("fledge", "bf16")).tensors
    names = [name for name in tensors if name != "emb.weight" and tensors[name].squeeze().dim() >= 2]
    plain = [name for name in names if not name.endswith(("time_faaaa", "time_decay"))]  # two axes, but no matrix
    assert numbers == sum(tensors[name].numel() for name in plain) and head == 256 * 64
    if NATIVE:
        model: Any = load_model(files.of("fledge", "bf16"), pack=True).model
        packed = sum(matrix.rows * matrix.columns for matrix in model.matrices.values())
        assert packed == numbers


def test_bytes_of_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    files = random_files("L2-D64", "finch", 256, tmp_path, ["bf16", "q8_0"])
    bfloat16, q8_0 = (gguf_bytes(files.of("llama.cpp", width)) for width in ("bf16", "int8"))
    shapes = get_expected_shapes(files.config)
    numbers = sum(torch.Size(shape).numel() for name, shape in shapes.items() if is_quantizable(name))
    assert bfloat16 - q8_0 == numbers * (2 - 34 / 32) and bfloat16 > 2 * matrix_numbers(files.config)[0]


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.in_fresh_process

    def quick(module: str, job: Any, environment: Any) -> dict[str, Any]:
        return MEASURED if module == "fledge.bench.limits" else real(module, job, environment)

    monkeypatch.setattr(cpu, "in_fresh_process", quick)
    (block,) = run(Spec(**TINY, widths=("bf16", "int4"), peers=False, repeats=1)).blocks
    for figures in block.figures.values():
        rates = (figures.prefill, figures.decode, figures.batch, figures.load, figures.process)
        assert all(sample is not None and sample.median > 0 for sample in rates)
    (found,) = block.differences.values()
    assert set(found) == {"prompt", "batch"} and 0 < found["prompt"].deviation < 0.5


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("family", ["finch", "eagle"])
def test_a_real_comparison(family: str) -> None:
    if any(FOUND(name) is None for name in ("rwkv", "llama_cpp", "gguf")):
        pytest.skip("needs the PyPI packages rwkv, llama-cpp-python and gguf")
    spec = Spec(**TINY, family=family, widths=("fp32", "bf16", "int8", "int4"), repeats=1)
    (block,) = run(spec).blocks
    assert len(block.figures) == (12 if family == "finch" else 8)
    if family == "finch":
        assert block.differences[Case("llama.cpp", "fp32")]["batch"].deviation < 1e-4
        assert block.targets()["int4"]["to_llama.cpp"].keys() >= {"prefill", "decode", "batch"}
    assert all(target["to_the_best_rwkv"]["prefill"] > 0 for target in block.targets().values())
