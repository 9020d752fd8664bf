"""What model a set of tensor names and shapes is, and whether it is all there.

Decides from names and shapes alone: never from the order of keys (safetensors sorts them), and by majority where
several tensors tell the same size, so that one damaged tensor is reported as itself. No values, no files. The one thing
that shapes cannot tell is into how many heads a transformer divides its width; the file's own record does.
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
LISTED = 5  # names a message spells out before it only counts

# Which axis of which tensor tells a size: (name from the block on, number of axes, axis).
Sign = tuple[str, int, int]
WIDTH: tuple[Sign, ...] = (("emb.weight", 2, 1), ("head.weight", 2, 1), ("ln_out.weight", 1, 0), ("ln1.weight", 1, 0))
INNER: tuple[Sign, ...] = tuple((f"att.{name}.weight", 2, 0) for name in ("key", "value", "receptance"))
HIDDEN: tuple[Sign, ...] = (("ffn.key.weight", 2, 0), ("ffn.value.weight", 2, 1))
HEADS_5: tuple[Sign, ...] = tuple(
    (f"att.{name}", axes, 0) for name in ("time_decay", "time_faaaa", "time_first") for axes in (1, 2)
)
HEADS_6: tuple[Sign, ...] = (("att.time_faaaa", 2, 0),)
MIX_RANK: tuple[Sign, ...] = (("att.time_maa_w2", 3, 1),)
DECAY_RANK: tuple[Sign, ...] = (("att.time_decay_w2", 2, 0), ("att.time_decay_w1", 2, 1))


def detect(shapes: Mapping[str, Shape], source: str = "this checkpoint", heads: int | None = None) -> ModelConfig:
    """The config of a complete checkpoint with these official names and shapes.

    `source` names the file in errors. heads: of a transformer, from the record beside its tensors. Raises
    UnsupportedError for RWKV-7, for experimental variants and for adapters, and CheckpointError where tensors are
    missing, unexpected or of the wrong shape, each by name.
    """
    check_supported(shapes.keys(), source)
    check_whole_model(shapes.keys(), source)
    _check_vocabulary_rows(shapes, source)
    layers = _count_layers(shapes, source)
    inner = {match[2] for name in shapes if (match := BLOCK.fullmatch(name))}
    version = _version(inner, shapes)
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
            n_head=_heads(version, sizes, heads, source),
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
    """Raise CheckpointError unless `shapes` are exactly those `config` asks for; the message names what differs."""
    expected = get_expected_shapes(config)
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    unexpected = [f"{name!r:.80} {shape}" for name, shape in shapes.items() if name not in expected]
    wrong = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{kind}: {_few(names)}" for kind, names in found if names]
    if problems:
        raise CheckpointError(
            f"{source} is not a complete {config.family} {config.version} checkpoint of {config.n_layer} layers and "
            f"width {config.n_embd}; {'; '.join(problems)}"
        )


def _few(items: list[str]) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _check_vocabulary_rows(shapes: Mapping[str, Shape], source: str) -> None:
    emb, head = shapes.get("emb.weight"), shapes.get("head.weight")
    if emb and head and emb[0] != head[0]:
        raise CheckpointError(
            f"{source}: emb.weight has {emb[0]} rows but head.weight has {head[0]}; both must be the vocabulary size"
        )


def _count_layers(shapes: Iterable[str], source: str) -> int:
    """1 + the largest block number; every number below it must be there."""
    numbers = {int(match[1]) for name in shapes if (match := BLOCK.fullmatch(name))}
    if not numbers:
        raise CheckpointError(f"{source} is not an RWKV checkpoint: it has no tensor named blocks.<number>.<name>")
    layers = 1 + max(numbers)
    if len(numbers) < layers:
        absent = [str(number) for number in range(min(layers, len(numbers) + LISTED)) if number not in numbers][:LISTED]
        verb = "is" if layers - len(numbers) == 1 else "are"
        blocks = "block" if verb == "is" else "blocks"
        raise CheckpointError(
            f"{source}: {blocks} {', '.join(absent)}{'' if layers - len(numbers) <= LISTED else ', ...'} of {layers} "
            f"{verb} missing (they are numbered 0 to {layers - 1})"
        )
    return layers


def _version(inner: set[str], shapes: Mapping[str, Shape]) -> str:
    """One of VERSIONS, from the names inside the blocks and the axes of time_decay."""
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


def _heads(version: str, sizes: _Sizes, recorded: int | None, source: str) -> int:
    if version == "4":
        return 0
    if version != "llama":
        return sizes.read("the heads", HEADS_6 if version == "6.0" else HEADS_5)
    if recorded is None:
        raise CheckpointError(
            f"{source} is a transformer without a record of its heads, which shapes do not tell; give the .safetensors "
            "that Fledge wrote"
        )
    return recorded


class _Sizes:
    """The shapes of a checkpoint, asked for one size at a time."""

    def __init__(self, shapes: Mapping[str, Shape], source: str) -> None:
        self._source = source
        self._by_name: dict[str, list[Shape]] = {}
        for name, shape in shapes.items():
            match = BLOCK.fullmatch(name)
            self._by_name.setdefault(match[2] if match else name, []).append(tuple(shape))

    def read(self, what: str, signs: tuple[Sign, ...]) -> int:
        """The size that most of the tensors in `signs` show; CheckpointError where none of them is there."""
        votes = Counter(
            shape[axis]
            for name, axes, axis in signs
            for shape in self._by_name.get(name, [])
            if len(shape) == axes and shape[axis] > 0
        )
        if not votes:
            names = ", ".join(dict.fromkeys(name for name, _, _ in signs))
            raise CheckpointError(f"{self._source}: cannot tell {what}: missing or misshapen: {names}")
        return votes.most_common(1)[0][0]
