r"""Rank correlation and concentration of token scores, with errors over prompts (docs/theory.md, section 10).

    ρ = Pearson correlation of mid-ranks;   held(f) = Σ_{the top f by |score|} |amount| / Σ |amount|.

Tokens of a prompt depend on each other, so whole prompts are drawn again. A draw gives every token its prompt's multiplicity m;
mid-ranks are then cumulative sums of m over the sorted values, which need sorting only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .samples import FloatArray

DRAWS = 200
LEVEL = 0.95


class Bootstrapped(NamedTuple):
    """An estimate whose standard error is the spread of its bootstrap draws, and their central 95 %."""

    estimate: Estimate
    low: float
    high: float


class Held(NamedTuple):
    """What the top of a ranking holds of all amounts."""

    fraction: float  # of the tokens
    held: Bootstrapped


def rank_correlations(
    scores: Mapping[str, ArrayLike],
    target: ArrayLike,
    prompt: ArrayLike,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Bootstrapped]:
    """Spearman's ρ of each score with the target; prompts are resampled.

    Args:
        scores: name -> [n] numbers.
        target: [n].
        prompt: [n] integers, equal for tokens (or sequences) of the same prompt.
        draws: bootstrap draws.
        seed: of the draws, which are the same for all scores.

    Returns:
        name -> Bootstrapped; NaN for a score or target that is constant or holds a NaN.

    Raises:
        UserError: lengths that differ, or fewer than two prompts.
    """
    y = np.asarray(target, dtype=np.float64)
    xs = {name: np.asarray(x, dtype=np.float64) for name, x in scores.items()}
    group, B = _groups(prompt, y, *xs.values())
    levels = {name: _levels(x) for name, x in xs.items()}
    target_levels = _levels(y)
    found = {name: np.empty(draws + 1) for name in xs}
    for i, m in enumerate(_multiplicities(group, B, draws, seed)):
        ranks = _mid_ranks(target_levels, m)
        for name, level in levels.items():
            found[name][i] = _pearson(_mid_ranks(level, m), ranks, m)
    defined = {name: bool(np.isfinite(x).all() and np.isfinite(y).all()) for name, x in xs.items()}
    return {
        name: _bootstrapped(x if defined[name] else np.full_like(x, np.nan), B, "Spearman's rank correlation")
        for name, x in found.items()
    }


def held_by_top(
    score: ArrayLike,
    amount: ArrayLike,
    prompt: ArrayLike,
    fractions: Sequence[float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Held]:
    """Σ |amount| over the top f of the tokens by |score|, over Σ |amount|; a boundary token counts in part.

    A score without any information holds f; the amount itself as the score holds the most that is possible.

    Args:
        score: [n] what ranks the tokens.
        amount: [n] what is to be found.
        prompt: [n] integers, equal for tokens of the same prompt.
        fractions: f, each in (0, 1].
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Raises:
        UserError: lengths that differ, or fewer than two prompts.
    """
    s, c = (np.abs(np.asarray(x, dtype=np.float64)) for x in (score, amount))
    group, B = _groups(prompt, s, c)
    order = np.argsort(-s, kind="stable")
    found = np.empty((draws + 1, len(fractions)))
    for i, m in enumerate(_multiplicities(group, B, draws, seed)):
        found[i] = _top_share(m[order], (m * c)[order], fractions)
    if not (np.isfinite(s).all() and np.isfinite(c).all()):
        found[:] = np.nan
    how = "share of the sum of magnitudes held by the tokens ranked first"
    return [Held(f, _bootstrapped(found[:, i], B, how)) for i, f in enumerate(fractions)]


def cross_fitted_top(
    first: ArrayLike,
    second: ArrayLike,
    prompt: ArrayLike,
    fractions: Sequence[float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Held]:
    """As held_by_top, but ranked and signed by one half of the evidence and added up by the other: mean of both ways round.

        Σ_{top f by |a|} sign(a) b / Σ sign(a) b

    Noise makes |c| large, and what it makes large stands at the top: Σ|c| over the top overstates what a repetition would
    find there. In b, which is independent of a, that noise averages to zero.

    Args:
        first: [n] amounts as one half of the evidence has them.
        second: [n] the same by the other half.
        prompt: [n] integers, equal for tokens of the same prompt.
        fractions: f, each in (0, 1].
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Raises:
        UserError: lengths that differ, or fewer than two prompts.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    group, B = _groups(prompt, a, b)
    ways = [(np.argsort(-np.abs(x), kind="stable"), np.sign(x) * y) for x, y in ((a, b), (b, a))]
    found = np.empty((draws + 1, len(fractions)))
    for i, m in enumerate(_multiplicities(group, B, draws, seed)):
        found[i] = np.mean(
            [_top_share(m[order], (m * signed)[order], fractions) for order, signed in ways], axis=0
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        found[:] = np.nan
    how = "share held by the tokens ranked first, ranked on one half of the prompts of E and added up on the other"
    return [Held(f, _bootstrapped(found[:, i], B, how)) for i, f in enumerate(fractions)]


def from_halves(a: float, b: float, unit: str) -> Estimate:
    """a + b with standard error |a − b|: a sum over prompts of E from its sums over two halves of them.

    Var(a + b) = Var(a − b) for independent halves, of which there is one draw: n = 2, one degree of freedom, so that its 95 % interval
    is 12.7 standard errors wide on each side.
    """
    how = "sum of two halves of the prompts of E; error from their difference"
    return Estimate(value=a + b, stderr=abs(a - b), n=2, unit=unit, method=how)


def doubled_reliability(correlation: float) -> float:
    """2r/(1 + r): correlation of the sum of both halves with a repetition of it, from the correlation r of the halves (Spearman-Brown)."""
    return 2 * correlation / (1 + correlation) if correlation > -1 else float("nan")


def _groups(prompt: ArrayLike, *arrays: FloatArray) -> tuple[np.ndarray, int]:
    labels, group = np.unique(np.asarray(prompt), return_inverse=True)
    lengths = {len(group), *(len(x) for x in arrays)}
    if len(lengths) != 1:
        raise UserError(
            f"scores, target and prompt have lengths {sorted(lengths)}; expected one length, an entry per token."
        )
    if len(labels) < 2:
        raise UserError(
            f"the tokens come from {len(labels)} prompt(s), expected 2 at least: errors are over prompts. Use more prompts."
        )
    return group, len(labels)


def _multiplicities(group: np.ndarray, B: int, draws: int, seed: int) -> Iterator[FloatArray]:
    """Ones, then the multiplicity of every token in each draw of B prompts."""
    yield np.ones(len(group))
    counts = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=draws).astype(np.float64)
    for count in counts:
        yield count[group]


