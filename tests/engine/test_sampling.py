"""Tests of the sampler: against a plain implementation of the rules, its random stream and its errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.errors import FledgeError, UsageError
from fledge.engine import sampling
from fledge.engine.sampling import Sampler, SamplingParams, compute_distribution, sample_reference


@pytest.fixture(params=["library", "numpy"])
def both_samplers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample with the native library, if there is one, and without it."""
    if request.param == "numpy":
        monkeypatch.setattr(sampling, "library", lambda: None)


def plain_distribution(
    logits: list[float], params: SamplingParams, counts: dict[int, float] | None = None
) -> dict[int, float]:
    """Token -> probability, computed by the rules with sorted lists."""
    scores = list(logits)
    for token in params.ban:
        scores[token] = -math.inf
    for token, count in (counts or {}).items():
        scores[token] -= params.presence_penalty + count * params.frequency_penalty
    if params.temperature == 0:
        return {scores.index(max(scores)): 1.0}
    highest = max(scores)
    odds = [math.exp(score - highest) for score in scores]
    total = math.fsum(odds)
    probabilities = [odd / total for odd in odds]
    ranking = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    cutoff, running = 0.0, 0.0
    for token in ranking:
        running += probabilities[token]
        if running >= params.top_p:
            cutoff = probabilities[token]
            break
    kept = [token for token in ranking if probabilities[token] >= cutoff and probabilities[token] > 0]
    kept = kept[: params.top_k] if params.top_k else kept
    heated = {token: (probabilities[token] / probabilities[kept[0]]) ** (1 / params.temperature) for token in kept}
    total = math.fsum(heated.values())
    return {token: weight / total for token, weight in heated.items()}


def distribution(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    ids, weights = compute_distribution(logits, params)
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


def same(one: dict[int, float], other: dict[int, float]) -> bool:
    return one.keys() == other.keys() and all(one[key] == pytest.approx(other[key], abs=1e-9) for key in one)


# Eighths and a few levels make exact ties common.
ROWS = st.lists(st.integers(-24, 24).map(lambda number: number / 8), min_size=1, max_size=40)


@settings(deadline=None, max_examples=200)
@given(
    ROWS,
    st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.5]),
    st.sampled_from([0.0, 0.1, 0.313, 0.85, 0.999, 1.0]),
    st.integers(0, 45),
)
def test_distribution_matches_the_plain_implementation(
    row: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    assert same(distribution(torch.tensor(row), params), plain_distribution(row, params))


def logits_of_shape(shape: str) -> torch.Tensor:
    """20000 logits: realistic ones and extreme ones."""
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    if shape == "peaked":  # Zipf's law, in random order
        ranks = torch.arange(1, 20_001)[torch.randperm(20_000, generator=torch.Generator().manual_seed(4))]
        return noise * 0.3 - 1.6 * ranks.log()
    if shape == "far apart":  # most tokens have a probability near 0
        return noise * 200
    if shape == "ties":
        return (noise * 4).round() / 4
    if shape == "banned":
        return noise.where(noise < 0, -math.inf)
    return noise * {"random": 1.0, "nearly flat": 1e-3, "flat": 0.0}[shape]


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.85, 0.9999, 1 - 2**-53])
@pytest.mark.parametrize("shape", ["peaked", "random", "nearly flat", "flat", "far apart", "ties", "banned"])
def test_large_vocabulary(shape: str, top_p: float) -> None:
    logits = logits_of_shape(shape)
    for params in (SamplingParams(top_p=top_p), SamplingParams(top_p=top_p, top_k=300, temperature=0.7)):
        found = distribution(logits, params)
        expected = plain_distribution(logits.tolist(), params)
        assert found.keys() ^ expected.keys() <= {token for token, chance in expected.items() if chance < 1e-15}
        assert max(abs(found.get(token, 0.0) - chance) for token, chance in expected.items()) < 1e-9


