r"""h = N/D and its two derivatives with standard errors over prompts (docs/theory.md, sections 5 to 7).

    h' = (N' − h D')/D,      h'' = (N'' − 2 h' D' − h D'')/D.

Each is a smooth function of totals, so its error is that of its linearisation: the influence of prompt n is
the differential with every total's d set to the prompt's own share. Differentiating D h = N, D h' = N' − h D'
and D h'' = N'' − 2 h' D' − h D'' in turn gives

    IF  = (N_n − h D_n)/D
    IF' = (N'_n − h D'_n − h' D_n − D' IF)/D
    IF''= (N''_n − 2 h' D'_n − h D''_n − h'' D_n − 2 D' IF' − D'' IF)/D

each of which sums to 0 over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from ..errors import UserError
from .estimate import Estimate
from .resampling import check_prompt_count, influence_error, jackknife
from .samples import FloatArray, PromptSums

ErrorKind = Literal["influence", "jackknife"]

METHOD = {
    "per_decision": "per-decision importance sampling",
    "whole_sequence": "whole-sequence importance sampling",
    "path": "path part, sampling weights held at 1",
}
ERROR = {"influence": "influence functions over prompts", "jackknife": "jackknife over prompts"}


def entropy(sums: PromptSums, *, error: ErrorKind = "influence") -> Estimate:
    """The entropy h = ΣN/ΣD, nats per token or per sequence.

    Args:
        sums: per-prompt sums at any η.
        error: "influence" or "jackknife", both over prompts.

    Raises:
        UserError: fewer than two prompts, or an unknown error.
    """
    return estimate(entropy_of, influence_entropy, sums, arrays_entropy(sums), sums.unit, error)


def first_derivative(sums: PromptSums, *, error: ErrorKind = "influence") -> Estimate:
    """The derivative h' = (N' − h D')/D, nats per token or sequence and unit η.

    Args:
        sums: per-prompt sums at any η, with first derivatives.
        error: "influence" or "jackknife", both over prompts.

    Raises:
        UserError: fewer than two prompts, sums without first derivatives, or an unknown error.
    """
    return estimate(first_of, influence_first, sums, arrays_first(sums), f"{sums.unit} per unit eta", error)


def second_derivative(sums: PromptSums, *, error: ErrorKind = "influence") -> Estimate:
    """The curvature h'' = (N'' − 2h'D' − hD'')/D, nats per token or sequence and unit η².

    Args:
        sums: per-prompt sums at any η, with first and second derivatives.
        error: "influence" or "jackknife", both over prompts.

    Raises:
        UserError: fewer than two prompts, sums without second derivatives, or an unknown error.
    """
    return estimate(
        second_of, influence_second, sums, arrays_second(sums), f"{sums.unit} per unit eta^2", error
    )


def influence_entropy(sums: PromptSums) -> FloatArray:
    """IF_n = (N_n − h D_n)/D, [B]: how much prompt n pulls h."""
    N, D = arrays_entropy(sums)
    return (N - entropy_of(N.sum(), D.sum()) * D) / D.sum()


def influence_first(sums: PromptSums) -> FloatArray:
    """IF'_n = (N'_n − hD'_n − h'D_n − D'·IF_n)/D, [B]: how much prompt n pulls h'.

    Raises:
        UserError: sums without first derivatives.
    """
    N, D, N1, D1 = arrays_first(sums)
    totals = [x.sum() for x in (N, D, N1, D1)]
    h, h1 = entropy_of(*totals[:2]), first_of(*totals)
    return (N1 - h * D1 - h1 * D - D1.sum() * influence_entropy(sums)) / D.sum()


def influence_second(sums: PromptSums) -> FloatArray:
    """IF''_n = (N''_n − 2h'D'_n − hD''_n − h''D_n − 2D'·IF'_n − D''·IF_n)/D, [B]: its pull on h''.

    Raises:
        UserError: sums without second derivatives.
    """
    N, D, N1, D1, N2, D2 = arrays_second(sums)
    totals = [x.sum() for x in (N, D, N1, D1, N2, D2)]
    h, h1, h2 = entropy_of(*totals[:2]), first_of(*totals[:4]), second_of(*totals)
    own = N2 - 2 * h1 * D1 - h * D2 - h2 * D
    return (own - 2 * D1.sum() * influence_first(sums) - D2.sum() * influence_entropy(sums)) / D.sum()


# --- the same as functions of totals, any leading axes -----------------------------------------------------


def entropy_of(N: FloatArray, D: FloatArray) -> FloatArray:
    """N/D."""
    return N / D


def first_of(N: FloatArray, D: FloatArray, N1: FloatArray, D1: FloatArray) -> FloatArray:
    """(N' − hD')/D."""
    return (N1 - N / D * D1) / D


def second_of(
    N: FloatArray, D: FloatArray, N1: FloatArray, D1: FloatArray, N2: FloatArray, D2: FloatArray
) -> FloatArray:
    """(N'' − 2h'D' − hD'')/D."""
    return (N2 - 2 * first_of(N, D, N1, D1) * D1 - N / D * D2) / D


def arrays_entropy(sums: PromptSums) -> tuple[FloatArray, ...]:
    """(N, D), each [B]."""
    return sums.numerator, sums.denominator


def arrays_first(sums: PromptSums) -> tuple[FloatArray, ...]:
    """(N, D, N', D'), each [B].

    Raises:
        UserError: sums without first derivatives.
    """
    if sums.d_numerator is None or sums.d_denominator is None:
        raise UserError("sums hold no first derivatives: give prompt_sums the tangents at that point.")
    return sums.numerator, sums.denominator, sums.d_numerator, sums.d_denominator


def arrays_second(sums: PromptSums) -> tuple[FloatArray, ...]:
    """(N, D, N', D', N'', D''), each [B].

    Raises:
        UserError: sums without second derivatives.
    """
    if sums.d2_numerator is None or sums.d2_denominator is None:
        raise UserError(
            "sums hold no second derivatives: give prompt_sums tangents and curvature at that point."
        )
    return *arrays_first(sums), sums.d2_numerator, sums.d2_denominator


def estimate(
    of_totals: Callable[..., FloatArray],
    influence: Callable[[PromptSums], FloatArray],
    sums: PromptSums,
    arrays: tuple[FloatArray, ...],
    unit: str,
    error: ErrorKind,
) -> Estimate:
    """The value of a function of totals with the error asked for."""
    B = check_prompt_count(*arrays)
    check_error(error)
    if error == "jackknife":
        value, stderr, _ = jackknife(of_totals, *arrays)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # a vanished denominator is NaN, not a warning
            value = float(of_totals(*(x.sum() for x in arrays)))
            stderr = influence_error(influence(sums))
    return Estimate(
        value=value, stderr=stderr, n=B, unit=unit, method=f"{METHOD[sums.estimator]}; {ERROR[error]}"
    )


def check_error(error: str) -> None:
    """Refuse unknown kinds of standard error.

    Raises:
        UserError: neither "influence" nor "jackknife".
    """
    if error not in ERROR:
        raise UserError(f"error is {error!r}, expected one of {', '.join(map(repr, ERROR))}.")
