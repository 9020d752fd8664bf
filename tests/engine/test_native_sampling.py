"""The native sampler against the reference in numpy, on every instruction set.

Both sum the same weights, in a different order and with a different `exp`. If a random number or top_p falls within
NEAR of the boundary between two tokens, either token is correct. Everywhere else there is one correct token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from native_library import every_instruction_set, needs_native, use_instruction_set

from fledge.core.errors import FledgeError
from fledge.engine import sampling
from fledge.engine.sampling import SampleInput, Sampler, SamplingParams, sample_batch, sample_native, sample_reference

pytestmark = needs_native

NEAR = 1e-12
BELOW_ONE = 1 - 2**-53
SHAPES = ["random", "wide", "peaked", "far apart", "nearly flat", "flat", "ties", "crowded", "huge", "tiny"]


def logits_of_shape(shape: str, size: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Logits (size,) float32: realistic ones and extreme ones."""
    noise = random.standard_normal(size)
    if shape == "peaked":
        noise = noise * 0.3 - 1.6 * np.log(random.permutation(size) + 1)
    if shape == "ties":
        noise = np.round(noise * 2) / 2
    if shape == "crowded":  # one token, and far below it all others, so close that their groups are split into groups
        noise = -9 + noise * 1e-4
        noise[random.integers(size)] = 0
    scale = {"wide": 4, "far apart": 300, "nearly flat": 1e-3, "flat": 0, "huge": 5e37, "tiny": 1e-41}
    return (noise * scale.get(shape, 1)).astype(np.float32)


def random_params(random: np.random.Generator, size: int) -> SamplingParams:
    return SamplingParams(
        temperature=float(random.choice([0.0, 0.05, 0.7, 1.0, 1.0, 1.6, 30.0])),
        top_p=float(random.choice([0.0, 0.2, 0.5, 0.85, 0.99, 0.9999, 1.0])),
        top_k=int(random.choice([0, 0, 1, 2, 5, 40, size, size + 3])),
        presence_penalty=float(random.choice([0.0, 0.5, -0.4])),
        frequency_penalty=float(random.choice([0.0, 0.3, -0.2])),
        ban=tuple(random.integers(0, size, random.choice([0, 0, 1, 4])).tolist()),
    )


def random_input(random: np.random.Generator, size: int) -> SampleInput:
    """An input with all kinds of settings; some cannot be sampled."""
    scores, params = logits_of_shape(str(random.choice(SHAPES)), size, random), random_params(random, size)
    if random.random() < 0.2:
        scores[random.random(size) < 0.5] = -math.inf
    if random.random() < 0.03:
        scores[random.integers(size)] = random.choice([math.nan, math.inf])
    allowed = random.random(size) < random.choice([0.01, 0.5, 1.0]) if random.random() < 0.3 else None
    previous_ids = random.permutation(size)[: random.choice([0, 1, 17])]
    uniform = random.choice([0.0, BELOW_ONE]) if random.random() < 0.1 else random.random()
    banned_ids, previous_frequencies = np.array(params.ban, np.int64), random.random(len(previous_ids)) * 3
    return SampleInput(
        params, torch.from_numpy(scores), allowed, banned_ids, previous_ids, previous_frequencies, float(uniform)
    )


def comparable(results: Sequence[int | FledgeError]) -> list[int | tuple[type, str]]:
    """Tokens and errors in a form that can be compared."""
    return [(type(each), str(each)) if isinstance(each, FledgeError) else each for each in results]


def neighbors(one: SampleInput) -> list[int | tuple[type, str]]:
    """The results of the reference if the random number and top_p are slightly smaller or larger."""
    results = list[int | tuple[type, str]]()
    for uniform in (-NEAR, 0, NEAR):
        for top_p in (-NEAR, 0, NEAR):
            params = replace(one.params, top_p=min(max(one.params.top_p + top_p, 0.0), 1.0))
            moved = one._replace(params=params, uniform=min(max(one.uniform + uniform, 0.0), BELOW_ONE))
            results += comparable(sample_reference([moved]))
    return results


