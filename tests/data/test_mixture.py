"""Documents in, a fixed and capped selection out."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from fledge.core.errors import UsageError
from fledge.data.documents import Document, base_language, read_jsonl
from fledge.data.mixture import Mixture, select


def documents(count: int, language: str, source: str = "s", size: int = 100) -> list[Document]:
    return [Document(f"{source} {language} {n} ".ljust(size, "x"), language, source) for n in range(count)]


def test_caps_hold_by_language_and_source() -> None:
    corpus = documents(200, "en", "a") + documents(200, "en", "b") + documents(200, "de") + documents(5, "xx")
    mixture = Mixture({"en": 10_000, "de": 3_000}, {"a": 2_000})
    train = select(corpus, mixture).train
    size = {key: sum(len(d.text) for d in train if key in (d.language, d.source)) for key in ("en", "de", "a", "xx")}
    assert 10_000 <= size["en"] <= 10_100
    assert 3_000 <= size["de"] <= 3_100
    assert 2_000 <= size["a"] <= 2_100
    assert size["xx"] == 0


def test_validation_is_never_trained_on_and_does_not_depend_on_order() -> None:
    corpus = documents(300, "en") + documents(50, "de")
    mixture = Mixture({"en": 10**6, "de": 10**6}, validation_share=0.1)
    chosen, reversed_ = select(corpus, mixture), select(corpus[::-1], mixture)
    assert chosen == reversed_
    assert len([d for d in chosen.validation if d.language == "en"]) == 30
    assert len([d for d in chosen.validation if d.language == "de"]) == 5
    assert not {d.text for d in chosen.validation} & {d.text for d in chosen.train}
    assert len(chosen.train) + len(chosen.validation) == 350


def test_the_rest_of_a_long_validation_document_is_not_used() -> None:
    corpus = [Document(letter * 1000, "en", "book") for letter in "abcdef"]
    mixture = Mixture({"en": 10**6}, validation_bytes=2_000)
    chosen = select(corpus, mixture)
    assert {len(d.text) for d in chosen.validation} == {500}
    assert not {d.text[0] for d in chosen.validation} & {d.text[0] for d in chosen.train}


@pytest.mark.parametrize(("suffix", "opener"), [(".jsonl", open), (".jsonl.xz", lzma.open), (".jsonl.gz", gzip.open)])
def test_read_jsonl(tmp_path: Path, suffix: str, opener: object) -> None:
    path = tmp_path / f"x{suffix}"
    rows = [{"text": "olá", "lang": "pt-BR", "src": "q"}, {"text": "b"}]
    with opener(path, "wt", encoding="utf-8") as file:  # type: ignore[operator]
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = list(read_jsonl(path))
    assert found[0] == Document("olá", "pt", "q")
    assert found[1].language == ""


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(UsageError, match=r"x\.jsonl, line 2"):
        list(read_jsonl(path))
    with pytest.raises(UsageError, match=r"'\.zip'"):
        list(read_jsonl(tmp_path / "x.zip"))


@pytest.mark.parametrize("line", ['{"text": 5}', '{"text": "a", "lang": 7}', '{"text": "\\ud800"}', "[]", "nonsense"])
def test_what_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UsageError, match="line 2: not a JSON object with a text"):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UsageError, match=r"x\.jsonl\.gz: cannot be read beyond line 0"):
        list(read_jsonl(tmp_path / "x.jsonl.gz"))


def test_a_text_that_comes_twice_is_never_on_both_sides() -> None:
    corpus = documents(250, "en") * 2
    chosen = select(corpus, Mixture({"en": 10**6}, validation_share=0.1))
    assert len(chosen.train) + len(chosen.validation) == 250
    assert not {d.text for d in chosen.validation} & {d.text for d in chosen.train}


def test_base_language() -> None:
    found = [base_language(code) for code in ("pt_BR", "zh-TW", "en", "code:python", "de-DE")]
    assert found == ["pt", "zh", "en", "code:python", "de"]
