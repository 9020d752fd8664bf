"""The HTML report of a build: the manifest as tables and bars, in one self-contained file without scripts."""

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
MAX_ROWS = 40  # rows of a table; the others are only counted

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

KEPT_COLOR, READ_COLOR, DROPPED_COLOR = "var(--bar)", "var(--bar2)", "var(--gone)"


def write_report(to: Path, manifest: dict[str, Any]) -> None:
    """Write the report into the store's folder."""
    with atomic_path(to / REPORT) as temporary:
        temporary.write_text("\n".join(_render_page(manifest, read_counts(manifest))) + "\n", encoding="utf-8")


def _render_page(manifest: dict[str, Any], counts: Counts) -> Iterator[str]:
    totals = counts.totals()
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>Token store</title><style>{STYLE}</style></head><body><h1>Token store</h1>"
    stored, held_out = totals.get("stored", Count()), totals.get("validation", Count())
    yield _render_facts(
        ("training tokens", f"{manifest['tokens']['train']:,}"),
        ("training text", format_size(stored.bytes)),
        ("training documents", f"{manifest['documents']['train']:,}"),
        ("bytes per token", f"{stored.bytes / max(stored.tokens - stored.documents, 1):.2f}"),
        ("validation tokens", f"{manifest['tokens']['validation']:,}"),
        ("validation documents", f"{held_out.documents:,}"),
        ("vocabulary", f"{manifest['vocab_size']:,}"),
    )
    yield f"<p>Content hash {manifest['sha256']}, seed {manifest['seed']}, ids as {manifest['dtype']}.</p>"
    for line in manifest.get("remarks", ()):
        yield f"<p><strong>Note:</strong> {escape(line)}</p>"
    yield "<h2>Documents by stage</h2>"
    yield _render_table(("stage", "", "text", "documents", "share of read text"), _build_stage_rows(totals))
    for title, column in (("Languages", "language"), ("Sources", "source")):
        yield f"<h2>{title}</h2><p>Pale bar: text read. Strong bar: text stored, including repeats.</p>"
        heads = (column, "", "stored", "share", "tokens", "bytes per token", "documents", "read", "validation")
        yield _render_table(heads, _build_breakdown_rows(counts.group_by(column), stored))
    yield "<h2>Inputs</h2>"
    inputs = [
        [escape(file["name"]), format_size(file["bytes"]), _render_code((file["sha256"] or "")[:16])]
        for file in manifest["inputs"]
    ]
    yield _render_table(("file", "size", "SHA-256 (first 16 digits)"), _limit_rows(inputs))
    yield f"<h2>Config</h2><pre>{escape(json.dumps(manifest['config'], indent=1, ensure_ascii=False))}</pre>"
    yield f"<p>{escape(', '.join(f'{name} {number}' for name, number in manifest['versions'].items()))}</p>"
    yield "</body></html>"


def format_size(number: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _build_stage_rows(totals: dict[str, Count]) -> Iterator[Sequence[str]]:
    """One row for each stage and for each reason to drop documents."""
    read = totals.get("read", Count())
    names = [
        ("read", "read", READ_COLOR),
        *((name, name, DROPPED_COLOR) for name in totals if name.startswith("dropped: ")),
        ("after cleaning", "clean", READ_COLOR),
        ("exact duplicates", "copies", DROPPED_COLOR),
        ("near duplicates", "near copies", DROPPED_COLOR),
        ("in no group of the mixture", "no group", DROPPED_COLOR),
        ("not used by the mixture", "left out", DROPPED_COLOR),
        ("held out for validation", "validation", READ_COLOR),
        ("chosen for training", "train", KEPT_COLOR),
        ("stored, including repeats and parts of documents", "stored", KEPT_COLOR),
    ]
    for label, stage, color in names:
        count = totals.get(stage, Count())
        if count.documents or stage in ("read", "clean", "train"):
            share = count.bytes / max(read.bytes, 1)
            bar = _render_bar((share, color))
            yield escape(label), bar, format_size(count.bytes), f"{count.documents:,}", f"{share:.1%}"
    if bad := totals.get("bad"):
        yield "invalid lines", "", "", f"{bad.documents:,}", ""


def _build_breakdown_rows(counts: dict[str, dict[str, Count]], total: Count) -> list[Sequence[str]]:
    """One row for each language or source, the largest first."""
    read, stored, held_out = (counts.get(stage, {}) for stage in ("read", "stored", "validation"))
    names = sorted(read, key=lambda name: (-stored.get(name, Count()).bytes, -read[name].bytes, name))
    largest = max([count.bytes for stage in (read, stored) for count in stage.values()] or [1])
    rows = []
    for name in names:
        kept, seen = stored.get(name, Count()), read[name]
        bars = _render_bar((seen.bytes / largest, READ_COLOR), (kept.bytes / largest, KEPT_COLOR))
        per_token = f"{kept.bytes / max(kept.tokens - kept.documents, 1):.2f}" if kept.tokens else ""
        sizes = (format_size(kept.bytes), f"{kept.bytes / max(total.bytes, 1):.1%}", f"{kept.tokens:,}", per_token)
        documents = (f"{kept.documents:,}", format_size(seen.bytes), f"{held_out.get(name, Count()).documents:,}")
        rows.append((escape(name) or "(none)", bars, *sizes, *documents))
    return _limit_rows(rows)


def _limit_rows(rows: list[Any]) -> list[Any]:
    """At most MAX_ROWS rows, followed by the number of the others."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [*rows[:MAX_ROWS], (f"and {len(rows) - MAX_ROWS} more, in manifest.json", *[""] * (len(rows[0]) - 1))]


def _render_facts(*facts: tuple[str, str]) -> str:
    inner = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
    return f"<div class='facts'>{inner}</div>"


def _render_bar(*parts: tuple[float, str]) -> str:
    """Overlapping bars. parts: (share of the width, color) of each."""
    inner = "".join(f"<i style='width:{min(share, 1):.2%};background:{color}'></i>" for share, color in parts)
    return f"<div class='track'>{inner}</div>"


def _render_code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _render_table(heads: Sequence[str], rows: Any) -> str:
    """heads: the column titles; a column without a title contains bars."""
    classes = ["" if head else "class='bar'" for head in heads]
    head = "".join(f"<th {kind}>{escape(text)}</th>" for kind, text in zip(classes, heads, strict=True))
    cells = ["".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
