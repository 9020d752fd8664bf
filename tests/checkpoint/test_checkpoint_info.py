"""Inspection without reading weights: the numbers of the paper, and large files in little time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import KINDS, make_tensors, save_pth

from fledge.checkpoint import get_expected_shapes, inspect, save
from fledge.checkpoint.info import compute_flops_per_token
from fledge.models import ModelConfig
from fledge.tokenizer import prune, world_vocabulary

REPO = Path(__file__).resolve().parents[2]


def count_parameters(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in get_expected_shapes(config).values())


@pytest.mark.parametrize(
    ("config", "count", "state", "flops"),
    [
        (ModelConfig.eagle(24, 1024), 461_721_600, 1_622_016, 9.33e8),
        (ModelConfig.eagle(24, 2048), 1_577_754_624, 3_244_032, 3.17e9),
        (ModelConfig.eagle(32, 2560), 3_062_999_040, 5_406_720, 6.16e9),
        (ModelConfig.eagle(32, 4096), 7_518_044_160, 8_650_752, 1.51e10),
        (ModelConfig.finch(24, 2048), 1_599_873_024, 3_244_032, 3.22e9),
        (ModelConfig.finch(32, 2560), 3_099_863_040, 5_406_720, 6.23e9),
    ],
)
def test_sizes_equal_those_of_table_11_in_the_paper(config: ModelConfig, count: int, state: int, flops: float) -> None:
    assert count_parameters(config) == count
    assert config.state_floats == state
    assert compute_flops_per_token(config, count) == pytest.approx(flops, rel=0.005)


def test_parameters_of_unpublished_sizes_are_counted() -> None:
    assert count_parameters(ModelConfig.finch(32, 4096)) == 7_635_746_816
    assert count_parameters(ModelConfig.eagle(12, 768)) == 192_807_936


@pytest.mark.parametrize("kind", KINDS)
def test_small_files_are_inspected(kind: str, tmp_path: Path) -> None:
    tensors = make_tensors(kind)
    path = save_pth(tmp_path, tensors)
    info = inspect(path)
    assert info.config.version == KINDS[kind]["version"]
    assert info.parameters == sum(t.numel() for name, t in tensors.items() if not name.endswith("time_state"))
    assert info.dtypes == (("bfloat16",) if "bfloat16" in kind else ("float32",))
    assert info.nbytes == path.stat().st_size and info.format == "pth"
    assert info.state_nbytes == 4 * 3 * (5 * 24 if kind == "4" else 2 * 24 + 3 * 64)
    labels = dict(info.to_rows())
    assert labels["parameters"] == f"{info.parameters:,}" and labels["tuned state"] == (
        "yes" if "tuned" in kind else "no"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [(65536, "World (guessed"), (50277, "does not ship"), (256, "bytes (guessed"), (37, "unknown: none is stored")],
)
def test_the_tokenizer_is_guessed_from_the_vocabulary_size(rows: int, message: str, tmp_path: Path) -> None:
    assert message in inspect(save_pth(tmp_path, make_tensors("4", n_layer=1, n_embd=8, vocab_size=rows))).tokenizer


def test_a_stored_tokenizer_is_named(tmp_path: Path) -> None:
    vocabulary = prune(world_vocabulary(), [300], size=260)
    tensors = make_tensors("6.0", vocab_size=260)
    config = inspect(save_pth(tmp_path, tensors)).config
    save(tmp_path / "m.safetensors", config, tensors, tokenizer_spec=vocabulary.to_spec(), extra={"steps": 3})
    info = inspect(tmp_path / "m.safetensors")
    assert info.tokenizer == "World, pruned to 260 rows (stored in the file)" and info.extra == {"steps": 3}


def test_mixed_dtypes_are_listed_largest_first(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 in bfloat16")
    save_file(tensors | {"ln_out.bias": tensors["ln_out.bias"].float()}, tmp_path / "m.safetensors")
    assert inspect(tmp_path / "m.safetensors").dtypes == ("bfloat16", "float32")


def write_sparse_safetensors(path: Path, config: ModelConfig) -> None:
    """Create a bfloat16 model of real size whose weights take no space on disk."""
    header, end = {}, 0
    for name, shape in get_expected_shapes(config).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_sparse_pth(path: Path, config: ModelConfig) -> None:
    """Create the same model in the layout of torch.save."""
    with torch.serialization.skip_data():
        shapes = get_expected_shapes(config).items()
        torch.save({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes}, path)


@pytest.mark.parametrize("write", [write_sparse_safetensors, write_sparse_pth])
def test_a_file_of_15_gigabytes_is_inspected_in_a_moment(write: object, tmp_path: Path) -> None:
    path = tmp_path / "finch-7b"
    write(path, ModelConfig.finch(32, 4096))  # type: ignore[operator]
    assert path.stat().st_size > 15e9
    if path.stat().st_blocks * 512 > 1e8:
        pytest.skip("the file system here has no sparse files")
    start = time.perf_counter()
    info = inspect(path)
    assert time.perf_counter() - start < 1
    assert info.parameters == 7_635_746_816 and (info.config.mix_rank, info.config.decay_rank) == (64, 128)
    assert info.nbytes > 15e9


def test_inspecting_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """A new process inspects the files. Its limit on address space is smaller than a file."""
    pytest.importorskip("resource", reason="needs POSIX limits")
    write_sparse_safetensors(tmp_path / "m.safetensors", ModelConfig.finch(32, 4096))
    write_sparse_pth(tmp_path / "m.pth", ModelConfig.finch(32, 4096))
    code = """
import resource, sys
import torch
from fledge.checkpoint import inspect
inspect(sys.argv[1])  # imports what it needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.platform == "linux":
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
for path in sys.argv[2:]:
    inspect(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    files = [save_pth(tmp_path, make_tensors("4"), "small.pth"), tmp_path / "m.safetensors", tmp_path / "m.pth"]
    command = [sys.executable, "-c", code, *map(str, files)]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 50_000  # kilobytes (bytes on macOS, which only makes this stricter)


def test_flops_of_rwkv4_are_computed_without_heads(tmp_path: Path) -> None:
    assert compute_flops_per_token(ModelConfig.rwkv4(2, 8), 100) == 200
