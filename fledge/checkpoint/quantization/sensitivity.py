"""How much a model's predictions suffer where a matrix is rounded, and which matrices deserve more bits for it.

Rounding changes a weight W by D. To second order, and with errors that know nothing of each other, the predictions
move by

    KL(before || after) = 1/2 sum_ij F_ij D_ij^2      in nats a token; F is the diagonal of the Fisher information,
    F_ij = outputs_i inputs_j

where `inputs` is the mean square of what a column multiplies, and `outputs` that of the gradient of log p of a token
that the model itself draws, at a row's output. `fledge.checkpoint.quantization.calibration` measures both on a text.
Without a text stands a table of what was measured on small trained models. Not here: rounding
(fledge.kernels.rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fledge.kernels import QuantizedMatrix

ROWS = 4096  # compared at once
STEPS = 1000  # in which `choose_within_budget` counts what there is to spend


class MatrixImportance(NamedTuple):
    """What a text says about a matrix of (rows, columns)."""

    inputs: Tensor  # (columns,) mean square of the activations
    outputs: Tensor  # (rows,) mean square of the gradient of log p


USUAL = {
    "head.weight": 4.0,
    "att.output.weight": 2.0,
    "att.gate.weight": 2.0,
    "att.value.weight": 1.5,
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.7,
    "ffn.key.weight": 1.0,
    "ffn.value.weight": 0.5,
    "ffn.receptance.weight": 0.3,
}
"""How much a weight counts where no text was given, relative to one of ffn.key, at the same relative error: the means
(geometric) of tiny-finch and of a trained RWKV-5.2 of 730 thousand parameters, which differ by factors of up to 3."""


def estimate_cost(name: str, weights: int, relative_error: float) -> float:
    """What the predictions lose, as a rule, where so many weights have this error; in units of no meaning."""
    return USUAL["head.weight" if name == "head.weight" else name.split(".", 2)[2]] * weights * relative_error**2


def compute_cost(weight: Tensor, matrix: QuantizedMatrix, importance: MatrixImportance) -> float:
    """What the predictions lose where `matrix` stands for `weight`, in nats a token: the formula above."""
    rounded, total = matrix.dequantize(), 0.0
    inputs, outputs = importance.inputs.float(), importance.outputs.float()
    for start in range(0, weight.shape[0], ROWS):
        off = rounded[start : start + ROWS] - weight[start : start + ROWS].float()
        total += float(outputs[start : start + ROWS] @ (off.square() @ inputs))
    return total / 2


def choose_within_budget(gains: Mapping[str, float], prices: Mapping[str, int], budget: int) -> set[str]:
    """The names with the largest sum of gains whose prices do not exceed `budget` together (a knapsack, solved exactly
    up to rounding prices up by a thousandth of the budget)."""
    unit = max(budget, 0) / STEPS
    names = [name for name in gains if gains[name] > 0 and prices[name] <= budget]
    best = [0.0] * (STEPS + 1)
    taken: list[list[bool]] = []
    for name in names:
        price = int(-(-prices[name] // unit)) if unit else 0
        row = [False] * (STEPS + 1)
        for room in range(STEPS, price - 1, -1):
            if (found := best[room - price] + gains[name]) > best[room]:
                best[room], row[room] = found, True
        taken.append(row)
    room, chosen = STEPS, set()
    for name, row in zip(reversed(names), reversed(taken), strict=True):
        if row[room]:
            chosen.add(name)
            room -= int(-(-prices[name] // unit)) if unit else 0
    return chosen