def test_ties_at_the_top_p_cutoff_stay_and_top_k_takes_the_lowest_ids() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 3.0])
    assert list(distribution(logits, SamplingParams(top_p=0.0))) == [1, 2, 4, 5]
    assert list(distribution(logits, SamplingParams(top_p=0.3, top_k=3))) == [1, 2, 4]
    assert list(distribution(logits, SamplingParams(temperature=0.0))) == [1]


def test_very_low_temperature_does_not_underflow() -> None:
    logits = torch.tensor([0.0, 1.0, 0.999])
    found = distribution(logits, SamplingParams(temperature=1e-6, top_p=1.0))
    assert found == {0: 0.0, 1: 1.0, 2: 0.0}


@pytest.mark.usefixtures("both_samplers")
@pytest.mark.parametrize("presence, frequency, decay", [(0.2, 0.2, 0.996), (0.0, 1.5, 0.5), (-0.5, 0.0, 1.0)])
def test_penalties_match_the_plain_implementation_over_a_sequence(
    presence: float, frequency: float, decay: float
) -> None:
    params = SamplingParams(
        top_p=1.0, presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay, ban=(3,), seed=5
    )
    sampler, counts = Sampler(params), dict[int, float]()
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(60, 11, generator=torch.Generator().manual_seed(8))
    for row in rows:
        before = row.clone()
        token = sampler.sample(row)
        assert torch.equal(row, before), "the sampler changed the logits"
        probabilities = plain_distribution(row.tolist(), params, counts)
        uniform, running = float(torch.rand((), generator=random, dtype=torch.float64)), 0.0
        for expected in sorted(probabilities):
            running += probabilities[expected]
            if running > uniform:
                break
        assert token == expected != 3
        counts = {seen: count * decay for seen, count in counts.items()}
        counts[token] = counts.get(token, 0.0) + 1.0


@pytest.mark.usefixtures("both_samplers")
def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=1)
    sampler = Sampler(params)
    counts = [0] * 5
    for _ in range(6_000):
        counts[sampler.sample(logits)] += 1
    expected = plain_distribution(logits.tolist(), params)
    for token, count in enumerate(counts):
        assert count / 6_000 == pytest.approx(expected.get(token, 0.0), abs=0.02)


@pytest.mark.usefixtures("both_samplers")
def test_seed_reproduces_the_samples() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))

    def samples(sampler: Sampler, noise: Sampler | None = None) -> list[int]:
        tokens = []
        for row in logits:
            tokens.append(sampler.sample(row))
            if noise is not None:
                torch.rand(3)
                noise.sample(row)
        return tokens

    params = SamplingParams(seed=2**63 - 1)
    alone = samples(Sampler(params))
    assert samples(Sampler(params), noise=Sampler(params)) == alone
    fresh = Sampler(SamplingParams())
    again = Sampler(SamplingParams(seed=fresh.seed))
    assert samples(fresh) == samples(again)
    assert Sampler(SamplingParams()).seed != fresh.seed


