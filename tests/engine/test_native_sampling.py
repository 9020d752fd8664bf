"""Draws in the native library against their twin in numpy, on every instruction set.

Both add up the same weights, in another order and with another `exp`. So where a random number, or top_p, falls on a
border between two tokens, to within NEAR, either of them is right; everywhere else there is one answer.
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
from native_library import every_instruction_set, forced, needs_native

from fledge.core.errors import FledgeError
from fledge.engine import sampling
from fledge.engine.sampling import SampleInput, Sampler, SamplingParams, sample_batch, sample_native, sample_reference

pytestmark = needs_native

NEAR = 1e-12
BELOW_ONE = 1 - 2**-53
SHAPES = ["random", "wide", "peaked", "far apart", "nearly flat", "flat", "ties", "crowded", "huge", "tiny"]


def scores_of(shape: str, size: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Scores as a model might give them, and some that none should."""
    noise = random.standard_normal(size)
    if shape == "peaked":
        noise = noise * 0.3 - 1.6 * np.log(random.permutation(size) + 1)
    if shape == "ties":
        noise = np.round(noise * 2) / 2
    if shape == "crowded":  # one token, and far below all others, so close that groups of groups are looked into
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


def random_chance(random: np.random.Generator, size: int) -> SampleInput:
    """A draw with settings of all kinds; some cannot be done."""
    scores, params = scores_of(str(random.choice(SHAPES)), size, random), random_params(random, size)
    if random.random() < 0.2:
        scores[random.random(size) < 0.5] = -math.inf
    if random.random() < 0.03:
        scores[random.integers(size)] = random.choice([math.nan, math.inf])
    allowed = random.random(size) < random.choice([0.01, 0.5, 1.0]) if random.random() < 0.3 else None
    known = random.permutation(size)[: random.choice([0, 1, 17])]
    number = random.choice([0.0, BELOW_ONE]) if random.random() < 0.1 else random.random()
    banned, times = np.array(params.ban, np.int64), random.random(len(known)) * 3
    return SampleInput(params, torch.from_numpy(scores), allowed, banned, known, times, float(number))


def answers(found: Sequence[int | FledgeError]) -> list[int | tuple[type, str]]:
    """Tokens and errors in a form that can be compared."""
    return [(type(one), str(one)) if isinstance(one, FledgeError) else one for one in found]


def beside(chance: SampleInput) -> list[int | tuple[type, str]]:
    """What the twin draws where the number and top_p are a little smaller or larger."""
    found = list[int | tuple[type, str]]()
    for number in (-NEAR, 0, NEAR):
        for top_p in (-NEAR, 0, NEAR):
            params = replace(chance.params, top_p=min(max(chance.params.top_p + top_p, 0.0), 1.0))
            moved = chance._replace(params=params, uniform=min(max(chance.uniform + number, 0.0), BELOW_ONE))
            found += answers(sample_reference([moved]))
    return found


@every_instruction_set
@pytest.mark.parametrize(
    "sizes, cases",
    [((1, 2, 3, 15, 16, 17), 800), ((63, 64, 65, 300, 1000), 1500), ((8192, 10_007), 60), ((65_536, 70_000), 25)],
)
def test_every_draw_is_that_of_the_twin(instruction_set: str, sizes: tuple[int, ...], cases: int) -> None:
    random, refused, bordering = np.random.default_rng(len(sizes)), 0, 0
    for _ in range(cases):
        chance = random_chance(random, int(random.choice(sizes)))
        expected = answers(sample_reference([chance]))
        with forced(instruction_set):
            found = answers(sample_native([chance]))
        refused += not isinstance(expected[0], int)
        if found != expected:
            bordering += 1
            assert found[0] in beside(chance), (chance, found, expected)
    assert refused < cases / 3 and bordering <= cases / 50


@every_instruction_set
def test_weights_are_exact_to_the_last_bits(instruction_set: str) -> None:
    """Of two tokens the improbable one comes first: below its probability it is drawn, and above it is not."""
    chance = SampleInput(SamplingParams(top_p=1.0), torch.zeros(2), None, *np.zeros((2, 0), np.int64), np.zeros(0), 0.5)
    for gap in np.concatenate([np.linspace(0, 40, 400), np.linspace(40, 707, 400)]).astype(np.float32):
        for temperature in (1.0, 1.25):
            heated = float(gap) / temperature
            border = 1 / (1 + math.exp(heated))
            rows = [
                chance._replace(
                    params=replace(chance.params, temperature=temperature),
                    logits=torch.tensor([-gap, 0.0]),
                    uniform=border * (1 + off),
                )
                for off in (-1e-15, 1e-15)
            ]
            with forced(instruction_set):
                assert sample_native(rows) == [0, 1], (gap, temperature)


@every_instruction_set
def test_what_is_too_far_below_is_never_drawn(instruction_set: str) -> None:
    """However hot: with top_p and the temperature out of the way only the distance decides."""
    params = SamplingParams(top_p=1.0, temperature=1e6)
    logits = torch.tensor([-708.001, -math.inf, 0.0, -707.999])
    chance = SampleInput(params, logits, None, *np.zeros((2, 0), np.int64), np.zeros(0), 0.0)
    rows = [chance._replace(uniform=number) for number in (0.0, 0.49, 0.51, BELOW_ONE)]
    with forced(instruction_set):
        assert sample_native(rows) == sample_reference(rows) == [2, 2, 3, 3]


@every_instruction_set
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_does_not_depend_on_the_others_or_on_threads(instruction_set: str, threads: int) -> None:
    random = np.random.default_rng(7)
    chances = [random_chance(random, 3001) for _ in range(40)]
    with forced(instruction_set):
        alone = [answers(sample_native([chance]))[0] for chance in chances]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert answers(sample_native(chances)) == alone
            assert answers(sample_native(chances[::-1])) == alone[::-1]
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_a_long_text_with_penalties_is_that_of_the_twin(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """More tokens than the first memory of them holds, three texts side by side, with masks now and then."""
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


def test_logits_and_masks_may_lie_anywhere() -> None:
    random = np.random.default_rng(3)
    wide, mask = torch.from_numpy(random.standard_normal((50, 3))), random.random((50, 2)) < 0.5
    for seed in range(20):
        one, other = Sampler(SamplingParams(seed=seed)), Sampler(SamplingParams(seed=seed))
        found = one.sample(wide[:, 1], mask[:, 1])
        assert found == other.sample(wide[:, 1].float().contiguous(), mask[:, 1].copy())
        assert mask[found, 1]


@every_instruction_set
def test_each_row_has_its_own_error(instruction_set: str) -> None:
    """NaN at every place of a row, where it counts and where the mask hides it; and one sound row among them."""
    rows = [torch.zeros(70).index_fill_(0, torch.tensor([place]), math.nan) for place in range(70)]
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
    chances = [Sampler(SamplingParams(seed=1, **given)).prepare(*rest) for given, *rest in settings]
    with forced(instruction_set):
        found = answers(sample_native(chances))
    assert found == answers(sample_reference(chances))
    assert [token for token in found if isinstance(token, int)] == [5] * 69
    assert len({error for error in found if not isinstance(error, int)}) == 7
