"""The effect on the predictions of rounding each matrix, and the choice of the matrices that get more bits.

Rounding changes a weight W by D. To second order, and for independent errors, the predictions change by

    KL(before || after) = 1/2 sum_ij F_ij D_ij^2      in nats per token; F is the diagonal of the Fisher information,
    F_ij = outputs_i inputs_j

`inputs` is the mean square of the activations that a column multiplies. `outputs` is the mean square of the gradient of
log p at the output of a row, where p is the probability of a token sampled from the model. Calibration
(calibration.py) measures both on a text. Without a text, a table of measurements on small trained models
is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fledge.kernels import QuantizedMatrix

ROW_CHUNK = 4096  # rows compared at a time
BUDGET_STEPS = 1000  # resolution of the budget in `choose_within_budget`


class MatrixImportance(NamedTuple):
    """The importance of the rows and columns of a matrix, measured on a text."""

    inputs: Tensor  # (columns,) mean square of the activations
    outputs: Tensor  # (rows,) mean square of the gradient of log p


TYPICAL_SENSITIVITY = {
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
"""The sensitivity of a weight without calibration, at the same relative error and relative to a weight of ffn.key: the
geometric means of tiny-finch and a trained RWKV-5.2 of 730 thousand parameters, which differ by factors of up to 3."""


def estimate_cost(name: str, weights: int, relative_error: float) -> float:
    """Estimate the loss of the predictions if this many weights have this relative error, in arbitrary units."""
    return (
        TYPICAL_SENSITIVITY["head.weight" if name == "head.weight" else name.split(".", 2)[2]]
        * weights
        * relative_error**2
    )


def compute_cost(weight: Tensor, matrix: QuantizedMatrix, importance: MatrixImportance) -> float:
    """Compute the loss of the predictions if `matrix` replaces `weight`, in nats per token, by the formula above."""
    rounded, total = matrix.dequantize(), 0.0
    inputs, outputs = importance.inputs.float(), importance.outputs.float()
    for start in range(0, weight.shape[0], ROW_CHUNK):
        error = rounded[start : start + ROW_CHUNK] - weight[start : start + ROW_CHUNK].float()
        total += float(outputs[start : start + ROW_CHUNK] @ (error.square() @ inputs))
    return total / 2


def choose_within_budget(gains: Mapping[str, float], prices: Mapping[str, int], budget: int) -> set[str]:
    """Choose the names with the largest sum of gains whose prices together do not exceed `budget`.

    The knapsack problem is solved exactly, with prices rounded up by at most a thousandth of the budget.
    """
    unit = max(budget, 0) / BUDGET_STEPS
    names = [name for name in gains if gains[name] > 0 and prices[name] <= budget]
    best = [0.0] * (BUDGET_STEPS + 1)
    taken: list[list[bool]] = []
    for name in names:
        price = int(-(-prices[name] // unit)) if unit else 0
        row = [False] * (BUDGET_STEPS + 1)
        for left in range(BUDGET_STEPS, price - 1, -1):
            if (gain := best[left - price] + gains[name]) > best[left]:
                best[left], row[left] = gain, True
        taken.append(row)
    left, chosen = BUDGET_STEPS, set()
    for name, row in zip(reversed(names), reversed(taken), strict=True):
        if row[left]:
            chosen.add(name)
            left -= int(-(-prices[name] // unit)) if unit else 0
    return chosen