def test_global_random_state_is_unchanged() -> None:
    before = torch.get_rng_state()
    Sampler(SamplingParams()).sample(torch.zeros(9))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be a number from 0 to 1"),
        ({"top_p": True}, "top_p is True"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"penalty_decay": 1.5}, "penalty_decay is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, f"seed is {2**63}"),
        ({"ban": (1, -2)}, "ban is -2"),
        ({"ban": 7}, "ban is 7"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ("a", "")}, "stop holds ''"),
        ({"stop": (b"a",)}, "stop holds b'a'"),
        ({"stop": None}, "stop is None"),
        ({"stop": "a\udc80"}, "stop holds"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        SamplingParams(**settings)


def test_invalid_overrides() -> None:
    params = SamplingParams(top_p=0.5).with_overrides({"stop": "\n", "ban": [4]})
    assert (params.top_p, params.stop, params.ban) == (0.5, ("\n",), (4,))
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        params.with_overrides({"temperture": 1.0})
    with pytest.raises(UsageError, match="top_p is 2"):
        params.with_overrides({"top_p": 2})


@pytest.mark.usefixtures("both_samplers")
def test_invalid_logits() -> None:
    with pytest.raises(FledgeError, match=r"contain nan: in float16 or bfloat16 .* in float32 its weights are damaged"):
        Sampler(SamplingParams()).sample(torch.tensor([0.0, math.nan]))
    with pytest.raises(UsageError, match="leaves no token"):
        Sampler(SamplingParams(ban=(0, 1))).sample(torch.zeros(2))
    for ban in (9, 2**70):
        with pytest.raises(UsageError, match=f"ban holds {ban}; this model's ids end at 4"):
            Sampler(SamplingParams(ban=(1, ban))).sample(torch.zeros(5))


@pytest.mark.usefixtures("both_samplers")
@pytest.mark.parametrize("count", [1, 2, 40, 299])
@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 0.5, 0), (1.0, 1.0, 0), (0.7, 0.8, 0), (1.4, 0.9, 5)])
def test_mask_equals_a_ban(count: int, temperature: float, top_p: float, top_k: int) -> None:
    random = np.random.default_rng(count)
    for seed in range(20):
        logits, allowed = torch.randn(300), np.zeros(300, bool)
        allowed[random.permutation(300)[:count]] = True
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, presence_penalty=0.3, seed=seed)
        banned = Sampler(params.with_overrides({"ban": tuple(np.flatnonzero(~allowed).tolist())}))
        masked, before = Sampler(params), allowed.copy()
        for _ in range(3):
            assert masked.sample(logits, allowed) == banned.sample(logits)
        assert (allowed == before).all()


@pytest.mark.usefixtures("both_samplers")
def test_masked_sample_uses_one_random_number() -> None:
    logits, only = torch.randn(30), np.arange(30) == 17
    free, masked = Sampler(SamplingParams(seed=4)), Sampler(SamplingParams(seed=4))
    for index in range(20):
        token = free.sample(logits)
        assert masked.sample(logits, only if index % 2 else None) == (17 if index % 2 else token)


def test_masked_sample_computes_allowed_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, exp = list[int](), sampling.np.exp
    monkeypatch.setattr(sampling.np, "exp", lambda values: sizes.append(len(values)) or exp(values))
    allowed = np.arange(20_000) % 400 == 7
    sample_reference([Sampler(SamplingParams()).prepare(logits_of_shape("random"), allowed)])
    assert sizes == [50]


@pytest.mark.usefixtures("both_samplers")
def test_mask_without_possible_tokens() -> None:
    allowed = np.arange(5) == 3
    with pytest.raises(UsageError, match="the grammar allows 0"):
        Sampler(SamplingParams()).sample(torch.zeros(5), np.zeros(5, bool))
    with pytest.raises(UsageError, match="the grammar allows 1, and all of them are banned"):
        Sampler(SamplingParams(ban=(3,))).sample(torch.zeros(5), allowed)
    with pytest.raises(FledgeError, match="nan"):
        Sampler(SamplingParams()).sample(torch.full((5,), math.nan), allowed)


@pytest.mark.peer
@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 0.85, 0), (0.6, 0.5, 0), (1.7, 0.9, 6), (0.0, 0.7, 0)])
def test_rwkv_package_has_the_same_distribution(
    monkeypatch: pytest.MonkeyPatch, temperature: float, top_p: float, top_k: int
) -> None:
    """The sampler of `rwkv` passes its final probabilities to numpy.random.choice, which this test replaces."""
    utils = pytest.importorskip("rwkv.utils")
    caught: dict[str, Any] = {}

    def choice(a: int, p: Any) -> int:
        caught["p"] = p
        return int(p.argmax())

    monkeypatch.setattr(utils.np.random, "choice", choice)
    logits = torch.randn(300, generator=torch.Generator().manual_seed(11)) * 2
    pipeline = object.__new__(utils.PIPELINE)
    pipeline.sample_logits(logits.clone(), temperature=temperature, top_p=top_p, top_k=top_k)
    expected = {token: float(chance) for token, chance in enumerate(caught["p"]) if chance > 0}
    found = distribution(logits, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k))
    assert found.keys() == expected.keys()
    for token, chance in found.items():
        assert chance == pytest.approx(expected[token], rel=1e-4)