@every_instruction_set
@pytest.mark.parametrize(
    "sizes, cases",
    [((1, 2, 3, 15, 16, 17), 800), ((63, 64, 65, 300, 1000), 1500), ((8192, 10_007), 60), ((65_536, 70_000), 25)],
)
def test_native_sampler_matches_the_reference(instruction_set: str, sizes: tuple[int, ...], cases: int) -> None:
    random, errors, on_boundary = np.random.default_rng(len(sizes)), 0, 0
    for _ in range(cases):
        one = random_input(random, int(random.choice(sizes)))
        expected = comparable(sample_reference([one]))
        with use_instruction_set(instruction_set):
            found = comparable(sample_native([one]))
        errors += not isinstance(expected[0], int)
        if found != expected:
            on_boundary += 1
            assert found[0] in neighbors(one), (one, found, expected)
    assert errors < cases / 3 and on_boundary <= cases / 50


@every_instruction_set
def test_weights_are_exact_to_the_last_bits(instruction_set: str) -> None:
    """The less probable of two tokens has id 0: it is sampled if the random number is below its probability."""
    base = SampleInput(SamplingParams(top_p=1.0), torch.zeros(2), None, *np.zeros((2, 0), np.int64), np.zeros(0), 0.5)
    for gap in np.concatenate([np.linspace(0, 40, 400), np.linspace(40, 707, 400)]).astype(np.float32):
        for temperature in (1.0, 1.25):
            heated = float(gap) / temperature
            boundary = 1 / (1 + math.exp(heated))
            rows = [
                base._replace(
                    params=replace(base.params, temperature=temperature),
                    logits=torch.tensor([-gap, 0.0]),
                    uniform=boundary * (1 + offset),
                )
                for offset in (-1e-15, 1e-15)
            ]
            with use_instruction_set(instruction_set):
                assert sample_native(rows) == [0, 1], (gap, temperature)


@every_instruction_set
def test_tokens_beyond_the_largest_gap_are_never_sampled(instruction_set: str) -> None:
    """At any temperature: top_p=1 and a high temperature exclude no token."""
    params = SamplingParams(top_p=1.0, temperature=1e6)
    logits = torch.tensor([-708.001, -math.inf, 0.0, -707.999])
    base = SampleInput(params, logits, None, *np.zeros((2, 0), np.int64), np.zeros(0), 0.0)
    rows = [base._replace(uniform=uniform) for uniform in (0.0, 0.49, 0.51, BELOW_ONE)]
    with use_instruction_set(instruction_set):
        assert sample_native(rows) == sample_reference(rows) == [2, 2, 3, 3]


@every_instruction_set
@pytest.mark.parametrize("gap", [1e-6, 0.1, 1.0, 10.0, 30.0])
def test_top_p_boundary(instruction_set: str, gap: float) -> None:
    """top_p just below the probability of the first token keeps that token only, just above it keeps the second too."""
    logits = torch.tensor([-gap, 0.0], dtype=torch.float32)
    probability = 1 / (1 + math.exp(float(logits[0])))
    none = np.zeros(0, np.int64)
    for offset, kept in ((-1e-13, [1]), (1e-13, [0, 1])):
        params = SamplingParams(top_p=min(probability + offset, BELOW_ONE), temperature=1e9)
        inputs = [SampleInput(params, logits, None, none, none, np.zeros(0), uniform) for uniform in (0.0, BELOW_ONE)]
        with use_instruction_set(instruction_set):
            assert sample_native(inputs) == sample_reference(inputs) == [kept[0], kept[-1]]


