"""Detect the model from tensor names and shapes, and check that it is complete.

The order of keys is not used, since safetensors sorts them. If several tensors have the same size, the majority
decides, so that one damaged tensor is reported by its name. Shapes do not show the number of heads of a transformer;
the record in the file does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fledge.checkpoint.shapes import Shape, get_expected_shapes
from fledge.checkpoint.unsupported import check_supported, check_whole_model
from fledge.core.errors import CheckpointError, ConfigError
from fledge.models.config import ModelConfig

BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)")
MAX_LISTED = 5  # names in a message; the others are only counted

# An axis of a tensor that shows a size: (name relative to the block, number of axes, axis).
SizeSource = tuple[str, int, int]
WIDTH: tuple[SizeSource, ...] = (
    ("emb.weight", 2, 1),
    ("head.weight", 2, 1),
    ("ln_out.weight", 1, 0),
    ("ln1.weight", 1, 0),
)
INNER: tuple[SizeSource, ...] = tuple((f"att.{name}.weight", 2, 0) for name in ("key", "value", "receptance"))
HIDDEN: tuple[SizeSource, ...] = (("ffn.key.weight", 2, 0), ("ffn.value.weight", 2, 1))
HEADS_5: tuple[SizeSource, ...] = tuple(
    (f"att.{name}", axes, 0) for name in ("time_decay", "time_faaaa", "time_first") for axes in (1, 2)
)
HEADS_6: tuple[SizeSource, ...] = (("att.time_faaaa", 2, 0),)
MIX_RANK: tuple[SizeSource, ...] = (("att.time_maa_w2", 3, 1),)
DECAY_RANK: tuple[SizeSource, ...] = (("att.time_decay_w2", 2, 0), ("att.time_decay_w1", 2, 1))


def detect(shapes: Mapping[str, Shape], source: str = "this checkpoint", heads: int | None = None) -> ModelConfig:
    """Return the config of a complete checkpoint with these official names and shapes.

    source: the file's name in errors. heads: of a transformer, from the record beside its tensors. Raises
    UnsupportedError for RWKV-7, experimental variants and adapters, and CheckpointError with the names of tensors that
    are missing, unexpected or of the wrong shape.
    """
    check_supported(shapes.keys(), source)
    check_whole_model(shapes.keys(), source)
    _check_vocabulary_rows(shapes, source)
    layers = _count_layers(shapes, source)
    inner = {match[2] for name in shapes if (match := BLOCK.fullmatch(name))}
    version = _detect_version(inner, shapes)
    sizes = _Sizes(shapes, source)
    bonus = "time_first" if version[0] == "5" and "att.time_first" in inner else "time_faaaa"
    try:
        config = ModelConfig(
            version=version,
            vocab_size=sizes.read("the vocabulary size", (("emb.weight", 2, 0), ("head.weight", 2, 0))),
            n_layer=layers,
            n_embd=sizes.read("the width", WIDTH),
            dim_att=sizes.read("the attention width", INNER),
            dim_ffn=sizes.read("the hidden width", HIDDEN),
            n_head=_detect_heads(version, sizes, heads, source),
            mix_rank=sizes.read("the token-shift rank", MIX_RANK) if version == "6.0" else 0,
            decay_rank=sizes.read("the decay rank", DECAY_RANK) if version == "6.0" else 0,
            bonus=bonus,
            tuned_state=version not in ("4", "llama") and "att.time_state" in inner,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: the shapes contradict each other: {error}") from error
    check_shapes(shapes, config, source)
    return config


def check_shapes(shapes: Mapping[str, Shape], config: ModelConfig, source: str) -> None:
    """Raise CheckpointError, naming the differences, unless `shapes` are exactly those of `config`."""
    expected = get_expected_shapes(config)
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    unexpected = [f"{name!r:.80} {shape}" for name, shape in shapes.items() if name not in expected]
    wrong = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    differences = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{kind}: {_format_list(names)}" for kind, names in differences if names]
    if problems:
        raise CheckpointError(
            f"{source} is not a complete {config.family} {config.version} checkpoint of {config.n_layer} layers and "
            f"width {config.n_embd}; {'; '.join(problems)}"
        )


def _format_list(items: list[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def _check_vocabulary_rows(shapes: Mapping[str, Shape], source: str) -> None:
    emb, head = shapes.get("emb.weight"), shapes.get("head.weight")
    if emb and head and emb[0] != head[0]:
        raise CheckpointError(
            f"{source}: emb.weight has {emb[0]} rows but head.weight has {head[0]}; both must be the vocabulary size"
        )


def _count_layers(shapes: Iterable[str], source: str) -> int:
    """Return 1 + the largest block number; every smaller number must be present."""
    numbers = {int(match[1]) for name in shapes if (match := BLOCK.fullmatch(name))}
    if not numbers:
        raise CheckpointError(f"{source} is not an RWKV checkpoint: it has no tensor named blocks.<number>.<name>")
    layers = 1 + max(numbers)
    if len(numbers) < layers:
        count = layers - len(numbers)
        candidates = range(min(layers, len(numbers) + MAX_LISTED))
        absent = [str(number) for number in candidates if number not in numbers][:MAX_LISTED]
        subject, verb = ("block", "is") if count == 1 else ("blocks", "are")
        raise CheckpointError(
            f"{source}: {subject} {', '.join(absent)}{'' if count <= MAX_LISTED else ', ...'} of {layers} "
            f"{verb} missing (they are numbered 0 to {layers - 1})"
        )
    return layers


def _detect_version(inner: set[str], shapes: Mapping[str, Shape]) -> str:
    """Return one of VERSIONS, from the names inside the blocks and the axes of time_decay."""
    if "att.query.weight" in inner:
        return "llama"
    if "att.time_maa_x" in inner or "att.time_maa_w1" in inner:
        return "6.0"
    if "att.ln_x.weight" not in inner:
        return "4"
    if "att.gate.weight" not in inner:
        return "5.0"
    decays = [shape for name, shape in shapes.items() if name.endswith(".att.time_decay")]
    per_channel = sum(len(shape) == 2 and shape[1] > 1 for shape in decays)
    return "5.2" if 2 * per_channel > len(decays) else "5.1"


def _detect_heads(version: str, sizes: _Sizes, recorded: int | None, source: str) -> int:
    if version == "4":
        return 0
    if version != "llama":
        return sizes.read("the heads", HEADS_6 if version == "6.0" else HEADS_5)
    if recorded is None:
        raise CheckpointError(
            f"{source} is a transformer without a record of its heads, which shapes do not show; give the .safetensors "
            "that Fledge wrote"
        )
    return recorded


class _Sizes:
    """The shapes of a checkpoint, from which sizes are read by majority vote."""

    def __init__(self, shapes: Mapping[str, Shape], source: str) -> None:
        self._source = source
        self._by_name: dict[str, list[Shape]] = {}
        for name, shape in shapes.items():
            match = BLOCK.fullmatch(name)
            self._by_name.setdefault(match[2] if match else name, []).append(tuple(shape))

    def read(self, what: str, sources: tuple[SizeSource, ...]) -> int:
        """Return the size that most of `sources` show. Raises CheckpointError if none of them exists."""
        votes = Counter(
            shape[axis]
            for name, axes, axis in sources
            for shape in self._by_name.get(name, [])
            if len(shape) == axes and shape[axis] > 0
        )
        if not votes:
            names = ", ".join(dict.fromkeys(name for name, _, _ in sources))
            raise CheckpointError(f"{self._source}: cannot determine {what}: missing or misshapen: {names}")
        return votes.most_common(1)[0][0]
