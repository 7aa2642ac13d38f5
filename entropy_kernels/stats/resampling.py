"""Two standard errors over prompts: from influence functions, and from leaving one prompt out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .samples import FloatArray


class Jackknife(NamedTuple):
    """Value at all prompts, its standard error, and the values without each prompt [B]."""

    value: float
    stderr: float
    replicates: FloatArray


def jackknife(totals_function: Callable[..., FloatArray], *per_prompt_arrays: FloatArray) -> Jackknife:
    """θ = f(Σ_n x_n),  θ₋ₙ = f(Σ_m x_m − x_n),  stderr² = (B−1)/B Σ_n (θ₋ₙ − θ̄)².

    The value is the plain f(total), not the jackknife's bias-corrected one.

    Args:
        totals_function: f; takes one array [..., *rest] of totals per array below and returns [...]: it is
            called once with the totals themselves and once with all B leave-one-out totals along a leading
            axis.
        per_prompt_arrays: float64 [B, *rest] each.

    Raises:
        UserError: fewer than two prompts, or arrays of different lengths.
    """
    check_prompt_count(*per_prompt_arrays)
    totals = [x.sum(axis=0) for x in per_prompt_arrays]
    # A prompt that carries all of a denominator gives NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(totals_function(*totals))
        replicates = totals_function(*(total - x for total, x in zip(totals, per_prompt_arrays, strict=True)))
    return Jackknife(value, jackknife_error(replicates), replicates)


def jackknife_error(replicates: FloatArray) -> float:
    """sqrt((B−1)/B Σ_n (θ₋ₙ − θ̄)²) of leave-one-out values [B]."""
    B = len(replicates)
    with np.errstate(invalid="ignore"):
        return float(np.sqrt((B - 1) / B * np.sum((replicates - replicates.mean()) ** 2)))


def influence_error(influence: FloatArray) -> float:
    """sqrt(B/(B−1) Σ_n IF_n²) of per-prompt influences [B] that sum to 0.

    Raises:
        UserError: fewer than two prompts.
    """
    B = check_prompt_count(influence)
    return float(np.sqrt(B / (B - 1) * np.sum(influence**2)))


def check_prompt_count(*per_prompt_arrays: FloatArray) -> int:
    """B, the common length.

    Raises:
        UserError: lengths differ, or B < 2.
    """
    lengths = {len(x) for x in per_prompt_arrays}
    if len(lengths) != 1:
        raise UserError(
            f"per-prompt arrays have lengths {sorted(lengths)}, expected one length: a paired comparison "
            "needs all sums from the same prompts."
        )
    (B,) = lengths
    if B < 2:
        raise UserError(
            f"the samples come from {B} prompt(s), expected 2 at least: prompts are the independent units, "
            "and one of them says nothing about the error. Draw from more prompts."
        )
    return B
