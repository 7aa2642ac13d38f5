r"""Two independent batches: how much of the error of δH₁ is E's, and how much the update's own (docs/theory.md, section 11).

    δH₁/η = X̄·Ȳ,   X_n the entropy gradient of prompt n of E,   Y_m the update of prompt m of U,

    V_X = Σ_n (X̃_n·Ȳ)²/(B_E(B_E−1)),   V_Y = Σ_m (X̄·Ỹ_m)²/(B_U(B_U−1)),   T = Σ_nm (X̃_n·Ỹ_m)²/(B_E B_U(B_E−1)(B_U−1)),

with a tilde for what is centred. Each of V_X, V_Y contains Tr(Σ_XΣ_Y)/(B_E B_U) once in the mean, and so does the truth: the unbiased
variance is V_X + V_Y − T. All are functions of the matrix Q_nm = X_n·Y_m. With AdamW v is not linear in U: given the update, the
error is √V_X with v for Ȳ, which is what `first_derivative` reports; V_Y and T then hold with the preconditioner frozen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate


class TwoBatch(NamedTuple):
    """X̄·Ȳ, with the error over new draws of both batches (NaN where the unbiased variance came out negative), and its parts.

    given_update: the error with U held fixed, √V_X; given_evaluation: with E held fixed, √V_Y.
    trace: T.
    """

    value: Estimate
    given_update: Estimate
    given_evaluation: Estimate
    trace: float


def two_batch(products: ArrayLike, *, unit: str) -> TwoBatch:
    """X̄·Ȳ with V_X, V_Y and the trace term.

    Args:
        products: Q_nm = X_n·Y_m, [B_E, B_U]: such that its mean is δH₁/η.
        unit: of its mean.

    Raises:
        UserError: not a matrix, or fewer than two prompts on either side.
    """
    Q = np.asarray(products, dtype=np.float64)
    if Q.ndim != 2 or min(Q.shape) < 2:
        raise UserError(
            f"products has shape {Q.shape}, expected [prompts of E, prompts of U] with two prompts each at least."
        )
    B_E, B_U = Q.shape
    rows, columns, value = Q.mean(axis=1), Q.mean(axis=0), float(Q.mean())
    V_X = float(np.sum((rows - value) ** 2)) / (B_E * (B_E - 1))
    V_Y = float(np.sum((columns - value) ** 2)) / (B_U * (B_U - 1))
    both = Q - rows[:, None] - columns[None, :] + value
    T = float(np.sum(both**2)) / (B_E * B_U * (B_E - 1) * (B_U - 1))
    V = V_X + V_Y - T
    return TwoBatch(
        value=_estimate(
            value,
            math.sqrt(V) if V >= 0 else math.nan,
            min(B_E, B_U),
            unit,
            "new draws of both batches, trace taken off once",
        ),
        given_update=_estimate(value, math.sqrt(V_X), B_E, unit, "new draws of E, the update held fixed"),
        given_evaluation=_estimate(
            value, math.sqrt(V_Y), B_U, unit, "new draws of U, E and the preconditioner held fixed"
        ),
        trace=T,
    )


def without_trace(first: Estimate, influence_of_update: ArrayLike) -> tuple[Estimate, Estimate]:
    """What is left of `two_batch` without the matrix: (√V_Y, √(V_X + V_Y)) from the row of U's prompts alone.

    With T not known the sum counts Tr(Σ_XΣ_Y)/(B_E B_U) twice: it is too large by that in the mean.

    Args:
        first: X̄·v with the error given the update, √V_X.
        influence_of_update: X̄·Y_m/B_U of each prompt of U, [B_U]: they add up to the gradient's part of X̄·v.

    Raises:
        UserError: fewer than two prompts.
    """
    q = np.asarray(influence_of_update, dtype=np.float64)
    if q.ndim != 1 or len(q) < 2:
        raise UserError(
            f"influence_of_update has shape {q.shape}, expected one number for each of two prompts of U at least."
        )
    V_Y = len(q) / (len(q) - 1) * float(np.sum((q - q.mean()) ** 2))
    over = "new draws of U, E and the preconditioner held fixed"
    both = "new draws of both batches, the trace counted twice (an upper bound in the mean)"
    return (
        _estimate(first.value, math.sqrt(V_Y), len(q), first.unit, over),
        _estimate(first.value, math.sqrt(first.stderr**2 + V_Y), min(len(q), first.n), first.unit, both),
    )


def _estimate(value: float, stderr: float, n: int, unit: str, over: str) -> Estimate:
    return Estimate(
        value=value, stderr=stderr, n=n, unit=unit, method=f"product of two batch means; error over {over}"
    )
