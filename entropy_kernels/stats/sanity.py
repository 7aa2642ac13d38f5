r"""Checks that must hold if the samples really come from the base policy (docs/theory.md, sections 4 and 5).

E[w_i] = 1,   E[S'_i] = 0,   effective sample size (Σw)²/Σw²,   Var over samples of H_k against −log p_k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .estimate import Estimate
from .ratio import entropy
from .resampling import check_prompt_count, jackknife
from .samples import (
    FloatArray,
    TokenTangents,
    TokenValues,
    by_prompt,
    check_mask,
    check_prompts,
    log_ratio,
    on_mask,
    prompt_sums,
    reach,
)


class EffectiveSampleSize(NamedTuple):
    """Of the per-decision weights w_<k over tokens and of w_i over sequences; between 1 and their number."""

    tokens: float
    sequences: float


class RaoBlackwellRatio(NamedTuple):
    """Var(entropy terms)/Var(−log-prob terms); below 1 where Rao-Blackwell helps.

    per_position: between responses at the same position, pooled over positions: at most 1 in expectation.
    per_sequence: of the two estimates of the entropy per sequence, between prompts: may exceed 1.
    """

    per_position: Estimate
    per_sequence: Estimate


def effective_sample_size(log_weights: ArrayLike) -> float:
    """(Σw)²/Σw² from log w of any shape; NaN when every weight is 0."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        w = np.exp(log_w - log_w.max())  # the ratio has no scale, so nothing overflows
        return float(w.sum() ** 2 / np.sum(w**2))


def ess(base: TokenValues, moved: TokenValues, mask: ArrayLike) -> EffectiveSampleSize:
    """(Σw)²/Σw² over all response tokens for w_<k, and over sequences for w_i. Necessary, not sufficient.

    Args:
        base: values at the policy that drew the samples, nats, [N, T].
        moved: values at the moved policy, [N, T].
        mask: bool [N, T], True on response tokens.

    Raises:
        UserError: shapes or dtypes do not fit, or a row without a response token.
    """
    mask = check_mask(mask)
    log_w = log_ratio(base, moved, mask)
    return EffectiveSampleSize(
        tokens=effective_sample_size(reach(log_w, "per_decision")[mask]),
        sequences=effective_sample_size(log_w.sum(axis=1)),
    )


def mean_weight(base: TokenValues, moved: TokenValues, mask: ArrayLike, prompt_index: ArrayLike) -> Estimate:
    """Mean over prompts of the prompt's mean w_i − 1, zero in expectation; its z_score() is z_mean_weight.

    Args:
        base: values at the policy that drew the samples, nats, [N, T].
        moved: values at the moved policy, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.

    Raises:
        UserError: shapes or dtypes do not fit, or fewer than two prompts.
    """
    mask = check_mask(mask)
    with np.errstate(over="ignore"):
        excess = np.expm1(log_ratio(base, moved, mask).sum(axis=1))
    return _mean_over_prompts(excess, prompt_index, mask, "1", "mean of w - 1 over prompts")


def mean_score(tangents: TokenTangents, mask: ArrayLike, prompt_index: ArrayLike) -> Estimate:
    """Mean over prompts of the prompt's mean S'_i, zero in expectation at η = 0; .z_score() is z_mean_score.

    Args:
        tangents: H' and S' at η = 0, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.

    Raises:
        UserError: shapes or dtypes do not fit, or fewer than two prompts.
    """
    mask = check_mask(mask)
    score = on_mask(tangents.d_logprob, mask, "tangents.d_logprob").sum(axis=1)
    return _mean_over_prompts(
        score, prompt_index, mask, "nats/sequence per unit eta", "mean score over prompts"
    )


def token_mean(x: ArrayLike, mask: ArrayLike, prompt_index: ArrayLike, *, unit: str) -> Estimate:
    """Σx/ΣT: the mean of any figure over response tokens, with its influence-function error over prompts.

    Args:
        x: the figure, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.
        unit: the figure's.

    Raises:
        UserError: shapes or dtypes do not fit, or fewer than two prompts.
    """
    values = TokenValues(x, np.zeros(np.shape(x)))
    mean = entropy(prompt_sums(values, values, mask, prompt_index, per="token", estimator="path"))
    return replace(mean, unit=unit, method="mean over tokens; influence function over prompts")