def _levels(x: FloatArray) -> tuple[np.ndarray, int]:
    values, level = np.unique(x, return_inverse=True)
    return level, len(values)


def _mid_ranks(levels: tuple[np.ndarray, int], m: FloatArray) -> FloatArray:
    level, count = levels
    mass = np.bincount(level, weights=m, minlength=count)
    return (np.cumsum(mass) - mass / 2)[level]


def _pearson(x: FloatArray, y: FloatArray, m: FloatArray) -> float:
    total = m.sum()
    x, y = x - (m @ x) / total, y - (m @ y) / total
    with np.errstate(divide="ignore", invalid="ignore"):  # a constant has no correlation
        return float((m * x) @ y / np.sqrt(((m * x) @ x) * ((m * y) @ y)))


def _top_share(m: FloatArray, amount: FloatArray, fractions: Sequence[float]) -> FloatArray:
    """Cumulative amount at each fraction of the mass m, over its total; both in order of rank."""
    mass, held = (np.concatenate([[0.0], np.cumsum(x)]) for x in (m, amount))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.interp(np.asarray(fractions) * mass[-1], mass, held) / held[-1]


def _bootstrapped(values: FloatArray, B: int, method: str) -> Bootstrapped:
    """Values [1 + draws], the first of which is the estimate."""
    value, draws = float(values[0]), values[1:]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    estimate = Estimate(
        value=value,
        stderr=float(np.std(draws, ddof=1)),
        n=B,
        unit="1",
        method=f"{method}; {len(draws)} bootstrap draws of prompts of U",
    )
    return Bootstrapped(estimate, float(low), float(high))
