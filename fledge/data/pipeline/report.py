"""The page that shows what a build did: one self-contained HTML file, for light and dark screens, without scripts.

Here: a manifest as tables and bars. Not here: any number that the manifest does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fledge.core.files import atomic_path
from fledge.data.pipeline.counts import Count, Counts
from fledge.data.pipeline.store_assembly import read_counts

REPORT = "report.html"
LARGEST = 40  # rows of a table; the rest is summed up

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #e3e6ec; --back: #fff; --bar: #3b7dd8;
  --bar2: #9dbfeb; --gone: #d98a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3340; --back: #14181f;
  --bar: #5b9bf0; --bar2: #33547f; --gone: #c27a3e; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p { color: var(--soft); overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 0.8rem; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 0.9rem; min-width: 8rem; }
.facts b { display: block; font-size: 1.25rem; } .facts span { color: var(--soft); font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.bar, th.bar { text-align: left; }
td:first-child { max-width: 22rem; overflow: hidden; text-overflow: ellipsis; }
td.bar { width: 24%; min-width: 7rem; }
.track { position: relative; height: 0.9rem; border-radius: 3px; background: transparent; }
.track i { position: absolute; left: 0; top: 0; bottom: 0; border-radius: 3px; min-width: 1px; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem; font-size: 0.85rem; }
"""

KEPT, READ, GONE = "var(--bar)", "var(--bar2)", "var(--gone)"


def write_report(to: Path, manifest: dict[str, Any]) -> None:
    """Write the page into the store's folder."""
    with atomic_path(to / REPORT) as temporary:
        temporary.write_text("\n".join(_page(manifest, read_counts(manifest))) + "\n", encoding="utf-8")


def _page(manifest: dict[str, Any], counts: Counts) -> Iterator[str]:
    totals = counts.totals()
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>Token store</title><style>{STYLE}</style></head><body><h1>Token store</h1>"
    stored, aside = totals.get("stored", Count()), totals.get("validation", Count())
    yield _facts(
        ("training tokens", f"{manifest['tokens']['train']:,}"),
        ("training text", format_size(stored.bytes)),
        ("training documents", f"{manifest['documents']['train']:,}"),
        ("bytes a token", f"{stored.bytes / max(stored.tokens - stored.documents, 1):.2f}"),
        ("validation tokens", f"{manifest['tokens']['validation']:,}"),
        ("validation documents", f"{aside.documents:,}"),
        ("vocabulary", f"{manifest['vocab_size']:,}"),
    )
    yield f"<p>Identity {manifest['sha256']}, seed {manifest['seed']}, ids as {manifest['dtype']}.</p>"
    for line in manifest.get("remarks", ()):
        yield f"<p><strong>Note:</strong> {escape(line)}</p>"
    yield "<h2>From what was read to what is stored</h2>"
    yield _table(("stage", "", "text", "documents", "of what was read"), _flow(totals))
    for title, column in (("Languages", "language"), ("Sources", "source")):
        yield f"<h2>{title}</h2><p>The pale bar is what was read, the strong one what is stored, repeats included.</p>"
        heads = (column, "", "stored", "share", "tokens", "bytes a token", "documents", "read", "validation")
        yield _table(heads, _parts(counts.group_by(column), stored))
    yield "<h2>Inputs</h2>"
    inputs = [
        [escape(one["name"]), format_size(one["bytes"]), _mono((one["sha256"] or "")[:16])]
        for one in manifest["inputs"]
    ]
    yield _table(("file", "size", "SHA-256 begins"), _capped(inputs))
    yield f"<h2>Config</h2><pre>{escape(json.dumps(manifest['config'], indent=1, ensure_ascii=False))}</pre>"
    yield f"<p>{escape(', '.join(f'{name} {number}' for name, number in manifest['versions'].items()))}</p>"
    yield "</body></html>"


def format_size(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _flow(totals: dict[str, Count]) -> Iterator[Sequence[str]]:
    """One row for each stage and for each reason to leave something out."""
    read = totals.get("read", Count())
    names = [
        ("read", "read", READ),
        *((name, name, GONE) for name in totals if name.startswith("dropped: ")),
        ("after cleaning", "clean", READ),
        ("copies", "copies", GONE),
        ("near copies", "near copies", GONE),
        ("in no group of the mixture", "no group", GONE),
        ("left out by the mixture", "left out", GONE),
        ("kept aside for validation", "validation", READ),
        ("chosen for training", "train", KEPT),
        ("stored, repeats and parts of documents counted", "stored", KEPT),
    ]
    for label, stage, color in names:
        count = totals.get(stage, Count())
        if count.documents or stage in ("read", "clean", "train"):
            share = count.bytes / max(read.bytes, 1)
            yield escape(label), _bar((share, color)), format_size(count.bytes), f"{count.documents:,}", f"{share:.1%}"
    if bad := totals.get("bad"):
        yield "lines that are no document", "", "", f"{bad.documents:,}", ""


def _parts(by: dict[str, dict[str, Count]], whole: Count) -> list[Sequence[str]]:
    """One row for each language or source, the largest first."""
    read, stored, aside = by.get("read", {}), by.get("stored", {}), by.get("validation", {})
    names = sorted(read, key=lambda name: (-stored.get(name, Count()).bytes, -read[name].bytes, name))
    largest = max([count.bytes for part in (read, stored) for count in part.values()] or [1])
    rows = []
    for name in names:
        mine, given = stored.get(name, Count()), read[name]
        bars = _bar((given.bytes / largest, READ), (mine.bytes / largest, KEPT))
        per_token = f"{mine.bytes / max(mine.tokens - mine.documents, 1):.2f}" if mine.tokens else ""
        numbers = (format_size(mine.bytes), f"{mine.bytes / max(whole.bytes, 1):.1%}", f"{mine.tokens:,}", per_token)
        more = (f"{mine.documents:,}", format_size(given.bytes), f"{aside.get(name, Count()).documents:,}")
        rows.append((escape(name) or "(none)", bars, *numbers, *more))
    return _capped(rows)


def _capped(rows: list[Any]) -> list[Any]:
    """At most LARGEST rows, and how many more there are."""
    if len(rows) <= LARGEST:
        return rows
    return [*rows[:LARGEST], (f"and {len(rows) - LARGEST} more, in manifest.json", *[""] * (len(rows[0]) - 1))]


def _facts(*facts: tuple[str, str]) -> str:
    inner = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
    return f"<div class='facts'>{inner}</div>"


def _bar(*parts: tuple[float, str]) -> str:
    """Bars over each other, each a share of the width and its color."""
    inner = "".join(f"<i style='width:{min(share, 1):.2%};background:{color}'></i>" for share, color in parts)
    return f"<div class='track'>{inner}</div>"


def _mono(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(heads: Sequence[str], rows: Any) -> str:
    """heads: an empty one stands over bars."""
    bars = {at for at, head in enumerate(heads) if not head}
    marks = ["class='bar'" if at in bars else "" for at in range(len(heads))]
    head = "".join(f"<th {mark}>{escape(text)}</th>" for mark, text in zip(marks, heads, strict=True))
    cells = ["".join(f"<td {mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
