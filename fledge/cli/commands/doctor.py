"""`fledge doctor`: what is installed, what runs where and why, and whether it computes right. Exit code 1 if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.terminal import SlowBar, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.diagnosis import Diagnosis
    from fledge.bench.selfcheck import Check

app = typer.Typer(name="doctor", add_completion=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this installation, and that it computes right.

    Shows versions, kernels with a self-check, the bundled model and optional parts. The exit code is 1 if anything is
    wrong.
    """
    with SlowBar("checking"):
        from fledge.bench.diagnosis import diagnose

        found = diagnose()
    if as_json:
        print(json.dumps(record(found)))
    else:
        _show(found)
    if not found.healthy:
        raise typer.Exit(1)


def record(found: Diagnosis) -> dict[str, Any]:
    """What `--json` prints."""
    # JSON has no nan and no infinity: an error that is not finite becomes null.
    checks = [
        {key: None if value != value or value == float("inf") else value for key, value in asdict(check).items()}
        | {"passed": check.passed}
        for check in found.checks
    ]
    return {
        "healthy": found.healthy,
        "machine": found.machine,
        "threads": found.threads,
        "kernels": [asdict(choice) for choice in found.kernels],
        "checks": checks,
        "bundled_model": {
            "path": str(found.bundled.path),
            "sha256": found.bundled.sha256,
            "problem": found.bundled.problem or None,
        },
        "extras": {extra.name: not extra.missing for extra in found.extras},
    }


def _show(found: Diagnosis) -> None:
    bundled = found.bundled
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        ("This installation", list(found.facts())),
        ("Kernels", [(c.kernel, c.situation, c.backend, c.reason) for c in found.kernels]),
        (
            "Self-check: largest error of results and of gradients, against the reference in float64",
            [(c.kernel, c.backend, c.device, f"{c.error:.1e}", _gradient(c), _verdict(c)) for c in found.checks],
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
                (extra.name, "not installed" if extra.missing else "installed", extra.brings, extra.command)
                for extra in found.extras
            ],
        ),
    ]
    for title, rows in sections:
        print_heading(title)
        print_rows(rows, indent=2)
        print()
    print("All is well." if found.healthy else "Something is wrong; see above.")


def _gradient(check: Check) -> str:
    return f"{check.gradient_error:.1e}" if check.gradient_error else "no gradient"


def _verdict(check: Check) -> str:
    return "ok" if check.passed else check.problem or "wrong"
