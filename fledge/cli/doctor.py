"""`fledge doctor`: what is installed, what runs where and why, and whether it computes right. Exit code 1 if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.terminal import SlowBar, results

if TYPE_CHECKING:
    from rich.console import Console

    from fledge.bench.diagnosis import Diagnosis

app = typer.Typer(rich_markup_mode=None)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this installation: versions, kernels with a self-check, the bundled model, optional parts."""
    with SlowBar("checking"):
        from fledge.bench.diagnosis import diagnose

        found = diagnose()
    if as_json:
        print(json.dumps(record(found)))
    else:
        _show(found, results())
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


def _show(found: Diagnosis, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    def section(title: str, rows: list[tuple[str, ...]]) -> None:
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    section("This installation", [(label, escape(text)) for label, text in found.facts()])
    section("Kernels", [(c.kernel, c.situation, c.backend, escape(c.reason)) for c in found.kernels])
    section(
        "Self-check: largest error against the reference in float64, of results and of gradients",
        [
            (
                *(check.kernel, check.backend, check.device, f"{check.error:.1e}", f"{check.gradient_error:.1e}"),
                "[green]ok[/green]" if check.passed else f"[red]wrong {escape(check.problem)}[/red]",
            )
            for check in found.checks
        ],
    )
    bundled = found.bundled
    state = f"[red]{escape(bundled.problem)}[/red]" if bundled.problem else "[green]ok[/green]"
    section("Bundled model", [("file", escape(str(bundled.path))), ("sha256", bundled.sha256 or "-"), ("state", state)])
    section(
        "Optional parts",
        [
            (
                extra.name,
                "[green]installed[/green]" if not extra.missing else f'pip install "fledge\\[{extra.name}]"',
                escape(extra.brings),
            )
            for extra in found.extras
        ],
    )
    console.print("[green]All is well.[/green]" if found.healthy else "[red]Something is wrong; see above.[/red]")
