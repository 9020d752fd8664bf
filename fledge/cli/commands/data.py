"""`fledge data`: raw documents into token stores, and what a store holds."""

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

LARGEST = 20
"""Languages and sources that `info` lists."""

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a packaged one: world-v2.")]


@app.callback()
def data() -> None:
    """Build token stores from raw documents, and look into them."""


@app.command()
def build(
    config: Config,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where the store is made.")],
    workers: Annotated[int | None, typer.Option(help="Processes. (default: one for each core)")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray Data: a cluster, or a local one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another store in the folder.")] = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep what the stages left, for a build with other settings.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Write seconds by stage, speed and peak memory to this JSON file.")
    ] = None,
) -> None:
    """Make a token store: read, clean, deduplicate, mix and tokenize the documents of the config.

    A build that was interrupted continues where it was: run the same command again.
    """
    from fledge.data.pipeline.build import BuildOptions, build
    from fledge.data.pipeline.builtin_configs import config_path
    from fledge.data.pipeline.config import read_config
    from fledge.data.pipeline.report import size

    path = config_path(config)
    options = BuildOptions(workers, ray, force, keep_work)
    with SlowBar("looking for inputs") as bar:
        clock = _Clock(bar.step)
        store = build(read_config(path), path.parent, to, options, clock.step)
    seconds = clock.stop()
    read = sum(one["bytes"] for one in store.manifest["inputs"])
    if clock.worked:
        print_note(f"{size(read)} of input files in {seconds:,.1f} s: {size(read / max(seconds, 1e-3))}/s")
    else:
        print_note("the store was finished before, and is as it was")
    if record is not None:
        clock.write(record, store, workers)
    _show(store, to)


@app.command()
def info(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or a pair X.bin and X.idx.")],
) -> None:
    """Say what a token store holds. Its files are checked, its ids are not read."""
    from fledge.data.store import open_store

    _show(open_store(store), store)


@app.command()
def check(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder, or a pair X.bin and X.idx.")],
) -> None:
    """Read a whole store and compare it with the hashes that its build wrote down.

    Of a pair from elsewhere, which has none, the index is checked and the largest id is printed.
    """
    from fledge.core.errors import DataError
    from fledge.data.store import damaged, open_store

    opened = open_store(store)
    with SlowBar("reading") as bar:
        if not opened.manifest:
            rows = [("largest id", f"{opened.largest:,}")]
        else:
            if wrong := list(damaged(store, bar.update)):
                raise DataError(f"{store}: {', '.join(wrong)} changed since the build; delete {store}, build it again")
            rows = [(name, "ok") for name in opened.manifest["outputs"]]
    print_rows(rows)


@app.command()
def steps() -> None:
    """List the cleaning steps that a config can name."""
    from fledge.data.pipeline.clean import FILTERS, TRANSFORMATIONS

    print_rows([(name, inspect.getdoc(run) or "") for name, run in TRANSFORMATIONS.items()])
    print_rows([(f"{{{name} = ...}}", inspect.getdoc(run) or "") for name, run in FILTERS.items()])


@app.command()
def recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="world-v2")]) -> None:
    """Print a packaged config, to start one of your own from."""
    from fledge.data.pipeline.builtin_configs import config_path

    write(config_path(name).read_text(encoding="utf-8"))


class _Clock:
    """How long each stage takes, heard from its reports of progress."""

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self._report = report
        self._began = self._changed = time.monotonic()
        self._stage = "looking for inputs"
        self.seconds: dict[str, float] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        """Hand a report on."""
        if stage != self._stage:
            self._enter(stage)
        self._report(stage, done, total)

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._changed
        self._stage, self._changed = stage, now

    def stop(self) -> float:
        """The seconds of all stages together."""
        self._enter("")
        return self._changed - self._began

    @property
    def worked(self) -> bool:
        """Whether any stage began: nothing is done for a finished store."""
        return len(self.seconds) > 1

    def write(self, path: Path, store: TokenStore, workers: int | None) -> None:
        """Everything, as JSON."""
        used = _resources()  # before what follows needs some of its own
        from fledge.core.files import write_json
        from fledge.core.machine import machine_facts

        size = sum(one["bytes"] for one in store.manifest["inputs"])
        seconds = self._changed - self._began
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
            **used,
        }
        write_json(path, record)


def _resources() -> dict[str, Any]:
    """Seconds on processors and the largest memory of a process, workers included; empty where nobody tells."""
    try:
        import resource
    except ImportError:
        return {}
    from fledge.core.machine import MAXRSS_UNIT

    whose = {"main": resource.RUSAGE_SELF, "largest worker": resource.RUSAGE_CHILDREN}
    found = {name: resource.getrusage(who) for name, who in whose.items()}
    return {
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in found.values()), 2),
        "peak_bytes": {name: one.ru_maxrss * MAXRSS_UNIT for name, one in found.items()},
    }


def _show(store: TokenStore, place: Path) -> None:
    """What there is to know, as rows."""
    from fledge.data.store import PARTS

    index = {part: store.index(part) for part in PARTS if part == "train" or store.has(part)}
    size = f"{store.vocab_size:,}"
    vocabulary = f"vocabulary of {size}" if store.recorded else f"no vocabulary recorded, World's {size} taken for it"
    facts = [
        ("store", str(place)),
        *((part, f"{len(one.tokens):,} tokens, {len(one):,} documents") for part, one in index.items()),
        ("ids", f"{index['train'].dtype.name}, {vocabulary}"),
    ]
    if store.manifest:
        facts += [("sha256", store.sha256), ("report", str(place / "report.html"))]
        facts += [("note", line) for line in store.manifest.get("remarks", ())]
    else:
        facts[1] = ("holds", facts[1][1])  # any part of a store, or somebody else's
    print_rows(facts)
    if not store.manifest:
        return
    from fledge.data.pipeline.counts import Count
    from fledge.data.pipeline.store_assembly import counts_of

    counts = counts_of(store.manifest)
    for column in ("language", "source"):
        stored = counts.by(column).get("stored", {})
        names = sorted(stored, key=lambda name: -stored[name].bytes)
        print_heading(f"\nby {column}")
        rows = [_row(name or "(none)", stored[name]) for name in names[:LARGEST]]
        if names[LARGEST:]:
            rest = Count()
            for name in names[LARGEST:]:
                rest = rest.plus(stored[name])
            rows.append(_row(f"{len(names) - LARGEST} more", rest))
        print_rows(rows, (column, "documents", "bytes", "tokens"))


def _row(name: str, count: tuple[int, int, int]) -> tuple[str, str, str, str]:
    documents, size, tokens = count
    return name, f"{documents:,}", f"{size:,}", f"{tokens:,}"