@every_instruction_set
@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 7, 69, 70, 71])
def test_top_k_boundary_between_ties(instruction_set: str, top_p: float, top_k: int) -> None:
    """Of equal tokens the lowest ids stay: every id that can be sampled is the same in both implementations."""
    logits = torch.tensor([float(index % 7) for index in range(70)])
    params = SamplingParams(top_p=top_p, top_k=top_k, temperature=1e9)
    none = np.zeros(0, np.int64)
    uniforms = [(index + 0.5) / 70 for index in range(70)]
    inputs = [SampleInput(params, logits, None, none, none, np.zeros(0), uniform) for uniform in uniforms]
    with use_instruction_set(instruction_set):
        tokens = sample_native(inputs)
    assert tokens == sample_reference(inputs)
    ranking = sorted(range(70), key=lambda token: (-float(logits[token]), token))
    kept = ranking if top_p == 1.0 else ranking[:10]
    assert set(tokens) == set(kept[:top_k])


@every_instruction_set
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_are_independent_of_each_other_and_of_threads(instruction_set: str, threads: int) -> None:
    random = np.random.default_rng(7)
    inputs = [random_input(random, 3001) for _ in range(40)]
    with use_instruction_set(instruction_set):
        alone = [comparable(sample_native([each]))[0] for each in inputs]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert comparable(sample_native(inputs)) == alone
            assert comparable(sample_native(inputs[::-1])) == alone[::-1]
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_penalties_of_a_long_text_match_the_reference(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """More different tokens than the initial capacity, three texts in a batch, with a mask for some tokens."""
    settings: dict[str, Any] = {"presence_penalty": 0.4, "frequency_penalty": 0.7, "penalty_decay": decay}
    random, texts = np.random.default_rng(2), [[], []]
    rows = torch.from_numpy(random.standard_normal((150, 3, 211)).astype(np.float32))
    masks = [[random.random(211) < 0.5 if random.random() < 0.3 else None for _ in range(3)] for _ in range(150)]
    for text in texts:
        samplers = [Sampler(SamplingParams(seed=seed, ban=(4, 9), **settings)) for seed in range(3)]
        for row, mask in zip(rows, masks, strict=True):
            text.append(sample_batch(samplers, row, mask))
        monkeypatch.setattr(sampling, "library", lambda: None)
    assert texts[0] == texts[1]
    assert all(len(set(text)) > 40 for text in zip(*texts[0], strict=True))


def test_logits_and_masks_with_strides() -> None:
    random = np.random.default_rng(3)
    wide, mask = torch.from_numpy(random.standard_normal((50, 3))), random.random((50, 2)) < 0.5
    for seed in range(20):
        strided, contiguous = Sampler(SamplingParams(seed=seed)), Sampler(SamplingParams(seed=seed))
        token = strided.sample(wide[:, 1], mask[:, 1])
        assert token == contiguous.sample(wide[:, 1].float().contiguous(), mask[:, 1].copy())
        assert mask[token, 1]


@every_instruction_set
def test_each_row_has_its_own_error(instruction_set: str) -> None:
    """NaN at each index of a row, with and without a mask that hides it."""
    rows = [torch.zeros(70).index_fill_(0, torch.tensor([index]), math.nan) for index in range(70)]
    only = np.arange(70) == 5
    settings: list[tuple[dict[str, Any], torch.Tensor, npt.NDArray[np.bool_] | None]] = [
        *(({}, row, None) for row in rows),
        *(({}, row, only) for row in rows),
        ({}, torch.full((70,), math.inf), None),
        ({}, torch.full((70,), -math.inf), None),
        ({"ban": tuple(range(70))}, torch.zeros(70), None),
        ({"ban": (5,)}, torch.zeros(70), only),
        ({"ban": (3, 70)}, torch.zeros(70), only),
        ({}, torch.zeros(70), np.zeros(70, bool)),
        ({"temperature": 0.0}, rows[3], None),
    ]
    inputs = [Sampler(SamplingParams(seed=1, **params)).prepare(*rest) for params, *rest in settings]
    with use_instruction_set(instruction_set):
        found = comparable(sample_native(inputs))
    assert found == comparable(sample_reference(inputs))
    assert [token for token in found if isinstance(token, int)] == [5] * 69
    assert len({error for error in found if not isinstance(error, int)}) == 7
