"""`fledge info`: describe a checkpoint or an adapter. It reads names, shapes and metadata, never the weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.terminal import print_rows

if TYPE_CHECKING:
    from fledge.checkpoint import Adapter, CheckpointInfo

app = typer.Typer(name="info", add_completion=False)


@app.command()
def info(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="A checkpoint (file or folder) or a hub name. (default: the bundled model)"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a checkpoint or an adapter is, without reading its weights."""
    from fledge.checkpoint import inspect, inspect_adapter
    from fledge.engine.llm.loading import locate_checkpoint

    path = locate_checkpoint(file)
    if adapter := inspect_adapter(path):
        if as_json:
            print(json.dumps(adapter_record(adapter), ensure_ascii=False))
        else:
            print_rows(_adapter_rows(adapter))
        return
    checkpoint_info = inspect(path)
    if as_json:
        print(json.dumps(checkpoint_record(checkpoint_info), ensure_ascii=False))
        return
    print_rows([*checkpoint_info.to_rows(), *_model_rows(checkpoint_info.extra)])


def checkpoint_record(info: CheckpointInfo) -> dict[str, Any]:
    """The object that `--json` prints for a checkpoint."""
    return {
        "path": str(info.path),
        "format": info.format,
        "config": {**asdict(info.config), "family": info.config.family, "head_size": info.config.head_size},
        "parameters": info.parameters,
        "dtypes": list(info.dtypes),
        "quantized": {format: asdict(share) for format, share in info.quantized.items()},
        "bits_per_weight": info.bits_per_weight,
        "bytes": info.nbytes,
        "state_bytes": info.state_nbytes,
        "flops_per_token": info.flops_per_token,
        "tokenizer": info.tokenizer,
        "tokenizer_spec": info.tokenizer_spec,
        "extra": info.extra,
    }


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """The object that `--json` prints for an adapter; null if its kind or its file does not have the value."""
    return {
        "path": str(adapter.path),
        "kind": adapter.kind,
        "rank": adapter.rank or None,
        "alpha": adapter.alpha,
        "targets": list(adapter.targets),
        "parts": sorted(adapter.full_parameters),
        "state": _state_shape(adapter),
        "parameters": _count_parameters(adapter),
        "bytes": adapter.nbytes,
        "base": adapter.base and asdict(adapter.base),
        "template": adapter.template,
        "training": dict(adapter.training),
    }


def _count_parameters(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.tensors.values())


def _state_shape(adapter: Adapter) -> list[int] | None:
    """(layers, heads, K, V); None without a tuned state."""
    shapes = [list(tensor.shape) for tensor in adapter.state.values()]
    return [len(shapes), *shapes[0]] if shapes else None


NOT_RECORDED = "not recorded"


def _adapter_rows(adapter: Adapter) -> list[tuple[str, str]]:
    base, state = adapter.base, _state_shape(adapter)
    rows = [("file", str(adapter.path)), ("kind", "tuned state" if adapter.kind == "state" else "LoRA")]
    if adapter.kind == "lora":
        alpha = f"{NOT_RECORDED}; use it with --alpha" if adapter.alpha is None else f"{adapter.alpha:g}"
        rows += [("rank", str(adapter.rank)), ("alpha", alpha), ("targets", ", ".join(adapter.targets))]
    if adapter.full_parameters:
        rows.append(("fully trained", f"{len(adapter.full_parameters)} tensors, first: {min(adapter.full_parameters)}"))
    if state is not None:
        rows.append(("state", f"{state[0]} layers, {state[1]} heads of {' x '.join(str(side) for side in state[2:])}"))
    if base is None:
        rows.append(("base", NOT_RECORDED))
    else:
        sizes = f"{base.config.n_layer} layers, width {base.config.n_embd}"
        rows.append(("base", f"{base.name}: {base.config.family}, {sizes}, {base.identity}"))
    facts = {key: value for key, value in adapter.training.items() if key not in ("template", "lora")}
    return [
        *rows,
        ("template", adapter.template or NOT_RECORDED),
        ("parameters", f"{_count_parameters(adapter):,} in {adapter.nbytes:,} bytes"),
        *_extra_rows(facts),
    ]


def _model_rows(extra: dict[str, Any]) -> list[tuple[str, str]]:
    """The extra metadata of a model file, and the settings of `fledge tune full` if it made the file, one per row."""
    tuned = extra.get("tuned")
    if not isinstance(tuned, dict):
        return _extra_rows(extra)
    rest = {key: value for key, value in extra.items() if key != "tuned"}
    settings = {key: value for key, value in tuned.items() if key not in ("mode", "from", "template")}
    kind = [("kind", "all weights tuned"), ("tuned from", _extra_text(tuned.get("from", NOT_RECORDED)))]
    return [*kind, *_extra_rows({"template": NOT_RECORDED, **rest}), *_extra_rows(settings)]


def _extra_rows(extra: dict[str, Any]) -> list[tuple[str, str]]:
    """The extra metadata of a file, one row for each key."""
    return [(str(key).replace("_", " "), _extra_text(value)) for key, value in extra.items() if value != {}]


def _extra_text(value: Any) -> str:
    """A value as short text: numbers with four digits, a table as "key number, ...", lists without brackets."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return "; ".join(map(_extra_text, value))
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_extra_text(inner)}" for key, inner in value.items())
    return json.dumps(value)
