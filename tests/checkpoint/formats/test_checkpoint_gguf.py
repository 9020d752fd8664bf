"""GGUF files of other programs: exact tensors, quantized tensors without loss, and rejected files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from small_checkpoints import are_equal, make_tensors, save_pth
from torch import Tensor

gguf = pytest.importorskip("gguf")

import foreign_gguf as foreign  # noqa: E402 - it needs the package

from fledge.checkpoint import assemble, convert, inspect, load, load_model, read, verify  # noqa: E402
from fledge.checkpoint.formats.gguf.header import read_header  # noqa: E402
from fledge.checkpoint.formats.gguf.vocabulary import make_tokenizer_keys, read_tokenizer_spec  # noqa: E402
from fledge.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from fledge.tokenizer import byte_vocabulary, prune, world_vocabulary  # noqa: E402

TYPE = gguf.GGMLQuantizationType
SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 64, "head_size": 16}
MATRICES = ("receptance.weight", "key.weight", "value.weight", "gate.weight", "output.weight", "head.weight")


def make_finch(**sizes: Any) -> dict[str, Tensor]:
    return make_tensors("6.0", **(SIZES | sizes))


def write_foreign_file(path: Path, tensors: dict[str, Tensor], rescale: int = 0, **options: Any) -> Path:
    keys = foreign.make_keys(tensors, rescale) | options.pop("keys", {})
    return foreign.write(path, foreign.convert_tensors(tensors, rescale), keys, **options)


def is_matrix(name: str) -> bool:
    return name.endswith(MATRICES)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rescale", [0, 1, 2, 6])
def test_a_converted_file_equals_the_original(rescale: int, fused: bool, tmp_path: Path) -> None:
    """F16 is exact under multiplication by powers of two down to 2^-24; these matrices have no smaller numbers."""
    tensors = make_finch(n_layer=8)
    for name in filter(is_matrix, tensors):
        tensors[name] = (tensors[name] * 4096).round() / 4096
    float16_tensors = {name: t.half() if is_matrix(name) or name == "emb.weight" else t for name, t in tensors.items()}
    arrays = foreign.convert_tensors(float16_tensors, rescale, fused=fused)
    path = foreign.write(tmp_path / "m.gguf", arrays, foreign.make_keys(tensors, rescale))
    config, loaded = load(path)
    assert are_equal(float16_tensors, loaded) and list(loaded) == list(tensors)
    assert (config.version, config.n_head, config.mix_rank, config.decay_rank) == ("6.0", 4, 8, 12)
    assert config == load(save_pth(tmp_path, tensors))[0]


@pytest.mark.parametrize(
    "kind", [TYPE.F32, TYPE.BF16, TYPE.Q8_0, TYPE.Q4_0, TYPE.Q4_1, TYPE.Q5_0, TYPE.Q5_1, TYPE.Q6_K]
)
def test_every_type_agrees_with_the_package(kind: Any, tmp_path: Path) -> None:
    """Compare with the gguf package, which cannot pack Q6_K; its bytes are therefore random."""
    tensors = make_finch(n_layer=2, n_embd=256, dim_ffn=512)
    arrays = foreign.convert_tensors(tensors, 1)
    path = tmp_path / "m.gguf"
    if kind != TYPE.Q6_K:
        path = foreign.write(path, arrays, foreign.make_keys(tensors, 1), kind=kind)
    else:
        write_q6_k(path, arrays, foreign.make_keys(tensors, 1))
    loaded, meta = read(path), read(path, weights=False)
    assert bool(loaded.quantized) == (kind in (TYPE.Q8_0, TYPE.Q4_0, TYPE.Q4_1)) and "emb.weight" in loaded.tensors
    assert {name: t.dtype for name, t in loaded.tensors.items()} == {name: t.dtype for name, t in meta.tensors.items()}
    assert {n: (m.format, m.shape) for n, m in loaded.quantized.items()} == {
        n: (m.format, m.shape) for n, m in meta.quantized.items()
    }
    dense = loaded.dequantize()
    for tensor in gguf.GGUFReader(path).tensors:
        name = get_official_name(tensor.name)
        if not is_matrix(name) and name != "emb.weight":
            continue
        factor = 2 if name in ("blocks.1.att.output.weight", "blocks.1.ffn.value.weight") else 1
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)) * factor
        is_exact = name in loaded.quantized or dense[name].dtype != torch.float16
        assert torch.equal(dense[name].float(), expected if is_exact else expected.half().float()), name


def get_official_name(name: str) -> str:
    """Return the official name of a matrix, from an independent table."""
    if name in foreign.GLOBAL_NAMES.values():
        return next(official for official, original in foreign.GLOBAL_NAMES.items() if original == name)
    layer, inner = name.removeprefix("blk.").split(".", 1)
    return next(
        (f"blocks.{layer}.{official}" for official, original in foreign.BLOCK_NAMES.items() if original == inner), name
    )


def write_q6_k(path: Path, arrays: dict[str, Any], keys: dict[str, Any]) -> None:
    """Create matrices in Q6_K with random integers and small scales, so that none overflows."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[TYPE.Q6_K]
    generator = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "rwkv6")
    for key, value in keys.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, array in arrays.items():
        if array.ndim == 1 or any(part in name for part in foreign.ALWAYS_F32):
            writer.add_tensor(name, np.ascontiguousarray(array))
            continue
        blocks = generator.integers(0, 256, (array.size // block_size, block_bytes), dtype=np.uint8)
        blocks[:, -2:] = generator.normal(0, 1e-3, len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        writer.add_tensor(name, blocks.reshape(len(array), -1), raw_dtype=TYPE.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_matrices_without_an_exact_format_become_dense(tmp_path: Path) -> None:
    """-8 times the scale of a Q4_0 may overflow float16, a foreign Q8_0 may hold -128, and rescaling may overflow."""
    tensors = make_finch()
    path = write_foreign_file(tmp_path / "a.gguf", tensors, kind=TYPE.Q4_0)
    change_first_block(path, "blk.0.time_mix_key.weight", np.float16(9000).tobytes())
    loaded = read(path)
    assert "blocks.0.att.key.weight" not in loaded.quantized and "blocks.1.att.key.weight" in loaded.quantized
    key = loaded.tensors["blocks.0.att.key.weight"]
    assert key.dtype == torch.float32 and bool(key.isfinite().all()) and float(key.abs().max()) >= 9000

    path = write_foreign_file(tmp_path / "b.gguf", tensors, 1, kind=TYPE.Q8_0)
    change_first_block(path, "blk.2.time_mix_value.weight", np.float16(2).tobytes() + b"\x80")
    change_first_block(path, "blk.2.time_mix_output.weight", np.float16(60000).tobytes() + b"\x01")
    loaded = read(path)
    assert float(loaded.tensors["blocks.2.att.value.weight"][0, 0]) == -256
    assert float(loaded.tensors["blocks.2.att.output.weight"][0, 0]) == 240000
    assert "blocks.2.att.gate.weight" in loaded.quantized


def test_float16_that_overflows_in_rescaling_becomes_float32(tmp_path: Path) -> None:
    tensors = make_finch()
    tensors["blocks.2.att.output.weight"][0, 0] = 100000.0
    loaded = load(write_foreign_file(tmp_path / "m.gguf", tensors, 1))[1]
    output = loaded["blocks.2.att.output.weight"]
    assert output.dtype == torch.float32 and float(output[0, 0]) == pytest.approx(100000, rel=1e-3)
    assert loaded["blocks.1.att.output.weight"].dtype == torch.float16


def change_first_block(path: Path, name: str, start: bytes) -> None:
    location = read_header(path).locations[name]
    data = bytearray(path.read_bytes())
    data[location.begin : location.begin + len(start)] = start
    path.write_bytes(data)


def test_dense_tensors_are_mapped_and_the_file_is_unchanged(tmp_path: Path) -> None:
    path = write_foreign_file(tmp_path / "m.gguf", make_finch())
    before = path.read_bytes()
    loaded = load(path)[1]
    pointers = {loaded[name].untyped_storage().data_ptr() for name in ("emb.weight", "head.weight", "ln_out.bias")}
    assert len(pointers) == 1
    loaded["emb.weight"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_any_alignment_is_read(alignment: int, tmp_path: Path) -> None:
    tensors = make_finch()
    path = write_foreign_file(tmp_path / "m.gguf", tensors, kind=foreign.F32, keys={"general.alignment": alignment})
    assert are_equal(tensors, load(path)[1])


def test_the_header_agrees_with_the_package(tmp_path: Path) -> None:
    keys = foreign.make_world_keys(byte_vocabulary().tokens) | {"general.name": "a 名", "x.floats": [0.5, 2.0]}
    path = write_foreign_file(tmp_path / "m.gguf", make_finch(vocab_size=256), kind=TYPE.Q4_1, keys=keys)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == header.values.keys()
    for key, value in header.values.items():
        if isinstance(value, list):
            value = [text.decode() for text in value]
        elif isinstance(value, tuple):
            value = list(value.unpack())
        assert reader.fields[key].contents() == value, key
    assert [tensor.name for tensor in reader.tensors] == list(header.locations)
    for tensor, location in zip(reader.tensors, header.locations.values(), strict=True):
        assert (tensor.tensor_type, tensor.shape.tolist()[::-1]) == (location.type, list(location.shape))
        assert (tensor.data_offset, tensor.n_bytes) == (location.begin, location.nbytes)


def test_info_shows_types_and_names(tmp_path: Path) -> None:
    keys = {"general.name": "Small Finch", "tokenizer.chat_template": "rwkv-world"}
    info = inspect(write_foreign_file(tmp_path / "m.gguf", make_finch(), kind=TYPE.Q8_0, keys=keys))
    assert info.format == "gguf" and info.dtypes[0] == "int8" and "float32" in info.dtypes
    assert info.parameters == sum(tensor.numel() for tensor in make_finch().values())
    assert info.extra == {"name": "Small Finch", "chat_template": "rwkv-world", "gguf_types": "Q8_0, F32"}
    long = inspect(
        write_foreign_file(tmp_path / "n.gguf", make_finch(), keys={"tokenizer.chat_template": "{{ x }}" * 40})
    )
    assert long.extra == {"gguf_types": "F16, F32"}


def test_a_quantized_file_runs_and_is_verified(tmp_path: Path) -> None:
    path = write_foreign_file(tmp_path / "m.gguf", make_finch(vocab_size=256), kind=TYPE.Q8_0)
    assert verify(path).quantized
    with torch.no_grad():
        quantized = load_model(path).model(torch.tensor([[3, 1, 4]]))[0]
        expected = assemble(*load(path))(torch.tensor([[3, 1, 4]]))[0]
    assert_close_relative(quantized, expected, MODEL_TOLERANCE, "logits")
    change_first_block(path, "blk.1.channel_mix_key.weight", np.float16(np.inf).tobytes())
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.key\.weight contains non-finite values"):
        verify(path)


def test_the_dropped_axis_of_a_single_head_is_restored(tmp_path: Path) -> None:
    tensors = make_finch(head_size=64)
    arrays = foreign.convert_tensors(tensors, 0)
    for name in arrays:
        if "time_mix_first" in name:
            arrays[name] = arrays[name].reshape(-1)
    path = foreign.write(tmp_path / "m.gguf", arrays, foreign.make_keys(tensors, 0), kind=foreign.F32)
    assert are_equal(tensors, load(path)[1])


def test_the_epsilon_of_the_norms_is_read(tmp_path: Path) -> None:
    keys = {"rwkv6.attention.layer_norm_epsilon": 3e-6}
    config = load(write_foreign_file(tmp_path / "m.gguf", make_finch(), keys=keys))[0]
    assert (config.norm_eps, config.group_norm_eps) == (3e-6, 64e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rwkv6.embedding_length": 128}, "embedding_length says 128, its tensors say 64"),
        ({"rwkv6.block_count": 4}, "block_count says 4"),
        ({"rwkv6.wkv.head_size": 32}, "head_size says 32"),
        ({"rwkv6.wkv.head_size": 7}, "head_size says 7"),
        ({"rwkv6.wkv.head_size": "x"}, "not a count"),
        ({"rwkv6.rescale_every_n_layers": -1.0}, "not a count"),
        ({"rwkv6.attention.layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"rwkv6.attention.layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'"),
        ({"rwkv6.attention.layer_norm_epsilon": 1e30}, "impossible epsilons"),
    ],
)
def test_keys_that_contradict_the_tensors_are_rejected(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_foreign_file(tmp_path / "m.gguf", make_finch(), keys=keys)
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*({message})"):
        load(path)


@pytest.mark.parametrize("name", ["rwkv7", "arwkv7", "rwkv6qwen2", "llama"])
def test_other_architectures_are_rejected_by_name(name: str, tmp_path: Path) -> None:
    path = write_foreign_file(tmp_path / "m.gguf", make_finch(), architecture=name)
    message = "RWKV-7 model" if "rwkv7" in name else f"'{name}'"
    with pytest.raises(UnsupportedError, match=rf"m\.gguf is .*{message}, which is not supported"):
        load(path)


def test_one_file_of_several_is_rejected(tmp_path: Path) -> None:
    path = write_foreign_file(tmp_path / "m.gguf", make_finch(), keys={"split.count": 3})
    with pytest.raises(UnsupportedError, match=r"m\.gguf is one of 3 files of a model; merge them"):
        load(path)


def test_missing_unknown_and_repeated_tensors_are_rejected(tmp_path: Path) -> None:
    tensors, keys = make_finch(), foreign.make_keys(make_finch(), 0)
    arrays = foreign.convert_tensors(tensors, 0)
    without = {name: array for name, array in arrays.items() if name != "blk.1.time_mix_gate.weight"}
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.att\.gate\.weight \(64, 64\)"):
        load(foreign.write(tmp_path / "a.gguf", without, keys))
    with pytest.raises(CheckpointError, match=r"unexpected: 'blk\.0\.strange\.weight'"):
        load(foreign.write(tmp_path / "b.gguf", {**arrays, "blk.0.strange.weight": arrays["output.weight"]}, keys))
    both = arrays | {"blk.1.time_mix_lerp_k.weight": np.zeros(64, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"holds 'blocks\.1\.att\.time_maa_k' twice"):
        load(foreign.write(tmp_path / "c.gguf", both, keys))
    integers = {**arrays, "output_norm.bias": np.zeros(64, dtype=np.int32)}
    with pytest.raises(UnsupportedError, match=r"d\.gguf.*I32"):
        load(foreign.write(tmp_path / "d.gguf", integers, keys, kinds={"output_norm.bias": TYPE.I32}))


VOCABULARIES = {
    "world": world_vocabulary(),
    "pruned": prune(world_vocabulary(), [300, 261, 5000, 65529], size=300),
    "bytes": byte_vocabulary(),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_vocabularies_are_read_back(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    for keys in (
        foreign.make_world_keys(vocabulary.tokens),
        add_prefix(make_tokenizer_keys(vocabulary, vocabulary.size)),
    ):
        if kind == "bytes" and "tokenizer.ggml.eot_token_id" in keys:
            keys["tokenizer.ggml.token_type"] = [1] * 256
        assert read_tokenizer_spec(parse_keys(keys), vocabulary.size, "x") == vocabulary.to_spec()
        if kind != "bytes":
            del keys["tokenizer.ggml.token_type"]  # then only the texts are used


def add_prefix(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def parse_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Convert keys to the form in which the header returns them."""
    from fledge.checkpoint.formats.gguf.header import NumberArray

    loaded = dict(keys)
    loaded["tokenizer.ggml.tokens"] = [
        text.encode() if isinstance(text, str) else text for text in keys["tokenizer.ggml.tokens"]
    ]
    if "tokenizer.ggml.token_type" in keys:
        types = np.array(keys["tokenizer.ggml.token_type"], dtype="<i4")
        loaded["tokenizer.ggml.token_type"] = NumberArray("i", types.tobytes())
    return loaded


def test_unknown_token_lists_are_ignored_or_rejected() -> None:
    world = world_vocabulary()
    keys = parse_keys(foreign.make_world_keys(world.tokens))
    texts = keys["tokenizer.ggml.tokens"]
    assert read_tokenizer_spec(keys, 65535, "x") is None and read_tokenizer_spec({}, 65536, "x") is None
    renamed = [*texts[:65530], b"<|user|>", *texts[65531:]]  # a tune may name a reserved id
    assert read_tokenizer_spec(keys | {"tokenizer.ggml.tokens": renamed}, 65536, "x") == {"kind": "world"}
    with pytest.raises(UnsupportedError, match="x has 65536 token rows but not World's tokens"):
        read_tokenizer_spec(keys | {"tokenizer.ggml.tokens": [texts[0], *texts[2:], texts[1]]}, 65536, "x")
    shuffled = [*texts[:257], texts[400], texts[300]]
    assert read_tokenizer_spec({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": shuffled}, 259, "x") is None


def test_without_the_package_only_common_types_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        write_foreign_file(tmp_path / f"{kind.name}.gguf", make_finch(), kind=kind) for kind in (TYPE.Q8_0, TYPE.Q5_1)
    ]
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read(paths[0]).quantized
    with pytest.raises(UnsupportedError, match=r'Q5_1\.gguf.* pip install "fledge\[gguf\]"'):
        read(paths[1])
    other = write_foreign_file(tmp_path / "llama.gguf", make_finch(), kind=TYPE.Q5_1, architecture="llama")
    with pytest.raises(UnsupportedError, match="of the architecture 'llama'"):  # the error does not mention the package
        read(other)
    with pytest.raises(UnsupportedError, match=r'pip install "fledge\[gguf\]"'):
        convert(paths[0], tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()
