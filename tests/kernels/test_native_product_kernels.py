"""The choice of the instruction set for matrix products: measured once, kept in a file, and overridden by the user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_library import INSTRUCTION_SETS, needs_native, use_instruction_set

from fledge.core.errors import BackendError, UsageError
from fledge.kernels import product_kernels
from fledge.kernels.native_ops import PackedMatrix, matmul, pack, quantize_native, use_product_kernels
from fledge.kernels.native_ops import product_kernels as get_kernels

pytestmark = needs_native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder for one test. Afterwards the process has its former choices again."""
    monkeypatch.setattr(product_kernels, "get_cache_folder", lambda: tmp_path)
    product_kernels.apply_choices.cache_clear()
    yield tmp_path / "kernels.json"
    monkeypatch.undo()
    product_kernels.apply_choices.cache_clear()
    product_kernels.apply_choices()


def set_rates(monkeypatch: pytest.MonkeyPatch, **rates: float) -> list[str]:
    """Replace the measurement by fixed rates. Returns the kinds that have been measured."""
    measured: list[str] = []

    def measure(kind: str) -> dict[str, float]:
        measured.append(kind)
        return dict(rates)

    monkeypatch.setattr(product_kernels, "measure", measure)
    return measured


def test_measurement_covers_every_instruction_set_for_this_processor() -> None:
    for kind in product_kernels.MEASURED_KINDS:
        rates = product_kernels.measure(kind)
        assert list(rates) == [name for name in INSTRUCTION_SETS if name not in product_kernels.NOT_CHOSEN]
        assert all(rate > 0 for rate in rates.values())
        assert get_kernels(kind) == INSTRUCTION_SETS[0]


def test_choice_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    measured = set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0, INSTRUCTION_SETS[-1]: 120.0})
    first = product_kernels.apply_choices()
    assert [choice.name for choice in first] == [INSTRUCTION_SETS[-1]] * 2 and measured == ["bfloat16", "int16"]
    assert get_kernels("bfloat16") == INSTRUCTION_SETS[-1] and get_kernels("float32") == INSTRUCTION_SETS[0]
    product_kernels.apply_choices.cache_clear()
    assert product_kernels.apply_choices() == first and len(measured) == 2
    assert "100" in first[0].reason and "120" in first[0].reason
    product_kernels.measure_again()
    assert len(measured) == 4 and cache.exists()


def test_small_gain_does_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0, INSTRUCTION_SETS[-1]: 114.0})
    assert {choice.name for choice in product_kernels.apply_choices()} == {INSTRUCTION_SETS[0]}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"key": 3}', '{"key": "another machine", "rates": {}, "overrides": {}}'],
)
def test_invalid_file_is_replaced(monkeypatch: pytest.MonkeyPatch, cache: Path, content: str) -> None:
    cache.write_text(content)
    measured = set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0})
    product_kernels.apply_choices()
    assert len(measured) == 2 and json.loads(cache.read_text())["overrides"] == {}


def test_unknown_names_in_the_file_are_ignored(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0})
    product_kernels.apply_choices()
    record = json.loads(cache.read_text())
    record["overrides"] = {"bfloat16": "gone", "int99": INSTRUCTION_SETS[0]}
    record["rates"]["bfloat16"]["gone"] = 900.0
    cache.write_text(json.dumps(record))
    product_kernels.apply_choices.cache_clear()
    assert {choice.name for choice in product_kernels.apply_choices()} == {INSTRUCTION_SETS[0]}


def test_folder_without_write_access_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(product_kernels, "get_cache_folder", lambda: tmp_path / "file" / "folder")
    measured = set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0})
    assert len(product_kernels.apply_choices()) == 2 and len(measured) == 2
    with pytest.raises(UsageError, match="cannot be written"):
        product_kernels.override("bfloat16", INSTRUCTION_SETS[0])


