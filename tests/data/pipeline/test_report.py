"""The HTML report: well-formed, self-contained, and with the numbers of the manifest."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from corpora import make_config, make_corpus, write_jsonl

from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.counts import Count, Counts
from fledge.data.pipeline.report import MAX_ROWS, format_size, write_report


class PageParser(HTMLParser):
    """Collects the open elements and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_of_a_build_has_its_numbers(tmp_path: Path) -> None:
    rows = [{**row, "src": "<b>&'" if row["src"] == "a" else row["src"]} for row in make_corpus()]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    store = build(make_config(dedup={"near": False}), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    source = (tmp_path / "store" / "report.html").read_text(encoding="utf-8")
    page = PageParser()
    page.feed(source.removeprefix("<!doctype html>"))
    assert page.open == []
    assert "<b>&'" in page.words and "code:python" in page.words
    assert f"{len(store.tokens('train')):,}" in page.words
    assert not re.search(r"https?://|<script|<link|url\(", source)
    assert "prefers-color-scheme: dark" in source


def test_long_tables_are_shortened(tmp_path: Path) -> None:
    counts = Counts()
    for number in range(MAX_ROWS + 7):
        counts.add("read", f"x{number}", "s", Count(1, 10 + number))
    manifest = {
        "tokens": {"train": 1, "validation": 0},
        "documents": {"train": 1},
        "vocab_size": 9,
        "sha256": "0",
        "seed": 1,
        "dtype": "uint16",
        "inputs": [],
        "config": {},
        "versions": {},
        "counts": {"rows": counts.rows()},
    }
    write_report(tmp_path, manifest)
    assert "and 7 more, in manifest.json" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (5e15, "5,000.0 TB")]
)
def test_sizes_have_decimal_units(number: float, text: str) -> None:
    assert format_size(number) == text