def rb_variance_ratio(values: TokenValues, mask: ArrayLike, prompt_index: ArrayLike) -> RaoBlackwellRatio:
    """Var(H_k)/Var(−S_k) at the same position, and Var(Σ_k H_k)/Var(−Σ_k S_k) of the estimated mean.

    Position k is the k-th response token. Per position, squared deviations from the position's mean over all
    responses are pooled over positions, for either quantity. Per sequence, the variances are those between
    prompts of the prompt's mean, since prompts are the independent units. Errors are jackknives over prompts.

    Args:
        values: H and S at η = 0, nats, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.

    Raises:
        UserError: shapes or dtypes do not fit, or fewer than two prompts.
    """
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    H, Z = on_mask(values.entropy, mask, "values.entropy"), -on_mask(values.logprob, mask, "values.logprob")
    return RaoBlackwellRatio(
        per_position=_variance_ratio(*_position_sums(H, Z, mask, inverse, B)),
        per_sequence=_variance_ratio(*_sequence_sums(H, Z, inverse, B)),
    )


def _position_sums(
    H: FloatArray, Z: FloatArray, mask: NDArray[np.bool_], inverse: NDArray[np.intp], B: int
) -> list[FloatArray]:
    """Count, ΣH, ΣH², ΣZ, ΣZ² per prompt and position, [B, positions]."""
    position = (np.cumsum(mask, axis=1) - 1)[mask]
    cell = inverse.repeat(mask.sum(axis=1)) * mask.shape[1] + position
    count = np.bincount(position)

    def cells(x: FloatArray) -> FloatArray:
        sums = np.bincount(cell, weights=x, minlength=B * mask.shape[1])
        return np.asarray(sums, dtype=np.float64).reshape(B, -1)

    def centred(x: FloatArray) -> FloatArray:  # a variance does not see a shift, its rounding does
        tokens = x[mask]
        return tokens - (np.bincount(position, weights=tokens) / count)[position]

    h, z = centred(H), centred(Z)
    return [cells(x) for x in (np.ones_like(h), h, h**2, z, z**2)]


def _sequence_sums(H: FloatArray, Z: FloatArray, inverse: NDArray[np.intp], B: int) -> list[FloatArray]:
    """1, x, x², y, y² per prompt, [B, 1], of the centred prompt means of ΣH and −ΣS."""
    size = np.bincount(inverse, minlength=B)
    means = [by_prompt(x.sum(axis=1), inverse, B) / size for x in (H, Z)]
    h, z = (x - x.mean() for x in means)
    return [x[:, None] for x in (np.ones(B), h, h**2, z, z**2)]


def _squares(count: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
    """Σ_k [Q_k − M_k²/n_k], positions that nobody reaches left out."""
    square_of_sum = np.divide(first**2, count, out=np.zeros_like(first), where=count > 0)
    return (second - square_of_sum).sum(axis=-1)


def _variance_ratio(*sums: FloatArray) -> Estimate:
    def ratio_of(n: FloatArray, h: FloatArray, h2: FloatArray, z: FloatArray, z2: FloatArray) -> FloatArray:
        return _squares(n, h, h2) / _squares(n, z, z2)

    value, stderr, _ = jackknife(ratio_of, *sums)
    return Estimate(
        value=value, stderr=stderr, n=len(sums[0]), unit="1", method="variance ratio; jackknife over prompts"
    )


def _mean_over_prompts(
    x: FloatArray, prompt_index: ArrayLike, mask: NDArray[np.bool_], unit: str, method: str
) -> Estimate:
    inverse, B = check_prompts(prompt_index, mask)
    means = by_prompt(x, inverse, B) / np.bincount(inverse, minlength=B)
    check_prompt_count(means)
    with np.errstate(invalid="ignore"):
        stderr = float(means.std(ddof=1) / np.sqrt(B))
    return Estimate(value=float(means.mean()), stderr=stderr, n=B, unit=unit, method=method)
