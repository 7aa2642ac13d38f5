r"""Truth against prediction on the same samples (docs/theory.md, sections 5 to 7).

    δH₁ = η h'(0),   δH₂ = ½ η² h''(0),   z_linear = (ΔH − δH₁)/stderr(ΔH − δH₁)

All are functions of the same per-prompt totals, so one leave-one-out pass gives every error, that of each
difference included: what truth and prediction share drops out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .ratio import ERROR, METHOD, arrays_first, arrays_second, first_of, second_of
from .resampling import Jackknife, check_prompt_count, jackknife, jackknife_error
from .samples import FloatArray, PromptSums
from .truth import ChangeSums, change_arrays, change_of, integral_of, node_arrays


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Truth, predictions and their paired differences at one η; errors are jackknives over prompts.

    quadratic, minus_quadratic are None and z_quadratic NaN when the sums at 0 hold no second derivatives.
    """

    eta: float
    change: Estimate  # ΔH
    linear: Estimate  # δH₁
    quadratic: Estimate | None  # δH₁ + δH₂
    minus_linear: Estimate  # ΔH − δH₁
    minus_quadratic: Estimate | None  # ΔH − δH₁ − δH₂

    @property
    def z_linear(self) -> float:
        """(ΔH − δH₁) over its paired error; NaN when both are exactly 0."""
        return self.minus_linear.z_score()

    @property
    def z_quadratic(self) -> float:
        """(ΔH − δH₁ − δH₂) over its paired error; NaN when both are exactly 0 or there is no second order."""
        return self.minus_quadratic.z_score() if self.minus_quadratic is not None else np.nan


def compare_direct(change: ChangeSums, base: PromptSums, eta: float) -> Comparison:
    """The direct difference at eta against its linear and quadratic prediction.

    Args:
        change: change_sums at eta.
        base: prompt_sums at η = 0 with tangents, and curvature for the quadratic.
        eta: the learning rate η.

    Raises:
        UserError: change and base of different prompts or kinds, no first derivatives, fewer than two
            prompts.
    """
    check_same_kind(change, base)
    return _compare(change_of, change_arrays(change), base, eta, "direct difference")


def compare_integrated(
    node_sums: Sequence[PromptSums], weights: ArrayLike, base: PromptSums, eta: float
) -> Comparison:
    """The integrated change at eta against its linear and quadratic prediction.

    Args:
        node_sums: J prompt_sums with tangents, at the nodes.
        weights: [J], the row of integral_weights for eta.
        base: prompt_sums at η = 0 with tangents, and curvature for the quadratic.
        eta: the learning rate η.

    Raises:
        UserError: sums of different prompts or kinds, no first derivatives, fewer than two prompts.
    """
    W, arrays = node_arrays(node_sums, weights)
    check_same_kind(node_sums[0], base)
    how = f"derivative integrated over {len(W)} nodes"
    return _compare(lambda *totals: integral_of(W, *totals), arrays, base, eta, how)


def _compare(
    truth_of: Callable[..., FloatArray],
    truth_arrays: tuple[FloatArray, ...],
    base: PromptSums,
    eta: float,
    how: str,
) -> Comparison:
    def linear_of(*totals: FloatArray) -> FloatArray:
        return eta * first_of(*totals[:4])

    def quadratic_of(*totals: FloatArray) -> FloatArray:
        return linear_of(*totals) + eta**2 / 2 * second_of(*totals)

    def named(value: float, replicates: FloatArray, name: str) -> Estimate:
        method = f"{METHOD[base.estimator]}, {name}; {ERROR['jackknife']}"
        stderr = jackknife_error(replicates)
        return Estimate(value=value, stderr=stderr, n=len(replicates), unit=base.unit, method=method)

    def against(prediction: Jackknife, name: str) -> tuple[Estimate, Estimate]:
        # Replicate by replicate the same prompt is left out of both, which is what makes the difference paired.
        difference = named(
            truth.value - prediction.value, truth.replicates - prediction.replicates, f"{how} minus {name}"
        )
        return named(prediction.value, prediction.replicates, name), difference

    check_prompt_count(*truth_arrays, *arrays_first(base))
    truth = jackknife(truth_of, *truth_arrays)
    linear, minus_linear = against(jackknife(linear_of, *arrays_first(base)), "linear prediction")
    quadratic, minus_quadratic = None, None
    if base.d2_numerator is not None:
        quadratic, minus_quadratic = against(
            jackknife(quadratic_of, *arrays_second(base)), "quadratic prediction"
        )
    return Comparison(
        eta=eta,
        change=named(truth.value, truth.replicates, how),
        linear=linear,
        quadratic=quadratic,
        minus_linear=minus_linear,
        minus_quadratic=minus_quadratic,
    )


def check_same_kind(truth: ChangeSums | PromptSums, base: PromptSums) -> None:
    """Refuse pairs that are not matched.

    Raises:
        UserError: per or estimator differ.
    """
    if (truth.per, truth.estimator) != (base.per, base.estimator):
        raise UserError(
            f"the truth is {truth.estimator} per {truth.per}, base is {base.estimator} per {base.per}, "
            "expected the same: only matched pairs can be compared on the same samples."
        )
