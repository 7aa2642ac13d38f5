"""The difference of two estimates: on the same prompts paired, else with errors in quadrature."""

from __future__ import annotations

import math

import numpy as np

from ..errors import UserError
from .estimate import Estimate
from .resampling import check_prompt_count, influence_error
from .samples import FloatArray


def paired_difference(a: Estimate, b: Estimate, pull_a: FloatArray, pull_b: FloatArray) -> Estimate:
    """b − a with the error of IF_b − IF_a, prompt by prompt: what both share drops out.

    Args:
        a: subtracted.
        b: from which it is subtracted.
        pull_a: influences of a over the prompts of both, [B].
        pull_b: those of b, the same prompts in the same order.

    Raises:
        UserError: other units, numbers of prompts that differ, or fewer than two.
    """
    _check_units(a, b)
    B = check_prompt_count(np.asarray(pull_a), np.asarray(pull_b))
    stderr = influence_error(np.asarray(pull_b) - np.asarray(pull_a))
    return Estimate(
        value=b.value - a.value, stderr=stderr, n=B, unit=a.unit, method="difference, paired over prompts"
    )


def unpaired_difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a of independent estimates, errors in quadrature; n is that of the smaller sample.

    Raises:
        UserError: other units.
    """
    _check_units(a, b)
    return Estimate(
        value=b.value - a.value,
        stderr=math.hypot(a.stderr, b.stderr),
        n=min(a.n, b.n),
        unit=a.unit,
        method="difference, errors in quadrature",
    )


def _check_units(a: Estimate, b: Estimate) -> None:
    if a.unit != b.unit:
        raise UserError(
            f"a difference of {a.unit!r} and {b.unit!r} means nothing; expected two estimates of one unit."
        )
