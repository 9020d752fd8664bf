"""`fledge quantize`: write a checkpoint with int8 or int4 matrices, and report the errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.terminal import SlowBar, escape_controls, print_rows

if TYPE_CHECKING:
    from fledge.checkpoint.quantization.quantizer import QuantizationReport
    from fledge.checkpoint.quantization.sensitivity import MatrixImportance

MAX_ERRORS_SHOWN = 3
"""Number of matrices with the largest errors in the summary."""

app = typer.Typer(name="quantize", add_completion=False)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint (file or folder) or a hub name.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    to: Annotated[
        str, typer.Option(metavar="SCHEME", help="int8, int4, or mixed (int4 with sensitive matrices in int8).")
    ],
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Choose the rounding for this text: plain text or JSON lines."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Then measure the quality on this text (not that of --calibrate)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a checkpoint with its matrices in 8 or 4 bits, for the CPU.

    The embedding and small tensors do not change. The result is a .safetensors file that every command accepts.
    """
    with SlowBar("reading the checkpoint") as bar:
        from fledge.checkpoint.quantization.quantizer import check_request, quantize
        from fledge.engine.llm.loading import locate_checkpoint

        check_request(target, to, force)
        if report is not None:
            _check_text(report)
        path = str(locate_checkpoint(source))
        importance = None if calibrate is None else _measure_importance(path, calibrate, bar)
        quantization = quantize(
            path,
            target,
            to,
            importance=importance,
            force=force,
            report=lambda name, done, total: bar.step(f"rounding {escape_controls(name)}", done, total),
        )
    print_rows(report_rows(quantization))
    if report is not None:
        _print_quality(source, target, report)


def report_rows(report: QuantizationReport) -> list[tuple[str, str]]:
    """Label and text of each fact about the written file."""
    counts = Counter(report.formats.values())
    before, after = report.nbytes_before, report.nbytes
    worst = sorted(report.errors, key=lambda name: -report.errors[name])[:MAX_ERRORS_SHOWN]
    of = "outputs" if report.calibrated else "weights"
    return [
        ("file", str(report.target)),
        ("size", f"{after:,} bytes, {after / before:.0%} of {before:,}"),
        ("matrices", ", ".join(f"{count} in {name}" for name, count in counts.most_common())),
        ("bits", f"{report.bits_per_weight:.2f} per weight of these matrices"),
        *(
            (f"error of {of}" if not index else "", f"{report.errors[name]:.2%} {name} ({report.formats[name]})")
            for index, name in enumerate(worst)
        ),
    ]


def _check_text(path: Path) -> None:
    """Read the text once, so that an error in it is reported before the work and not after it."""
    from fledge.data.texts import read_texts

    for _ in read_texts(path):
        pass


def _measure_importance(source: str, text: Path, bar: SlowBar) -> dict[str, MatrixImportance]:
    from fledge.checkpoint.quantization.calibration import calibrate
    from fledge.data.texts import read_texts

    texts = [document.text for document in read_texts(text)]
    return calibrate(source, texts, report=lambda done, total: bar.step("calibrating", done, total))


def _print_quality(source: str, target: Path, text: Path) -> None:
    """Print the table of `fledge bench quality` for the written file."""
    from fledge.cli.bench.quality import print_quality, run_quality

    print()
    print_quality(run_quality(text, source, (str(target),)))
