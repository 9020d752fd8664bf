"""Signatures: what counts as the same text, and how well they estimate what two texts share."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from corpora import make_near_duplicate, make_text, make_words

from fledge.core.errors import UsageError
from fledge.data.pipeline.config import DedupConfig
from fledge.data.pipeline.dedup.minhash import (
    SAMPLED,
    MinHasher,
    exact_hash,
    mixed,
    normalized,
    rows_per_band,
    sampled_pieces,
    similarity,
)


def test_case_and_space_do_not_count() -> None:
    assert normalized("  Hello,\n\tWORLD ") == "hello,world"
    assert normalized("a\u00a0b\u3000c d") == "a\u00a0b\u3000cd"
    assert exact_hash("a") == exact_hash("a") != exact_hash("b")
    assert all(0 <= number < 1 << 64 for number in exact_hash("a"))


@pytest.mark.parametrize("width", [2, 3, 5, 8, 16, 21])
def test_pieces_depend_on_themselves_alone(width: int) -> None:
    """Every text gives the hashes of its own pieces, whatever texts are around it, a quarter of them."""
    texts = ["", "ab", make_text(1), "x" * (width - 1), make_text(2) + "漢字\U0001f600", "y" * width]
    together, ends = sampled_pieces(texts, width)
    start = 0
    for one, end in zip(texts, ends.tolist(), strict=True):
        alone, _ = sampled_pieces([one], width)
        assert together[start:end].tolist() == alone.tolist()
        start = end
    long = make_text(3, 3000)
    pieces = {long[at : at + width] for at in range(len(long) - width + 1)}
    found = set(sampled_pieces([long], width)[0].tolist())
    assert abs(len(found) - len(pieces) / SAMPLED) < 5 * (len(pieces) / SAMPLED) ** 0.5
    assert set(sampled_pieces([long[100:]], width)[0].tolist()) <= found


def test_mixing_is_one_to_one_and_depends_on_the_salt() -> None:
    values = np.arange(1000, dtype=np.uint64)
    assert len(set(mixed(values, 0).tolist())) == 1000
    assert not np.array_equal(mixed(values, 0), mixed(values, 1))
    assert abs((mixed(values, 0) >> np.uint64(63)).mean() - 0.5) < 0.1


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(DedupConfig(threshold=threshold))
    bands = 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.9
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.9


def shared(one: str, other: str, width: int) -> float:
    """The true share of pieces in common."""
    first, second = ({text[at : at + width] for at in range(len(text) - width + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


def test_estimates_are_near_the_truth() -> None:
    pytest.importorskip("rensa")
    signer = MinHasher(DedupConfig())
    rng = random.Random(5)
    errors = []
    for number in range(60):
        original = " ".join(make_words(rng, 600))
        copy = make_near_duplicate(original, number, changes=rng.randint(1, 60))
        signatures, long = signer.signatures([original, copy, "short"])
        assert long.tolist() == [True, True, False]
        errors.append(float(similarity(signatures[:1], signatures[1:2])[0]) - shared(original, copy, 16))
    # 128 permutations: a standard error of 0.044 at most, and the mean of sixty within a third of that.
    assert np.std(errors) < 0.06 and abs(np.mean(errors)) < 0.02


def test_similar_texts_share_a_band_and_others_do_not() -> None:
    pytest.importorskip("rensa")
    signer = MinHasher(DedupConfig())
    originals = [make_text(number, 400) for number in range(30)]
    copies = [make_near_duplicate(one, number, changes=3) for number, one in enumerate(originals)]
    hashes = signer.band_hashes(signer.signatures([*originals, *copies])[0])
    assert hashes.shape == (60, signer.bands)
    assert all(set(hashes[at]) & set(hashes[30 + at]) for at in range(30))
    assert len(np.unique(hashes[:30])) == 30 * signer.bands


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UsageError, match=r'rensa: pip install "fledge\[data\]"'):
        MinHasher(DedupConfig())
