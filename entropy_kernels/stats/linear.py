r"""Predictions from the derivatives at 0 and how far they reach (docs/theory.md, sections 6 and 7).

    δH₁ = η h',   δH₁ + δH₂ = η h' + ½ η² h'',   η* = 2 |h'|/|h''|, where the second order equals the first.

Interval of η*: Fieller's set of all ratios ρ that the data do not reject as h' − ρ h'' = 0,

    (h' − ρ h'')² ≤ t² (V₁₁ − 2ρ V₁₂ + ρ² V₂₂),

with V from the influence functions of h' and h'' over the same prompts. It is chosen over a jackknife or
bootstrap interval because η* is a ratio with a denominator that may well be 0 within its error: the
linearised interval then has a finite length and no coverage, while this set becomes unbounded, which is what
"not resolved" means.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .estimate import Estimate, student_quantile
from .ratio import ERROR, METHOD, first_derivative, influence_first, influence_second, second_derivative
from .resampling import check_prompt_count, influence_error
from .samples import PromptSums


@dataclass(frozen=True, kw_only=True)
class EtaStar:
    """η* = 2|h'|/|h''| with its interval.

    Attributes:
        value: the plain ratio, which means little when not resolved; inf when h'' = 0.
        low: lower end of the interval; 0 where h' itself is not distinguishable from 0.
        high: upper end; inf when not resolved.
        level: nominal coverage of [low, high].
        resolved: whether h'' is distinguishable from 0 at that level.
        n: number of prompts.
        unit: "eta".
        method: how it was obtained.
    """

    value: float
    low: float
    high: float
    level: float
    resolved: bool
    n: int
    unit: str
    method: str

    def to_json(self) -> dict[str, Any]:
        """A dict of plain Python scalars; NaN and infinities stay floats."""
        return asdict(self)

    def __str__(self) -> str:
        """The value with its interval, or the lower bound when not resolved."""
        percent = f"{100 * self.level:g} %"
        if self.resolved:
            return f"{self.value:.3g} ({percent}: {self.low:.3g} to {self.high:.3g})"
        return f"not resolved ({percent}: above {self.low:.3g})"


def linear_change(sums: PromptSums, eta: float) -> Estimate:
    """δH₁ = η h'(0), nats per token or sequence, influence-function error.

    Args:
        sums: prompt_sums at η = 0 with tangents.
        eta: the learning rate.

    Raises:
        UserError: no first derivatives, or fewer than two prompts.
    """
    first = first_derivative(sums)
    method = f"{METHOD[sums.estimator]}, linear prediction; {ERROR['influence']}"
    return Estimate(
        value=eta * first.value, stderr=abs(eta) * first.stderr, n=first.n, unit=sums.unit, method=method
    )


def quadratic_change(sums: PromptSums, eta: float) -> Estimate:
    """δH₁ + δH₂ = η h'(0) + ½ η² h''(0), nats per token or sequence, influence-function error of the sum.

    Args:
        sums: prompt_sums at η = 0 with tangents and curvature.
        eta: the learning rate.

    Raises:
        UserError: no second derivatives, or fewer than two prompts.
    """
    second, first = second_derivative(sums), first_derivative(sums)
    return Estimate(
        value=eta * first.value + eta**2 / 2 * second.value,
        stderr=influence_error(eta * influence_first(sums) + eta**2 / 2 * influence_second(sums)),
        n=first.n,
        unit=sums.unit,
        method=f"{METHOD[sums.estimator]}, quadratic prediction; {ERROR['influence']}",
    )


def eta_star(sums: PromptSums, *, level: float = 0.95) -> EtaStar:
    """η* = 2|h'|/|h''| with Fieller's interval, or not resolved when h'' may be 0.

    Args:
        sums: prompt_sums at η = 0 with tangents and curvature.
        level: coverage wanted, strictly between 0 and 1.

    Raises:
        UserError: no second derivatives, fewer than two prompts, or level outside (0, 1).
    """
    second, first = second_derivative(sums), first_derivative(sums)
    IF1, IF2 = influence_first(sums), influence_second(sums)
    B = check_prompt_count(IF1, IF2)
    V11, V12, V22 = (B / (B - 1) * float(np.sum(a * b)) for a, b in ((IF1, IF1), (IF1, IF2), (IF2, IF2)))
    low, high = fieller_reach(first.value, second.value, V11, V12, V22, student_quantile(level, B - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(2 * np.abs(np.float64(first.value)) / np.abs(second.value))
    return EtaStar(
        value=value,
        low=2 * low,
        high=2 * high,
        level=level,
        resolved=math.isfinite(high),
        n=B,
        unit="eta",
        method=f"2|h'|/|h''|, {METHOD[sums.estimator]}; Fieller interval, {ERROR['influence']}",
    )


def fieller_reach(a: float, b: float, V11: float, V12: float, V22: float, t: float) -> tuple[float, float]:
    """Least and greatest |ρ| with (a − ρb)² ≤ t²(V11 − 2ρV12 + ρ²V22); inf where unbounded.

    As q₂ρ² − 2q₁ρ + q₀ ≤ 0 with q₂ = b² − t²V22, q₁ = ab − t²V12, q₀ = a² − t²V11; the discriminant
    q₁² − q₂q₀ is t²[b²V11 − 2abV12 + a²V22 − t²(V11V22 − V12²)]: a²b² has dropped out. NaN for NaN.
    """
    q2, q1, q0 = b**2 - t**2 * V22, a * b - t**2 * V12, a**2 - t**2 * V11
    if math.isnan(q2 + q1 + q0):
        return math.nan, math.nan
    includes_zero = q0 <= 0
    discriminant = t**2 * (b**2 * V11 - 2 * a * b * V12 + a**2 * V22 - t**2 * (V11 * V22 - V12**2))
    if q2 <= 0 and (includes_zero or discriminant < 0):
        return 0.0, math.inf
    # Roots as (q₁ ± √)/q₂ and q₀/(q₁ ± √), each from the sum that does not cancel.
    larger = q1 + math.copysign(math.sqrt(max(discriminant, 0.0)), q1)
    nearer = abs(q0 / larger) if larger else (math.inf if q0 > 0 else 0.0)
    ends = (nearer, abs(larger / q2) if q2 else math.inf)
    if q2 <= 0:  # all but an open interval around 0 (or a half-line), whose nearer end bounds |ρ| from below
        return min(ends), math.inf
    return (0.0 if includes_zero else min(ends)), max(ends)
