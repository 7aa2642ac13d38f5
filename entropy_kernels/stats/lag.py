r"""The lag profile: how far ahead a token's change reaches, and where noise overtakes signal (docs/theory.md, section 6).

    h'(0) = path + Σ_{d≥1} ℓ_d,   path = Σ H'/D,   ℓ_d = Σ_k (H_{k+d} − h c_{k+d}) S'_k / D,

the per-decision estimator with b = 0, its score part sorted by the distance d between the token that changes and the entropy it
acts on. A sum with weights on lags, such as 1 up to a horizon or γ^d, is biased with a far smaller error; its bias is estimated by
its paired difference from the full sum.

With a_n, D_n prompt n's sum and count, and C = Σ_d ω_d Σ_k c_{k+d} S'_k through which h acts, the influence of prompt n on a
weighted sum f = Σ_d ω_d ℓ_d is IF_n[f] = (a_n − h C_n − f D_n − C IF_n[h])/D.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .estimate import Estimate
from .resampling import check_prompt_count, influence_error
from .samples import (
    FloatArray,
    Per,
    TokenTangents,
    TokenValues,
    by_prompt,
    check_mask,
    check_names,
    check_prompts,
    counted,
    on_mask,
)

DISCOUNTS = (0.5, 0.8, 0.9, 0.95, 0.99)
_FULL = "per-decision importance sampling"
_ERROR = "influence functions over prompts"


class LagSums(NamedTuple):
    """Per-prompt sums, float64: everything a weighted sum over lags needs."""

    entropy: FloatArray  # Σ H, [B]
    counted: FloatArray  # Σ c, [B]
    path: FloatArray  # Σ H', [B]
    score_entropy: FloatArray  # Σ_k H_{k+d} S'_k, [B, L], column d − 1
    score_count: FloatArray  # Σ_k c_{k+d} S'_k, [B, L]
    per: Per


class Truncated(NamedTuple):
    """A weighted sum over lags, the path part included, beside its estimated bias (itself minus the full sum, a paired error)."""

    value: Estimate
    bias: Estimate


class Lags(NamedTuple):
    """Lags from `first` to `last`: their part of h', and the sum of path and all lags up to `last`."""

    first: int
    last: int
    part: Estimate
    up_to: Truncated


class LagProfile(NamedTuple):
    """The unbiased figure, its path part, lags, and discounted sums (γ, sum)."""

    full: Estimate
    path: Estimate
    lags: list[Lags]
    discounted: list[tuple[float, Truncated]]


def lag_sums(
    base: TokenValues, tangents: TokenTangents, mask: ArrayLike, prompt_index: ArrayLike, *, per: Per
) -> LagSums:
    """Sums per prompt and lag at η = 0.

    Args:
        base: H and S at η = 0, nats, [N, T]; S is not read.
        tangents: H' and S' at η = 0, nats per unit η, [N, T].
        mask: bool [N, T], True on response tokens, which are neighbours within a row.
        prompt_index: integers [N], equal for sequences of the same prompt.
        per: "token" or "sequence".

    Raises:
        UserError: shapes, dtypes or names do not fit, or a row without a response token.
    """
    check_names(per, "per_decision")
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    H, c = on_mask(base.entropy, mask, "base.entropy"), counted(mask, per)
    H1, S1 = (on_mask(x, mask, f"tangents.{name}") for name, x in tangents._asdict().items())

    def totals(x: FloatArray) -> FloatArray:
        return by_prompt(x.sum(axis=1), inverse, B)

    longest = int(mask.sum(axis=1).max())
    lags = [(totals(H[:, d:] * S1[:, :-d]), totals(c[:, d:] * S1[:, :-d])) for d in range(1, longest)]
    scores = np.array(lags).reshape(-1, 2, B).T
    return LagSums(totals(H), totals(c), totals(H1), scores[:, 0], scores[:, 1], per)


def weighted_lags(sums: LagSums, weights: ArrayLike, *, path: bool = True) -> tuple[float, FloatArray]:
    """(f, IF [B]) of f = [path +] Σ_d ω_d ℓ_d.

    Args:
        sums: from lag_sums.
        weights: ω [L], of lags 1 to L.
        path: whether the path part is included.
    """
    omega = np.asarray(weights, dtype=np.float64)
    H, D = sums.entropy.sum(), sums.counted.sum()
    h = H / D
    a, C = sums.score_entropy @ omega + (sums.path if path else 0.0), sums.score_count @ omega
    f = float((a.sum() - h * C.sum()) / D)
    pull = (sums.entropy - h * sums.counted) / D
    return f, (a - h * C - f * sums.counted - C.sum() * pull) / D


def truncated(sums: LagSums, weights: ArrayLike, what: str) -> Truncated:
    """Path + Σ_d ω_d ℓ_d and its estimated bias, each with its error.

    Args:
        sums: from lag_sums.
        weights: ω [L].
        what: the weights in words, for the method.

    Raises:
        UserError: fewer than two prompts.
    """
    f, pull = weighted_lags(sums, weights)
    full, full_pull = weighted_lags(sums, np.ones(sums.score_entropy.shape[1]))
    biased = f"{_FULL}, {what}: biased; {_ERROR}"
    difference = f"{what} minus all lags, paired; {_ERROR}"
    return Truncated(
        _estimate(f, pull, sums, biased), _estimate(f - full, pull - full_pull, sums, difference)
    )


def lag_profile(
    base: TokenValues, tangents: TokenTangents, mask: ArrayLike, prompt_index: ArrayLike, *, per: Per
) -> LagProfile:
    """The lag profile with cumulative and discounted sums. Lags are single up to 16, then in groups that grow by a quarter.

    Args and errors are those of lag_sums, and fewer than two prompts.

    Returns:
        LagProfile, nats per token or sequence and unit η.
    """
    sums = lag_sums(base, tangents, mask, prompt_index, per=per)
    L = sums.score_entropy.shape[1]
    d = np.arange(1, L + 1)
    lags = []
    for first, last in groups(L):
        part = _estimate(
            *weighted_lags(sums, (d >= first) & (d <= last), path=False),
            sums,
            f"{_FULL}, these lags; {_ERROR}",
        )
        lags.append(Lags(first, last, part, truncated(sums, d <= last, f"lags up to {last}")))
    return LagProfile(
        full=_estimate(*weighted_lags(sums, np.ones(L)), sums, f"{_FULL}, all lags; {_ERROR}"),
        path=_estimate(*weighted_lags(sums, np.zeros(L)), sums, f"path part; {_ERROR}"),
        lags=lags,
        discounted=[(gamma, truncated(sums, gamma**d, f"lag d weighted {gamma:g}^d")) for gamma in DISCOUNTS],
    )


def groups(L: int) -> list[tuple[int, int]]:
    """(first, last) lags: 1, 2, ..., 16, then groups that grow by a quarter, up to L."""
    found = []
    first = 1
    while first <= L:
        last = min(L, max(first, int(first * 1.25) if first > 16 else first))
        found.append((first, last))
        first = last + 1
    return found


def _estimate(value: float, influence: FloatArray, sums: LagSums, method: str) -> Estimate:
    B = check_prompt_count(influence)
    unit = f"nats/{sums.per} per unit eta"
    return Estimate(value=value, stderr=influence_error(influence), n=B, unit=unit, method=method)
