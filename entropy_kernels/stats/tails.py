r"""Are there too few prompts for the error to be believed? Heavy tails of h'(0) (docs/theory.md, section 11).

    quantiles   of |ĥ'(B' prompts) − ĥ'|, B' prompts drawn from the B at hand, for B' = B, B/2, B/4, ...
    Hill        α̂ = k/Σ_{j≤k} log(X_(j)/X_(k+1)) of X_n = |IF'_n|, the k largest;  2kα/α̂ ~ χ²_{2k} if P(X > x) ∝ x^{−α}
    kurtosis    of the token's contributions to ĥ': 3 for a normal law
    top share   of Σ|contribution| that the top 1 % of tokens hold

Below α = 2 the variance does not exist and errors fall more slowly than B^{−1/2}; below 4 the standard error itself is noisy.
Quantiles that come from the samples at hand cannot show a tail that no sample has reached yet: they condemn, they do not acquit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

from ..errors import UserError
from .estimate import Estimate
from .ratio import arrays_first, first_of, influence_first
from .resampling import check_prompt_count, jackknife
from .samples import FloatArray, PromptSums, by_prompt, check_mask, check_prompts, on_mask

TAIL_LEVELS = (0.5, 0.8, 0.95)
SMALLEST = 8  # prompts
DRAWS = 1000
TOP = 0.01


class TailIndex(NamedTuple):
    """Hill's α̂ with its interval of 95 %, from the `tail` largest values."""

    value: float
    low: float
    high: float
    tail: int


class AgainstPrompts(NamedTuple):
    """At B' prompts: quantiles of |error| at TAIL_LEVELS, nats per token or sequence and unit η, and the tail index."""

    prompts: int
    quantiles: tuple[float, ...]
    tail_index: TailIndex


class Tails(NamedTuple):
    """The diagnostics of the module's head; the first row of `against_prompts` is at all B prompts."""

    kurtosis: Estimate
    top_share: Estimate
    against_prompts: tuple[AgainstPrompts, ...]


def heavy_tails(
    sums: PromptSums, contributions: ArrayLike, mask: ArrayLike, prompt_index: ArrayLike, *, seed: int = 0
) -> Tails:
    """Quantiles of the error and tail index against the number of prompts, kurtosis and concentration of tokens.

    Args:
        sums: prompt_sums at η = 0 with tangents.
        contributions: each token's share of h'(0), from token_contributions, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.
        seed: of the draws.

    Raises:
        UserError: shapes do not fit, no first derivatives, or fewer than two prompts.
    """
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    c = on_mask(contributions, mask, "contributions")
    arrays = arrays_first(sums)
    if check_prompt_count(*arrays) != B:
        raise UserError(f"sums hold {len(arrays[0])} prompts, prompt_index {B}; expected the same samples.")
    rng = np.random.default_rng(seed)
    size = np.abs(influence_first(sums))
    rows = []
    for count in _sizes(B):
        index = tail_index(size if count == B else rng.choice(size, count, replace=False))
        rows.append(AgainstPrompts(count, _quantiles(np.stack(arrays, axis=1), count, rng), index))
    tokens, owner = c[mask], inverse.repeat(mask.sum(axis=1))
    return Tails(_kurtosis(tokens, owner, B), _top_share(tokens, owner, B, rng), tuple(rows))


def tail_index(values: ArrayLike, *, share: float = 0.1, least: int = 5) -> TailIndex:
    """Hill's estimator on the largest tenth (five at least) of positive values.

    Args:
        values: [n], not negative.
        share: of the values that count as tail.
        least: number of values that count as tail at least.

    Returns:
        TailIndex; NaN where there are too few values, or fewer positive ones than the tail has.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    k = max(least, int(share * len(x)))
    if k + 1 > len(x) or not x[min(k, len(x) - 1)] > 0:
        return TailIndex(math.nan, math.nan, math.nan, k)
    total = float(np.sum(np.log(x[:k] / x[k])))
    alpha = k / total if total else math.inf
    low, high = (alpha * float(chdtri(2 * k, p)) / (2 * k) for p in (0.975, 0.025))  # upper-tail quantiles
    return TailIndex(alpha, low, high, k)


def _sizes(B: int) -> list[int]:
    sizes = [B]
    while sizes[-1] // 2 >= SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes


def _quantiles(arrays: FloatArray, count: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Of |ĥ' − ĥ'(all)| over draws of `count` prompts with replacement; arrays is [B, 4]."""
    B = len(arrays)
    draws: NDArray[np.int64] = rng.multinomial(count, np.full(B, 1 / B), size=DRAWS)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = first_of(*(draws @ arrays).T) - first_of(*arrays.sum(axis=0))
    return tuple(float(q) for q in np.quantile(np.abs(error), TAIL_LEVELS))


def _kurtosis(x: FloatArray, owner: NDArray[np.intp], B: int) -> Estimate:
    """m₄/m₂² of the centred tokens, jackknife over prompts; m's are functions of power sums."""
    x = x - x.mean()  # rounding: kurtosis sees no shift
    x = x / scale if (scale := float(np.abs(x).max())) else x
    powers = [by_prompt(x**p, owner, B) for p in range(5)]

    def of_totals(n: FloatArray, *sums: FloatArray) -> FloatArray:
        a, b, c, d = (s / n for s in sums)
        m2 = b - a**2
        return (d - 4 * a * c + 6 * a**2 * b - 3 * a**4) / m2**2

    value, stderr, _ = jackknife(of_totals, *powers)
    return Estimate(
        value=value,
        stderr=stderr,
        n=B,
        unit="1",
        method="kurtosis of token contributions; jackknife over prompts",
    )


def _top_share(x: FloatArray, owner: NDArray[np.intp], B: int, rng: np.random.Generator) -> Estimate:
    """Share of Σ|x| in the top 1 % of tokens; its error by a bootstrap over prompts."""
    size = np.abs(x)
    order = np.argsort(-size, kind="stable")
    size, owner = size[order], owner[order]

    def share(weight: NDArray[np.int64]) -> float:
        number = np.cumsum(weight)
        held = np.cumsum(weight * size)
        at = TOP * number[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.interp(at, number, held) / held[-1])

    found = [share(k[owner]) for k in rng.multinomial(B, np.full(B, 1 / B), size=200)]
    return Estimate(
        value=share(np.ones_like(owner)),
        stderr=float(np.std(found, ddof=1)),
        n=B,
        unit="1",
        method="share of the sum of |contributions| in the top 1 % of tokens; bootstrap over prompts",
    )
