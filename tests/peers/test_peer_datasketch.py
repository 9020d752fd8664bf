"""MinHash signatures compared with datasketch, an independent implementation, on the same shingles."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fledge.data.pipeline.config import DedupConfig
from fledge.data.pipeline.dedup.minhash import SEED, MinHasher, estimate_similarity, hash_shingles

datasketch = pytest.importorskip("datasketch")
pytest.importorskip("rensa")
pytestmark = pytest.mark.peer


def test_similarity_estimates_agree_with_datasketch() -> None:
    rng = random.Random(SEED)
    alphabet = "abcdefghij klmno"
    minhasher = MinHasher(DedupConfig())
    differences = []
    for _ in range(25):
        one = "".join(rng.choices(alphabet, k=3000))
        other = list(one)
        for position in rng.sample(range(3000), rng.randint(1, 120)):
            other[position] = "x"
        texts = [one, "".join(other)]
        signatures, _ = minhasher.compute_signatures(texts)
        references = []
        for text in texts:
            reference = datasketch.MinHash(num_perm=256, seed=1)
            for shingle in hash_shingles([text], 16)[0].tolist():
                reference.update(shingle.to_bytes(8, "little"))
            references.append(reference)
        estimate = float(estimate_similarity(signatures[:1], signatures[1:])[0])
        differences.append(estimate - references[0].jaccard(references[1]))
    # The standard errors are at most 0.044 and 0.031, and they are independent.
    assert np.std(differences) < 0.075 and abs(np.mean(differences)) < 0.03
