"""`fledge data`: build token stores from raw documents, inspect and check them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.command_line import command_line
from fledge.cli.terminal import SlowBar, print_heading, print_note, print_rows, write

if TYPE_CHECKING:
    from fledge.data.store import TokenStore

app = typer.Typer(name="data", add_completion=False)

MAX_ROWS = 20
"""Number of languages and of sources that `info` lists."""

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or a built-in config: world-v2.")]


@app.callback()
def data() -> None:
    """Build token stores from raw documents, and inspect them."""


@app.command()
def build(
    config: Config,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The folder of the store.")],
    workers: Annotated[int | None, typer.Option(help="Processes. (default: one for each core)")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray Data: on a cluster or locally.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a different store in the folder.")] = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the stage outputs for a later build with other settings.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Write the time per stage, the speed and the peak memory to this JSON file.")
    ] = None,
) -> None:
    """Build a token store: read, clean, deduplicate, mix and tokenize the documents of the config.

    To resume an interrupted build, run the same command again.
    """
    from fledge.data.pipeline.build import BuildOptions, build
    from fledge.data.pipeline.builtin_configs import find_config
    from fledge.data.pipeline.config import read_config
    from fledge.data.pipeline.report import format_size

    path = find_config(config)
    options = BuildOptions(workers, ray, force, keep_work)
    with SlowBar("looking for inputs") as bar:
        clock = _StageClock(bar.step)
        store = build(read_config(path), path.parent, to, options, clock.step)
    seconds = clock.stop()
    size = sum(file["bytes"] for file in store.manifest["inputs"])
    if clock.has_run_stages:
        speed = format_size(size / max(seconds, 1e-3))
        print_note(f"{format_size(size)} of input files in {seconds:,.1f} s: {speed}/s")
    else:
        print_note("the store is already finished; nothing was changed")
    if record is not None:
        clock.write(record, store, workers)
    _show(store, to)


@app.command()
def info(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or a pair X.bin and X.idx.")],
) -> None:
    """Show the contents of a token store. Checks the sizes of its files, but does not read its ids."""
    from fledge.data.store import open_store

    _show(open_store(store), store)


@app.command()
def check(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or a pair X.bin and X.idx.")],
) -> None:
    """Read all files of a store and compare their hashes with the manifest of its build.

    A pair of files of other software has no manifest. Its index is checked, and its largest id is printed.
    """
    from fledge.core.errors import DataError
    from fledge.data.store import find_damaged_files, open_store

    opened = open_store(store)
    with SlowBar("reading") as bar:
        if not opened.manifest:
            rows = [("largest id", f"{opened.max_id:,}")]
        else:
            if changed := list(find_damaged_files(store, bar.update)):
                raise DataError(
                    f"{store}: {', '.join(changed)} changed since the build; delete {store} and build it again"
                )
            rows = [(name, "ok") for name in opened.manifest["outputs"]]
    print_rows(rows)


@app.command()
def steps() -> None:
    """List the cleaning steps that a config can use."""
    from fledge.data.pipeline.clean import FILTERS, TRANSFORMATIONS

    print_rows([(name, inspect.getdoc(run) or "") for name, run in TRANSFORMATIONS.items()])
    print_rows([(f"{{{name} = ...}}", inspect.getdoc(run) or "") for name, run in FILTERS.items()])


@app.command()
def recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="world-v2")]) -> None:
    """Print a built-in config, as a starting point for your own."""
    from fledge.data.pipeline.builtin_configs import find_config

    write(find_config(name).read_text(encoding="utf-8"))


class _StageClock:
    """Measures the time of each stage from its progress reports."""

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self._report = report
        self._start = self._stage_start = time.monotonic()
        self._stage = "looking for inputs"
        self.seconds: dict[str, float] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        """Forward a progress report."""
        if stage != self._stage:
            self._enter_stage(stage)
        self._report(stage, done, total)

    def _enter_stage(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._stage_start
        self._stage, self._stage_start = stage, now

    def stop(self) -> float:
        """End the last stage and return the total time in seconds."""
        self._enter_stage("")
        return self._stage_start - self._start

    @property
    def has_run_stages(self) -> bool:
        """Whether any stage was run. A finished store needs none."""
        return len(self.seconds) > 1

    def write(self, path: Path, store: TokenStore, workers: int | None) -> None:
        """Write the measurements to a JSON file."""
        usage = _measure_resources()  # before the code below uses resources of its own
        from fledge.core.files import write_json
        from fledge.core.machine import machine_facts

        size = sum(file["bytes"] for file in store.manifest["inputs"])
        seconds = self._stage_start - self._start
        record = {
            "benchmark": "data build",
            "command": command_line(),
            "machine": machine_facts(),
            "workers": workers,
            "input_bytes": size,
            "tokens": store.manifest["tokens"],
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "seconds_in_all": round(seconds, 3),
            "bytes_per_s": round(size / max(seconds, 1e-3)),
            **usage,
        }
        write_json(path, record)


def _measure_resources() -> dict[str, Any]:
    """Processor time and largest memory of a process, including workers. Empty if the system does not report them."""
    try:
        import resource
    except ImportError:
        return {}
    from fledge.core.machine import MAXRSS_UNIT

    scopes = {"main": resource.RUSAGE_SELF, "largest worker": resource.RUSAGE_CHILDREN}
    usages = {name: resource.getrusage(scope) for name, scope in scopes.items()}
    return {
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages.values()), 2),
        "peak_bytes": {name: usage.ru_maxrss * MAXRSS_UNIT for name, usage in usages.items()},
    }


def _show(store: TokenStore, path: Path) -> None:
    """Print the facts and the counts of a store."""
    from fledge.data.store import PARTS

    indexes = {part: store.index(part) for part in PARTS if part == "train" or store.has_part(part)}
    size = f"{store.vocab_size:,}"
    vocabulary = f"vocabulary of {size}" if store.has_vocabulary else f"no vocabulary recorded, World ({size}) assumed"
    facts = [
        ("store", str(path)),
        *((part, f"{len(index.tokens):,} tokens, {len(index):,} documents") for part, index in indexes.items()),
        ("ids", f"{indexes['train'].dtype.name}, {vocabulary}"),
    ]
    if store.manifest:
        facts += [("sha256", store.sha256), ("report", str(path / "report.html"))]
        facts += [("note", line) for line in store.manifest.get("remarks", ())]
    else:
        facts[1] = ("contents", facts[1][1])  # a pair of files can be any part of a store
    print_rows(facts)
    if not store.manifest:
        return
    from fledge.data.pipeline.counts import Count
    from fledge.data.pipeline.store_assembly import read_counts

    counts = read_counts(store.manifest)
    for column in ("language", "source"):
        stored = counts.group_by(column).get("stored", {})
        names = sorted(stored, key=lambda name: -stored[name].bytes)
        print_heading(f"\nby {column}")
        rows = [_format_row(name or "(none)", stored[name]) for name in names[:MAX_ROWS]]
        if names[MAX_ROWS:]:
            rest = Count()
            for name in names[MAX_ROWS:]:
                rest = rest.plus(stored[name])
            rows.append(_format_row(f"{len(names) - MAX_ROWS} more", rest))
        print_rows(rows, (column, "documents", "bytes", "tokens"))


def _format_row(name: str, count: tuple[int, int, int]) -> tuple[str, str, str, str]:
    documents, size, tokens = count
    return name, f"{documents:,}", f"{size:,}", f"{tokens:,}"
