r"""Rao-Blackwell, Monte Carlo, and the best mix of the two (docs/theory.md, section 4).

    h = Σ_n [A_n + c M_n]/Σ_n D_n,   A = ΣH_k,   M = Σ(Z_k − H_k),   Z_k = −S_k,

per prompt n. c = 0 is Rao-Blackwell, c = 1 is Monte Carlo, and as E[M] = 0 every fixed c is right. The variance is least at

    c* = −Cov(A − h D, M)/Var(M)      over prompts,

which need not be 0: H_k of later tokens depend on earlier ones, so that −ΣS can vary less than ΣH. c is fitted on other prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .resampling import influence_error, jackknife
from .samples import (
    FloatArray,
    Per,
    TokenValues,
    by_prompt,
    check_mask,
    check_names,
    check_prompts,
    counted,
    on_mask,
)

FOLDS = 5


class Mix(NamedTuple):
    """Three estimates of h on the same prompts, the coefficients c of each fold, and variances relative to Rao-Blackwell's."""

    rao_blackwell: Estimate
    monte_carlo: Estimate
    best_mix: Estimate
    coefficients: tuple[float, ...]
    monte_carlo_variance_ratio: Estimate
    best_mix_variance_ratio: Estimate


def best_mix(
    values: TokenValues, mask: ArrayLike, prompt_index: ArrayLike, *, per: Per, folds: int = FOLDS
) -> Mix:
    """Rao-Blackwell, Monte Carlo and their best mix at η = 0, nats per token or sequence.

    Args:
        values: H and S at η = 0, nats, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.
        per: "token" or "sequence".
        folds: prompts are dealt into so many parts; c on a part is fitted on the others.

    Returns:
        Mix; errors from influence functions over prompts with c held fixed, those of the ratios by jackknife.

    Raises:
        UserError: shapes, dtypes or names do not fit, or fewer than four prompts.
    """
    check_names(per, "per_decision")
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    if B < 4:
        raise UserError(
            f"the samples come from {B} prompt(s), expected 4 at least: the mix is fitted on other prompts than it is used on."
        )
    H, Z = on_mask(values.entropy, mask, "values.entropy"), -on_mask(values.logprob, mask, "values.logprob")
    A, M, D = (by_prompt(x.sum(axis=1), inverse, B) for x in (H, Z - H, counted(mask, per)))
    fold = np.arange(B) % min(folds, B)
    c = np.array([best_coefficient(*(x[fold != f] for x in (A, M, D))) for f in range(fold.max() + 1)])

    plain, plain_pull = _ratio(A, D, per, "Rao-Blackwell, sum of entropies")
    raw, raw_pull = _ratio(A + M, D, per, "Monte Carlo, minus the sum of log-probs")
    mixed, mixed_pull = _ratio(A + c[fold] * M, D, per, "best mix of both, cross-fitted")
    return Mix(
        plain,
        raw,
        mixed,
        tuple(map(float, c)),
        _relative(raw_pull, plain_pull),
        _relative(mixed_pull, plain_pull),
    )


def best_coefficient(A: FloatArray, M: FloatArray, D: FloatArray) -> float:
    """c* = −Cov(A − hD, M)/Var(M) over prompts, h = ΣA/ΣD; NaN where M does not vary."""
    own = A - A.sum() / D.sum() * D
    centred = M - M.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(-np.sum(own * centred) / np.sum(centred**2))


def _ratio(N: FloatArray, D: FloatArray, per: Per, method: str) -> tuple[Estimate, FloatArray]:
    h = N.sum() / D.sum()
    pull = (N - h * D) / D.sum()
    made = f"{method}; influence functions over prompts"
    return Estimate(
        value=float(h), stderr=influence_error(pull), n=len(N), unit=f"nats/{per}", method=made
    ), pull


def _relative(mine: FloatArray, reference: FloatArray) -> Estimate:
    value, stderr, _ = jackknife(lambda a, b: a / b, mine**2, reference**2)
    method = "ratio of variances, from influence functions; jackknife over prompts"
    return Estimate(value=value, stderr=stderr, n=len(mine), unit="1", method=method)
