"""Recognize files that are not a whole RWKV-4, 5 or 6 model by their tensor names, to name their type in errors."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fledge.core.errors import CheckpointError, UnsupportedError

RUNS = "Fledge runs RWKV-4, RWKV-5 Eagle (5.0, 5.1, 5.2) and RWKV-6 Finch (6.0)"

# (part of a tensor's name, what a file with such a tensor is, what to do about it)
UNSUPPORTED = (
    (".r_k", "an RWKV-7 checkpoint, and RWKV-7 is not supported yet", RUNS),
    ("att.time_maa_rkvw_w1", "an experimental RWKV-6 variant (x060b or x060c), which is not supported", RUNS),
    ("att.gate_w1", "an experimental RWKV-6 variant (x060a, with a LoRA as its gate), which is not supported", RUNS),
    (
        ".lora_A",
        "a LoRA adapter, not a whole model",
        "give its base model, and this file as --adapter (`fledge tune convert` converts it)",
    ),
    (".disha", "a DiSHA adapter, not a whole model", "merge it into its base model first"),
    ("rwkv.blocks.0.att.", "a VisualRWKV checkpoint, which is not supported yet", RUNS),
    (".weight_mx", "converted in advance by the rwkv package for one strategy", "give the original .pth instead"),
)


def check_supported(names: Collection[str], source: str) -> None:
    """Raise UnsupportedError if `names`, of any layout, are of a known kind of file that Fledge does not run."""
    for part, description, advice in UNSUPPORTED:
        if any(part in name for name in names):
            raise UnsupportedError(f"{source} is {description}; {advice}")


def check_whole_model(names: Collection[str], source: str) -> None:
    """Raise CheckpointError if official `names` cannot be those of a whole RWKV model."""
    if names and all(name.endswith("att.time_state") for name in names):
        raise CheckpointError(
            f"{source} is a tuned state, not a whole model; give the model it was tuned for, and this file as "
            "--adapter (`fledge tune convert` converts it)"
        )
    if not any(name == "emb.weight" or name.startswith("blocks.") for name in names):
        raise CheckpointError(
            f"{source} is not an RWKV checkpoint: looked for emb.weight, head.weight and blocks.0.att.*, "
            f"found {_format_names(names)}"
        )


def _format_names(names: Iterable[str]) -> str:
    listed = sorted(names)
    if not listed:
        return "no tensor at all"
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(f"{name!r:.60}" for name in listed[:4]) + more
