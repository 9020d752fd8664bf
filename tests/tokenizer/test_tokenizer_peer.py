"""The same ids as the tokenizer of the PyPI package `rwkv`, on real text in every language and group of the corpus."""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge.tokenizer import Tokenizer, load_world

pytestmark = pytest.mark.peer

SAMPLE_BYTES = 5_000_000
SHARE = 6_000  # characters of each group


@pytest.fixture(scope="module")
def reference() -> Any:
    """The tokenizer of `rwkv` with its own vocabulary file."""
    module = pytest.importorskip("rwkv.rwkv_tokenizer")
    return module.TRIE_TOKENIZER(str(Path(module.__file__).parent / "rwkv_vocab_v20230424.txt"))


def groups(corpus: Path) -> Iterator[tuple[tuple[str, str, str], str]]:
    """((file, language, source), text) of every document."""
    for path in sorted(corpus.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                yield (path.name, document["lang"], document["src"]), document["text"]


def sample(corpus: Path) -> dict[tuple[str, str, str], str]:
    """Some text of every group; each gets the same share until its documents are used up."""
    share: dict[tuple[str, str, str], int] = defaultdict(int)
    pieces: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for group, text in groups(corpus):
        if share[group] < SHARE:
            pieces[group].append(text[: SHARE - share[group]])
            share[group] += len(pieces[group][-1])
    return {group: "".join(texts) for group, texts in pieces.items()}


def tokenizers() -> list[Tokenizer]:
    """The native one, where it is there, and its Python twin."""
    return [load_world(), load_world("python")]


def test_ids_equal_the_reference_on_the_corpus(shared: Path, reference: Any) -> None:
    corpus = shared / "data" / "corpus"
    if not corpus.is_dir():
        pytest.skip("needs ../shared/data/corpus")
    texts = sample(corpus)
    expected = {group: reference.encode(text) for group, text in texts.items()}
    for world in tokenizers():
        assert [group for group, text in texts.items() if world.encode(text) != expected[group]] == []
    assert sum(len(text.encode()) for text in texts.values()) > SAMPLE_BYTES


def test_every_token_has_the_reference_id(reference: Any) -> None:
    world = load_world()
    assert {token_id: world.decode_bytes([token_id]) for token_id in range(1, 65530)} == reference.idx2token


@pytest.mark.parametrize(
    "text", [" " * 5000, "\n" * 700, "2024 99 100", "<|endoftext|>", "a\r\nb", "é€😀" * 50, "\ufffd" * 9]
)
def test_awkward_texts(reference: Any, text: str) -> None:
    assert [world.encode(text) for world in tokenizers()] == [reference.encode(text)] * 2