def test_override_is_kept_until_it_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rates(monkeypatch, **{INSTRUCTION_SETS[0]: 100.0})
    product_kernels.override("bfloat16", INSTRUCTION_SETS[-1])
    product_kernels.measure_again()
    product_kernels.apply_choices.cache_clear()
    bfloat16, int16 = product_kernels.apply_choices()
    assert bfloat16.name == INSTRUCTION_SETS[-1] and bfloat16.is_override and "--kernel" in bfloat16.reason
    assert int16.name == INSTRUCTION_SETS[0] and not int16.is_override
    product_kernels.override("bfloat16", "auto")
    assert product_kernels.apply_choices()[0].name == get_kernels("bfloat16") == INSTRUCTION_SETS[0]


@pytest.mark.parametrize(("kind", "name"), [("float32", "auto"), ("int8", "auto"), ("bfloat16", "sse"), ("int16", "")])
def test_invalid_override_is_rejected(kind: str, name: str) -> None:
    with pytest.raises(UsageError, match=r"is unknown; choose|is not one of: auto"):
        product_kernels.override(kind, name)
    with pytest.raises(BackendError, match="is not one of"):
        use_product_kernels("int16", "sse")


def test_integer_products_have_the_same_bits_with_every_instruction_set_that_is_chosen() -> None:
    """A choice can change between machines, and quantized models must not change with it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 150, generator=generator)
    x = torch.randn(37, 150, generator=generator) * torch.logspace(-3, 3, 150)
    for format in ("int8", "int4"):
        quantized = quantize_native(weight, format)
        assert quantized is not None
        packed = PackedMatrix.from_quantized(quantized[0])
        results = []
        for name in INSTRUCTION_SETS:
            if name != "portable":  # without fused multiply-adds
                use_product_kernels("int16", name)
                results.append(matmul(x, packed))
        use_product_kernels("int16", "")
        assert all(torch.equal(result, results[0]) for result in results)


def test_selection_for_everything_has_precedence() -> None:
    use_product_kernels("bfloat16", INSTRUCTION_SETS[0])
    with use_instruction_set(INSTRUCTION_SETS[-1]):
        assert get_kernels("bfloat16") == INSTRUCTION_SETS[-1]
    assert get_kernels("bfloat16") == INSTRUCTION_SETS[0]


@pytest.mark.skipif("tile_model" not in INSTRUCTION_SETS, reason="needs AVX-512 with bfloat16")
def test_comparison_with_the_model_finds_another_order_of_sums() -> None:
    for kind in product_kernels.MEASURED_KINDS:
        assert product_kernels.equals_model(kind, "tile_model")
    assert not product_kernels.equals_model("bfloat16", "avx512")
    assert product_kernels.equals_model("int16", "avx512")  # integer sums do not depend on the order


@pytest.mark.skipif("amx" not in INSTRUCTION_SETS, reason="needs a processor with AMX")
@pytest.mark.parametrize("kind", product_kernels.MEASURED_KINDS)
def test_matrix_units_equal_their_model(kind: str) -> None:
    assert product_kernels.equals_model(kind, "amx")
    product_kernels.override(kind, "amx")
    assert get_kernels(kind) == "amx"


@pytest.mark.skipif("tile_model" not in INSTRUCTION_SETS, reason="needs AVX-512 with bfloat16")
def test_tiles_sum_even_and_odd_inputs_of_each_group_separately() -> None:
    """The order of the sums of the tile instruction, for one row and for several."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).bfloat16()
    x = torch.randn(5, 96, generator=generator).bfloat16()
    expected = torch.zeros(5, 64)
    for start in range(0, 96, 32):
        sums = torch.zeros(2, 5, 64)
        for k in range(32):
            product = x[:, start + k, None].double() * weight[None, :, start + k].double()  # exact
            sums[k % 2] = (sums[k % 2].double() + product).float()  # one rounding, as in a fused multiply-add
        expected = expected + (sums[0] + sums[1])
    packed = pack(weight, "bfloat16")
    with use_instruction_set("tile_model"):
        assert torch.equal(matmul(x.float(), packed), expected)
        assert torch.equal(matmul(x[:1].float(), packed), expected[:1])
