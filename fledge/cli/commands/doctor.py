"""`fledge doctor`: what is installed, which kernels run, and whether they are correct. The exit code is 1 if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.terminal import SlowBar, print_heading, print_rows
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.diagnostics.diagnosis import Diagnosis
    from fledge.diagnostics.selfcheck import KernelCheck

app = typer.Typer(name="doctor", add_completion=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=NAME",
            help="Use this instruction set for the products of bfloat16 or int16 (int8 and int4 weights) on this "
            "machine from now on; auto: the fastest. May be repeated.",
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the kernels of this machine again.")] = False,
) -> None:
    """Check this installation and the results of its kernels.

    Prints versions, kernels with a self-check, the bundled model and the optional parts. The exit code is 1 if a check
    fails.
    """
    with SlowBar("checking"):
        from fledge.diagnostics.diagnosis import diagnose

        _configure_kernels(kernel or [], measure)
        diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis_record(diagnosis)))
    else:
        _print_sections(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _configure_kernels(overrides: list[str], measure: bool) -> None:
    """Apply the options --kernel and --measure."""
    if not overrides and not measure:
        return
    from fledge.kernels import product_kernels
    from fledge.native.library import why_missing

    if reason := why_missing():
        raise UsageError(f"there are no kernels to choose from: {reason}")
    if measure:
        product_kernels.measure_again()
    for text in overrides:
        kind, equals, name = text.partition("=")
        if not equals:
            raise UsageError(f"--kernel needs KIND=NAME, for example bfloat16=avx512, not {text!r:.40}")
        product_kernels.override(kind, name)


def diagnosis_record(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    # JSON has no NaN and no infinity: an error that is not finite becomes null.
    checks = [
        {key: None if value != value or value == float("inf") else value for key, value in asdict(check).items()}
        | {"passed": check.passed}
        for check in diagnosis.checks
    ]
    return {
        "healthy": diagnosis.healthy,
        "machine": diagnosis.machine,
        "threads": diagnosis.threads,
        "kernels": [asdict(choice) for choice in diagnosis.kernels],
        "checks": checks,
        "bundled_model": {
            "path": str(diagnosis.bundled.path),
            "sha256": diagnosis.bundled.sha256,
            "problem": diagnosis.bundled.problem or None,
        },
        "extras": {extra.name: not extra.missing for extra in diagnosis.extras},
    }


def _print_sections(diagnosis: Diagnosis) -> None:
    bundled = diagnosis.bundled
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        ("This installation", list(diagnosis.facts())),
        ("Kernels", [(c.kernel, c.situation, c.backend, c.reason) for c in diagnosis.kernels]),
        (
            "Self-check: largest error of results and of gradients, compared with the reference in float64",
            [(c.kernel, c.backend, c.device, f"{c.error:.1e}", _gradient(c), _verdict(c)) for c in diagnosis.checks],
        ),
        (
            "Bundled model",
            [
                ("file", str(bundled.path)),
                ("sha256", bundled.sha256 or "none"),
                ("state", bundled.problem or "ok"),
            ],
        ),
        (
            "Optional parts",
            [
                (extra.name, "not installed" if extra.missing else "installed", extra.purpose, extra.command)
                for extra in diagnosis.extras
            ],
        ),
    ]
    for title, rows in sections:
        print_heading(title)
        print_rows(rows, indent=2)
        print()
    print("All checks passed." if diagnosis.healthy else "A check failed; see above.")


def _gradient(check: KernelCheck) -> str:
    return f"{check.gradient_error:.1e}" if check.gradient_error else "no gradient"


def _verdict(check: KernelCheck) -> str:
    return "ok" if check.passed else check.problem or "wrong"
