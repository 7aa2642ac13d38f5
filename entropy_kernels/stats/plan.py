r"""How many prompts for a wanted standard error, from a pilot (docs/theory.md, section 11).

Let e_i be N times the influence of sequence i on ĥ', N sequences in all, so that ĥ' moves like the mean of e. With G responses to each
of B prompts,

    Var(ĥ') = V(G)/B,   V(G) = σ_b² + σ_w²/G,

σ_b² between prompts and σ_w² within them, from the pilot's sums of squares: SS_w/(N − B) has mean σ_w² and SS_b/(B − 1) has mean
σ_w² + n₀σ_b², n₀ = (N − ΣG_n²/N)/(B − 1), which is G for equal groups. A standard error s then takes B = V(G)/s² prompts. V is itself
an estimate, with a jackknife error over prompts: the interval treats it as χ² with the degrees of freedom 2V²/stderr² that match.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import chdtri

from ..errors import UserError
from .estimate import Estimate
from .resampling import jackknife
from .samples import FloatArray, by_prompt


class Components(NamedTuple):
    """Per-prompt sums behind σ_b² and σ_w², float64 [B] each."""

    responses: FloatArray  # G_n
    total: FloatArray  # Σ_i e_i
    square_of_mean: FloatArray  # G_n ē_n²
    within: FloatArray  # Σ_i (e_i − ē_n)²


class Needed(NamedTuple):
    """What a standard error takes with G responses per prompt; NaN where the pilot does not resolve V(G) from 0.

    prompts: number B, not rounded. low, high: its interval of 95 %, from the pilot's own uncertainty.
    """

    group_size: int
    prompts: float
    low: float
    high: float


def components(influence: ArrayLike, prompt_index: ArrayLike) -> Components:
    """Sums of squares of e_i = N·influence_i within and between prompts.

    Args:
        influence: [N], of every sequence on ĥ' (influence_first with each sequence as a prompt of its own).
        prompt_index: integers [N], equal for sequences of the same prompt.

    Raises:
        UserError: shapes do not fit, or fewer than three prompts.
    """
    e, index = np.asarray(influence, dtype=np.float64), np.asarray(prompt_index)
    if e.ndim != 1 or index.shape != e.shape:
        raise UserError(f"influence has shape {e.shape}, prompt_index {index.shape}; expected both [N].")
    _, inverse = np.unique(index, return_inverse=True)
    G = np.bincount(inverse).astype(np.float64)
    if len(G) < 3:
        raise UserError(
            f"the pilot has {len(G)} prompt(s), expected 3 at least, to know how noisy it is itself."
        )
    e = e * len(e)
    total = by_prompt(e, inverse, len(G))
    mean = total / G
    return Components(G, total, G * mean**2, by_prompt((e - mean[inverse]) ** 2, inverse, len(G)))


def within_variance(parts: Components) -> Estimate:
    """σ_w², between responses to one prompt; jackknife error over prompts. NaN where each prompt has a single response."""
    value, stderr, _ = jackknife(lambda *t: _within(*t), *_arrays(parts))
    return _estimate(value, stderr, parts, "variance between responses to one prompt")


def prompt_variance(parts: Components, group_size: int) -> Estimate:
    """V(G) = σ_b² + σ_w²/G, the variance of a prompt's share of ĥ'; jackknife error over prompts.

    Args:
        parts: from components.
        group_size: G. With a single response per prompt in the pilot, 1 is all it can tell; others are NaN.

    Raises:
        UserError: group_size below 1.
    """
    if group_size < 1:
        raise UserError(f"group_size is {group_size}, expected at least 1 response per prompt.")
    single = bool((parts.responses == 1).all())

    def of_totals(*totals: FloatArray) -> FloatArray:
        B, G, G2, e, square, _ = totals
        between = (square - e**2 / G) / (B - 1)
        if single:
            return between if group_size == 1 else np.full_like(between, np.nan)
        within = _within(*totals)
        n0 = (G - G2 / G) / (B - 1)
        return (between - within) / n0 + within / group_size

    value, stderr, _ = jackknife(of_totals, *_arrays(parts))
    return _estimate(value, stderr, parts, f"variance of a prompt with {group_size} responses")


def prompts_needed(parts: Components, group_size: int, stderr: float) -> Needed:
    """B = V(G)/s² with its interval.

    Args:
        parts: from components.
        group_size: G.
        stderr: s, the wanted standard error, in the unit of the influences.

    Raises:
        UserError: group_size below 1, or stderr not positive.
    """
    if not stderr > 0:
        raise UserError(f"stderr is {stderr}, expected a positive standard error.")
    V = prompt_variance(parts, group_size)
    if not V.value > 0:
        return Needed(group_size, math.nan, math.nan, math.nan)
    B = V.value / stderr**2
    freedom = 2 * (V.value / V.stderr) ** 2 if V.stderr else math.inf
    if math.isinf(freedom):
        return Needed(group_size, B, B, B)
    low, high = (B * freedom / float(chdtri(freedom, p)) for p in (0.025, 0.975))  # upper-tail quantiles
    return Needed(group_size, B, low, high)


def _within(
    B: FloatArray, G: FloatArray, G2: FloatArray, e: FloatArray, square: FloatArray, SS: FloatArray
) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return SS / (G - B)


def _arrays(parts: Components) -> tuple[FloatArray, ...]:
    """1, G, G², Σe, Gē², SS_w per prompt: all that the variances need as totals."""
    G = parts.responses
    return np.ones_like(G), G, G**2, parts.total, parts.square_of_mean, parts.within


def _estimate(value: float, stderr: float, parts: Components, what: str) -> Estimate:
    return Estimate(
        value=value,
        stderr=stderr,
        n=len(parts.responses),
        unit="unit of the influences, squared",
        method=f"{what}, sums of squares; jackknife over prompts",
    )
