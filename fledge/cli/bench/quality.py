"""`fledge bench quality`: the cost of quantization, as tables and a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.bench.runner import OutputOptions, RecordOption, run_suite
from fledge.cli.terminal import escape_controls, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.quality import QualityBenchmark

HEADS = ("format", "bits per weight", "perplexity", "change", "bits per byte", "KL", "same top token")
SUMMARY = ("perplexity", "perplexity_change", "perplexity_change_error", "bits_per_byte", "kl", "agreement")


def quality(
    text: Annotated[Path, typer.Option(help="The text to predict: JSON lines with text and lang, or plain text.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint that is not quantized. (default: the bundled one)")
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Names or quantized files, separated by commas. (default: bf16,int8,int4,mixed)")
    ] = "bf16,int8,int4,mixed",
    tokens: Annotated[int | None, typer.Option(help="Tokens of each language, at most. (default: all)")] = None,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Also count the zeros of the channel mix.")] = False,
    record: RecordOption = None,
) -> None:
    """Measure the cost of weight formats: perplexity, and the distance from float32, by language.

    Use a text that the model has not been trained on. The last line on standard output is one JSON object.
    """
    names = tuple(filter(None, formats.split(",")))
    result = run_quality(text, model, names, tokens=tokens, sparsity=sparsity, record=record)
    print_quality(result)
    print()
    overall = {
        name: {
            "bits_per_weight": round(values["bits_per_weight"], 3),
            **{key: values["figures"]["all"][key] for key in SUMMARY},
        }
        for name, values in result["formats"].items()
    }
    print(json.dumps(overall))


def run_quality(
    text: Path, model: str | None, formats: tuple[str, ...], *, record: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Run the benchmark with a progress bar and return its record. settings: more fields of QualityBenchmark."""

    def load() -> QualityBenchmark:
        from fledge.bench.quality import QualityBenchmark

        return QualityBenchmark(text, model, formats, **settings)

    return run_suite(load, OutputOptions(record), "tokens")


def print_quality(record: Mapping[str, Any]) -> None:
    """Print one table of all text, one by language if there are several, and one of zeros if they were counted."""
    metrics = {name: values["figures"] for name, values in record["formats"].items()}
    reference = metrics["float32"]
    overall = reference["all"]
    name = escape_controls(f"{record['model']['name']} on {record['text']['name']}")
    print_heading(f"{name}: {overall['tokens']:,} tokens, {overall['bytes']:,} bytes")
    bits = {name: values["bits_per_weight"] for name, values in record["formats"].items()}
    print_rows([_row(name, bits[name], by_language["all"]) for name, by_language in metrics.items()], HEADS)
    others = [name for name in metrics if name != "float32"]
    languages = [language for language in reference if language != "all"]
    if len(languages) > 1:
        print()
        print_heading("by language: perplexity in float32; its change and the KL in the other formats")
        rows = []
        for language in languages:
            values = reference[language]
            changes = [_change(metrics[other][language]) for other in others]
            rows.append((language, f"{values['tokens']:,}", f"{values['perplexity']:.2f}", *changes))
        print_rows(rows, ("language", "tokens", "float32", *others))
    if record["sparsity"]:
        print()
        print_heading("zeros in the channel mix, relu(k)^2")
        shares = [(layer["layer"], layer["zero_share"], layer["pair_share"]) for layer in record["sparsity"]]
        rows = [(f"{layer}", f"{zeros:.1%}", f"{pairs:.1%}") for layer, zeros, pairs in shares]
        print_rows(rows, ("layer", "zeros", "pairs of zeros"))


def _row(name: str, bits: float, metrics: Mapping[str, float]) -> tuple[str, ...]:
    change = f"{metrics['perplexity_change']:+.2%} ±{metrics['perplexity_change_error']:.2%}"
    compared = (change, _format_small(metrics["kl"]), f"{metrics['agreement']:.2%}")
    change, kl, agreement = ("", "", "") if name == "float32" else compared
    perplexity, bits_per_byte = f"{metrics['perplexity']:.3f}", f"{metrics['bits_per_byte']:.4f}"
    return (name, f"{bits:.2f}", perplexity, change, bits_per_byte, kl, agreement)


def _change(metrics: Mapping[str, float]) -> str:
    return f"{metrics['perplexity_change']:+.2%}, {_format_small(metrics['kl'])}"


def _format_small(value: float) -> str:
    """About three significant digits, without an exponent."""
    return f"{value:.5f}" if value < 0.001 else f"{value:.4f}"
