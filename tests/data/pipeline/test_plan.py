"""The mixture plan: caps, weights and epochs, and that the choice depends only on the documents and the seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import make_config, make_text, write_jsonl

from fledge.core.errors import UsageError
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.counts import Count
from fledge.data.pipeline.mixture.plan import BUCKETS, _compute_wanted_bytes, _find_bucket_limit
from fledge.data.pipeline.store_assembly import read_counts
from fledge.data.store import TokenStore
from fledge.tokenizer import load_world

KINDS = [("en", "a"), ("en", "b"), ("de", "a"), ("code:python", "c"), ("xx", "a")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """600 documents, each of about 280 bytes."""
    rows = [
        {"text": make_text(number, 45), "lang": language, "src": source}
        for number in range(600)
        for language, source in [KINDS[number % len(KINDS)]]
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    return tmp_path


def build_store(base: Path, mixture: dict[str, Any], **settings: Any) -> TokenStore:
    values = {"piece_bytes": 10**6, "dedup": {"near": False}, "validation": {"share": 0.0}, **settings}
    return build(make_config(mixture=mixture, **values), base, base / "store", BuildOptions(workers=1, force=True))


def count_stored(store: TokenStore, column: str = "language") -> dict[str, Count]:
    return read_counts(store.manifest).group_by(column).get("stored", {})


def test_caps_limit_groups_and_sources(base: Path) -> None:
    groups = [
        {"name": "english", "languages": ["en"], "max_bytes": 20_000},
        {"name": "german", "languages": ["de"], "max_bytes": 5_000},
        {"name": "code", "languages": ["code:*"]},
    ]
    store = build_store(base, {"groups": groups, "source_bytes": {"b": 4_000}})
    counts = count_stored(store)
    assert 20_000 <= counts["en"].bytes < 20_400 and 5_000 <= counts["de"].bytes < 5_400
    assert counts["code:python"].documents == 120 and "xx" not in counts
    assert 4_000 <= count_stored(store, "source")["b"].bytes < 4_400
    assert read_counts(store.manifest).group_by("language")["no group"]["xx"].documents == 120


def test_weights_take_as_much_as_the_scarcest_group_allows(base: Path) -> None:
    groups = [
        {"name": "english", "languages": ["en"], "weight": 70},
        {"name": "many", "languages": ["de", "xx"], "weight": 15},
        {"name": "code", "languages": ["code:*"], "weight": 15},
    ]
    counts = count_stored(build_store(base, {"groups": groups}))
    total = sum(count.bytes for count in counts.values())
    assert counts["en"].documents == 240  # all of them: English is the scarcest group
    assert abs(counts["en"].bytes / total - 0.70) < 0.01 and abs(counts["code:python"].bytes / total - 0.15) < 0.01
    counts = count_stored(build_store(base, {"groups": groups, "total_bytes": 30_000}))
    assert abs(sum(count.bytes for count in counts.values()) - 30_000) < 1000


def test_each_epoch_contains_every_document_before_any_repeats(base: Path) -> None:
    groups = [
        {"name": "code", "languages": ["code:*"], "epochs": 2.5},
        {"name": "german", "languages": ["de"], "epochs": 0.5},
    ]
    store = build_store(base, {"groups": groups})
    index = store.index("train")
    occurrences = Counter(index[number].tobytes() for number in range(len(index)))
    tokenizer = load_world()
    times = Counter[tuple[str, int]]()
    for number in range(600):
        language = KINDS[number % len(KINDS)][0]
        key = np.array([*tokenizer.encode(make_text(number, 45)), 0], dtype=np.uint16).tobytes()
        times[language, occurrences[key]] += 1
    assert times["code:python", 2] + times["code:python", 3] == 120 and abs(times["code:python", 3] - 60) <= 1
    assert times["de", 0] + times["de", 1] == 120 and abs(times["de", 1] - 60) <= 1
    first = [index[number].tobytes() for number in range(120 + times["de", 1])]
    assert len(set(first)) == len(first)


def test_another_seed_chooses_other_documents(base: Path) -> None:
    mixture = {"groups": [{"name": "all", "max_bytes": 30_000}]}
    one, other = (build_store(base, mixture, seed=seed).sha256 for seed in (1, 2))
    assert one != other and build_store(base, mixture, seed=1).sha256 == one


def test_a_weighted_group_without_documents_is_an_error(base: Path) -> None:
    with pytest.raises(UsageError, match="group welsh of the mixture has a weight, but no document"):
        build_store(base, {"groups": [{"name": "welsh", "languages": ["cy"], "weight": 1}]})


def test_bucket_limits_and_wanted_bytes() -> None:
    sizes = np.zeros(BUCKETS, dtype=np.int64)
    sizes[[3, 7, 100]] = (10, 20, 30)
    assert [_find_bucket_limit(sizes, wanted) for wanted in (0, 1, 10, 11, 60)] == [0, 4, 4, 8, 101]
    assert _find_bucket_limit(sizes, 61) == BUCKETS
    mixture = make_config(
        mixture={"groups": [{"name": "a", "weight": 3}, {"name": "b", "weight": 1, "epochs": 4}]}
    ).mixture
    assert _compute_wanted_bytes(mixture, np.array([300, 100])) == [300.0, 100.0]
    assert _compute_wanted_bytes(mixture, np.array([3000, 100])) == [1200.0, 400.0]
