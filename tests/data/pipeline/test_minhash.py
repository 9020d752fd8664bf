"""Hashes and signatures: normalization, shingles, bands, and the accuracy of the estimated similarity."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from corpora import make_near_duplicate, make_text, make_words

from fledge.core.errors import UsageError
from fledge.data.pipeline.config import DedupConfig
from fledge.data.pipeline.dedup.minhash import (
    SAMPLE_EVERY,
    MinHasher,
    choose_rows_per_band,
    estimate_similarity,
    hash_exact,
    hash_shingles,
    mix_hashes,
    normalize_text,
)


def test_hashes_ignore_case_and_ascii_space() -> None:
    assert normalize_text("  Hello,\n\tWORLD ") == "hello,world"
    assert normalize_text("a\u00a0b\u3000c d") == "a\u00a0b\u3000cd"
    assert hash_exact("a") == hash_exact("a") != hash_exact("b")
    assert all(0 <= number < 1 << 64 for number in hash_exact("a"))


@pytest.mark.parametrize("width", [2, 3, 5, 8, 16, 21])
def test_shingle_hashes_do_not_depend_on_other_texts(width: int) -> None:
    """Each text gives the hashes of its own shingles, a quarter of them, in any batch."""
    texts = ["", "ab", make_text(1), "x" * (width - 1), make_text(2) + "漢字\U0001f600", "y" * width]
    together, ends = hash_shingles(texts, width)
    start = 0
    for body, end in zip(texts, ends.tolist(), strict=True):
        alone, _ = hash_shingles([body], width)
        assert together[start:end].tolist() == alone.tolist()
        start = end
    long = make_text(3, 3000)
    shingles = {long[start : start + width] for start in range(len(long) - width + 1)}
    hashes = set(hash_shingles([long], width)[0].tolist())
    expected = len(shingles) / SAMPLE_EVERY
    assert abs(len(hashes) - expected) < 5 * expected**0.5
    assert set(hash_shingles([long[100:]], width)[0].tolist()) <= hashes


def test_mixing_is_injective_and_depends_on_the_salt() -> None:
    values = np.arange(1000, dtype=np.uint64)
    assert len(set(mix_hashes(values, 0).tolist())) == 1000
    assert not np.array_equal(mix_hashes(values, 0), mix_hashes(values, 1))
    assert abs((mix_hashes(values, 0) >> np.uint64(63)).mean() - 0.5) < 0.1


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    rows = choose_rows_per_band(DedupConfig(threshold=threshold))
    bands = 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.9
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.9


def compute_similarity(one: str, other: str, width: int) -> float:
    """The exact Jaccard similarity of the shingles."""
    first, second = ({text[i : i + width] for i in range(len(text) - width + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


def test_estimates_are_close_to_the_exact_similarity() -> None:
    pytest.importorskip("rensa")
    minhasher = MinHasher(DedupConfig())
    rng = random.Random(5)
    errors = []
    for number in range(60):
        original = " ".join(make_words(rng, 600))
        copy = make_near_duplicate(original, number, changes=rng.randint(1, 60))
        signatures, has_shingles = minhasher.compute_signatures([original, copy, "short"])
        assert has_shingles.tolist() == [True, True, False]
        errors.append(
            float(estimate_similarity(signatures[:1], signatures[1:2])[0]) - compute_similarity(original, copy, 16)
        )
    # With 128 permutations, the standard error is at most 0.044. The mean of sixty errors is within a third of that.
    assert np.std(errors) < 0.06 and abs(np.mean(errors)) < 0.02


def test_similar_texts_share_a_band_and_others_do_not() -> None:
    pytest.importorskip("rensa")
    minhasher = MinHasher(DedupConfig())
    originals = [make_text(number, 400) for number in range(30)]
    copies = [make_near_duplicate(original, number, changes=3) for number, original in enumerate(originals)]
    hashes = minhasher.compute_band_hashes(minhasher.compute_signatures([*originals, *copies])[0])
    assert hashes.shape == (60, minhasher.bands)
    assert all(set(hashes[number]) & set(hashes[30 + number]) for number in range(30))
    assert len(np.unique(hashes[:30])) == 30 * minhasher.bands


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UsageError, match=r'rensa: pip install "fledge\[data\]"'):
        MinHasher(DedupConfig())
