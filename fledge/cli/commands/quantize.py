"""`fledge quantize`: a checkpoint with its matrices in int8 or int4, and what that did to it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.terminal import SlowBar, print_rows, visible

if TYPE_CHECKING:
    from fledge.checkpoint.quantization.quantizer import QuantizationReport
    from fledge.checkpoint.quantization.sensitivity import MatrixImportance

WORST = 3
"""Matrices with the largest errors that the summary names."""

app = typer.Typer(name="quantize", add_completion=False)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint (file or folder) or a hub name.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    to: Annotated[str, typer.Option(metavar="SCHEME", help="int8, int4, or mixed: int4 with the best part in int8.")],
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Round so that this text is predicted well: plain, or JSON lines."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Then measure what was lost, on this text; not the same one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a checkpoint with its matrices in 8 or 4 bits, for the CPU.

    The embedding and everything small stays as it is. The result is a .safetensors that every command takes.
    """
    with SlowBar("reading the checkpoint") as bar:
        from fledge.checkpoint.quantization.quantizer import check_request, quantize
        from fledge.engine.llm.loading import locate_checkpoint

        check_request(target, to, force)
        if report is not None:
            _check_text(report)
        path = str(locate_checkpoint(source))
        importance = None if calibrate is None else _importance(path, calibrate, bar)
        done = quantize(
            path,
            target,
            to,
            importance=importance,
            force=force,
            report=lambda name, at, total: bar.step(f"rounding {visible(name)}", at, total),
        )
    print_rows(rows(done))
    if report is not None:
        _report(source, target, report)


def rows(done: QuantizationReport) -> list[tuple[str, str]]:
    """Label and text of each fact about what was written."""
    counts = Counter(done.formats.values())
    before, after = done.nbytes_before, done.nbytes
    worst = sorted(done.errors, key=lambda name: -done.errors[name])[:WORST]
    of = "outputs" if done.calibrated else "weights"
    return [
        ("file", str(done.target)),
        ("size", f"{after:,} bytes, {after / before:.0%} of {before:,}"),
        ("matrices", ", ".join(f"{count} in {name}" for name, count in counts.most_common())),
        ("bits", f"{done.bits_per_weight:.2f} a weight of these matrices"),
        *(
            (f"error of {of}" if not at else "", f"{done.errors[name]:.2%} {name} ({done.formats[name]})")
            for at, name in enumerate(worst)
        ),
    ]


def _check_text(path: Path) -> None:
    """Fail before the work, not after it."""
    from fledge.data.texts import read_texts

    for _ in read_texts(path):
        pass


def _importance(source: str, text: Path, bar: SlowBar) -> dict[str, MatrixImportance]:
    from fledge.checkpoint.quantization.calibration import calibrate
    from fledge.data.texts import read_texts

    texts = [document.text for document in read_texts(text)]
    return calibrate(source, texts, report=lambda at, total: bar.step("calibrating", at, total))


def _report(source: str, target: Path, text: Path) -> None:
    """The table of `fledge bench quality` for what was just written."""
    from fledge.cli.bench.quality import print_quality, run_quality

    print()
    print_quality(run_quality(text, source, (str(target),)))
