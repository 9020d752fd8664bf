"""`fledge bench quality`: what quantisation costs a model, as tables and a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.measuring import keep
from fledge.cli.terminal import SlowBar, print_heading, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.quality import Outcome

HEADS = ("format", "bits a weight", "perplexity", "change", "bits a byte", "KL", "same top token")


def quality(
    text: Annotated[Path, typer.Option(help="What to predict: JSON lines with text and lang, or a plain text.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint that is not quantised. (default: the bundled one)")
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Names or quantised files, separated by commas. (default: bf16,int8,int4,mixed)")
    ] = "bf16,int8,int4,mixed",
    tokens: Annotated[int | None, typer.Option(help="Read so many of each language at most. (default: all)")] = None,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Count the zeros of the channel mix too.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure what a format costs: perplexity, and the distance to float32, by language.

    The text should be one that the model has not seen. The last line on standard output is one JSON object.
    """
    outcome = measured(model, text, tuple(filter(None, formats.split(","))), tokens, sparsity)
    keep(outcome, record)
    show(outcome)
    print()
    short = ("perplexity", "perplexity_change", "perplexity_change_error", "bits_per_byte", "kl", "agreement")
    overall = {
        name: {"bits_per_weight": round(outcome.bits[name], 3), **{key: by["all"][key] for key in short}}
        for name, by in outcome.figures().items()
    }
    print(json.dumps(overall))


def measured(
    model: str | None, text: Path, formats: tuple[str, ...], tokens: int | None = None, sparsity: bool = False
) -> Outcome:
    """The figures, with a bar meanwhile."""
    with SlowBar("measuring", "tokens", per_second=1) as bar:
        from fledge.bench.quality import Spec, run

        return run(Spec(text, model, formats, tokens, sparsity), bar.update)


def show(outcome: Outcome) -> None:
    """One table of all text, one by language, one of zeros; the last two where there is something in them."""
    figures = outcome.figures()
    overall = figures["float32"]["all"]
    name = visible(f"{outcome.model['name']} on {outcome.text['name']}")
    print_heading(f"{name}: {overall['tokens']:,} tokens, {overall['bytes']:,} bytes")
    print_rows([_row(name, outcome.bits[name], by["all"]) for name, by in figures.items()], HEADS)
    others = [name for name in figures if name != "float32"]
    languages = [language for language in figures["float32"] if language != "all"]
    if len(languages) > 1:
        print()
        print_heading("by language: perplexity in float32; its change and the KL in the other formats")
        print_rows(
            [
                (
                    language,
                    f"{figures['float32'][language]['tokens']:,}",
                    f"{figures['float32'][language]['perplexity']:.2f}",
                    *(_change(figures[other][language]) for other in others),
                )
                for language in languages
            ],
            ("language", "tokens", "float32", *others),
        )
    if outcome.sparsity:
        print()
        print_heading("zeros in the channel mix, relu(k)^2")
        print_rows(
            [(str(layer.layer), f"{layer.zero_share:.1%}", f"{layer.pair_share:.1%}") for layer in outcome.sparsity],
            ("layer", "zeros", "pairs of zeros"),
        )


def _row(name: str, bits: float, figures: dict[str, float]) -> tuple[str, ...]:
    change = f"{figures['perplexity_change']:+.2%} ±{figures['perplexity_change_error']:.2%}"
    change = "" if name == "float32" else change
    compared = ("", "") if name == "float32" else (_small(figures["kl"]), f"{figures['agreement']:.2%}")
    return (
        *(name, f"{bits:.2f}", f"{figures['perplexity']:.3f}", change),
        *(f"{figures['bits_per_byte']:.4f}", *compared),
    )


def _change(figures: dict[str, float]) -> str:
    return f"{figures['perplexity_change']:+.2%}, {_small(figures['kl'])}"


def _small(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.5f}" if value < 0.001 else f"{value:.4f}"
