r"""Baselines b_k: what to subtract from a token's return so that its score is less noisy and its mean the same (docs/theory.md, section 5).

The score S'_k is multiplied by the return Q_k = [Rᵀ(H − h c)]_k, the entropy that the estimator counts on account of token k (per
decision, per token: Σ_{k'>k} (H_k' − h)). Any b_k that depends on the prompt, on t_<k, and on *other* prompts or other responses
only, leaves the mean of (Q_k − b_k) S'_k alone, as E[S'_k | t_<k] = 0. The best of them for one token alone is
E[Q_k S'_k²]/E[S'_k²] given what is known, nearly E[Q_k]: each kind below is a guess of it.

    position     the mean of Q at the same position
    group        the mean of Q at the same position over the other responses to the prompt
    ema          a moving average over the prompts before
    regression   ridge regression on row statistics: position, H_k, and H and S of earlier tokens
    critic       the same with features that the caller passes, such as hidden states: a linear value head
    least_error  the same statistics and a constant, with coefficients that make the error of h' itself least

The last does not guess returns. With φ the statistics and Z_n = Σ_{k∈n} φ_k S'_k, taking b = φβ from the scores changes the influence
of prompt n on ĥ' from y_n to y_n − (Z_n − D_n ΣZ/ΣD)β/D: an ordinary regression over prompts, which also sees that the terms
of one response are correlated. It needs tangents, and b then belongs to one direction.

Returns are linear in h, Q = Q₀ − h C with Q₀ = RᵀH and C = Rᵀc, so each fit takes h from the same other prompts. All but `group` and
`ema` are cross-fitted: prompts are dealt into folds, and b on a fold is fitted on the others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .estimate import Estimate
from .ratio import arrays_first, influence_first
from .resampling import check_prompt_count, jackknife
from .samples import (
    EstimatorKind,
    FloatArray,
    Per,
    PromptSums,
    TokenTangents,
    TokenValues,
    by_prompt,
    check_mask,
    check_names,
    check_prompts,
    counted,
    on_mask,
    prompt_sums,
    reach,
    reach_transposed,
)

BaselineKind = Literal["position", "group", "ema", "regression", "critic", "least_error"]
FOLDS = 5
EMA_DECAY = 0.95
PENALTIES = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
)  # of ridge regression, relative to the features' variance


class Returns(NamedTuple):
    """Q₀ = RᵀH and C = Rᵀc of every response token, and where it stands; one entry per token, [M]."""

    entropy: FloatArray  # Q₀
    counted: FloatArray  # C
    position: NDArray[np.intp]  # 0, 1, ... within the response
    row: NDArray[np.intp]
    prompt: NDArray[np.intp]


def baseline(
    kind: BaselineKind,
    values: TokenValues,
    mask: ArrayLike,
    prompt_index: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    features: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    tangents: TokenTangents | None = None,
    folds: int = FOLDS,
) -> FloatArray:
    """b_k of one kind, nats, float64 [N, T], 0 outside the mask.

    Args:
        kind: one of the names of the module's head.
        values: H and S at η = 0, nats, [N, T].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt. `ema` goes through the prompts in increasing order of it.
        per: "token" or "sequence".
        estimator: "per_decision" or "whole_sequence".
        features: for "critic": [N, T, F], functions of the prompt and of t_<k.
        weight: [N, T], of each token in the fits of "regression" and "critic", such as S'_k²; None for equal weights.
        tangents: for "least_error": H' and S' at η = 0 along the direction, [N, T].
        folds: how many parts the prompts are dealt into.

    Raises:
        UserError: names, shapes or dtypes do not fit; "path"; fewer than two prompts; no prompt with two responses for "group";
            no features for "critic" or tangents for "least_error", or any of them for another kind.
    """
    check_names(per, estimator)
    if kind not in get_args(BaselineKind):
        raise UserError(
            f"baseline is {kind!r}, expected one of {', '.join(map(repr, get_args(BaselineKind)))}."
        )
    if estimator == "path":
        raise UserError(
            "baseline: the estimator 'path' has no scores to take one from; use another estimator."
        )
    if (kind == "critic") != (features is not None):
        raise UserError(
            f"baseline is {kind!r} {'without' if features is None else 'with'} features; expected features, [N, T, F], exactly for "
            "'critic'."
        )
    if (kind == "least_error") != (tangents is not None):
        raise UserError(
            f"baseline is {kind!r} {'without' if tangents is None else 'with'} tangents; expected TokenTangents exactly for 'least_error'."
        )
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    if B < 2:
        raise UserError(
            f"baseline: {B} prompt, expected two at least, as a baseline is fitted on other prompts."
        )
    H, c = on_mask(values.entropy, mask, "values.entropy"), counted(mask, per)
    found = returns(H, c, mask, inverse, estimator)
    totals = by_prompt(H.sum(axis=1), inverse, B), by_prompt(c.sum(axis=1), inverse, B)

    if kind == "group":
        b = of_group(found, totals, np.bincount(inverse, minlength=B))
    elif kind == "ema":
        b = moving_average(found, totals)
    else:
        fold = np.arange(B) % min(folds, B)
        if kind == "position":
            b = of_position(found, totals, fold)
        elif tangents is not None:
            S1 = on_mask(tangents.d_logprob, mask, "tangents.d_logprob")[mask]
            sums = prompt_sums(
                values, values, mask, prompt_index, per=per, estimator=estimator, tangents=tangents
            )
            X = row_statistics(H, on_mask(values.logprob, mask, "values.logprob"), mask)
            b = of_least_error(np.concatenate([np.ones((len(X), 1)), X], axis=1), S1, sums, found, fold)
        else:
            S = on_mask(values.logprob, mask, "values.logprob")
            X = row_statistics(H, S, mask)
            if features is not None:
                X = np.concatenate([X, checked_features(features, mask)[mask]], axis=1)
            w = np.ones(len(X)) if weight is None else on_mask(weight, mask, "weight")[mask]
            b = of_features(X, w, found, totals, fold)
    result = np.zeros(mask.shape)
    result[mask] = b
    return result


def variance_ratio(sums: PromptSums, reference: PromptSums) -> Estimate:
    """Var(ĥ')/Var(ĥ' of the reference) = Σ IF'²/Σ IF'²_ref on the same prompts: below 1 where a baseline helps; jackknife error.

    Args:
        sums: prompt_sums with tangents, with a baseline.
        reference: the same without.

    Raises:
        UserError: no first derivatives, different prompts, or fewer than two.
    """
    mine, theirs = influence_first(sums) ** 2, influence_first(reference) ** 2
    check_prompt_count(mine, theirs)
    value, stderr, _ = jackknife(lambda a, b: a / b, mine, theirs)
    method = "ratio of variances of h', from influence functions; jackknife over prompts"
    return Estimate(value=value, stderr=stderr, n=len(mine), unit="1", method=method)


# --- returns and features ----------------------------------------------------------------------------------


def returns(
    H: FloatArray, c: FloatArray, mask: NDArray[np.bool_], inverse: NDArray[np.intp], estimator: EstimatorKind
) -> Returns:
    """The returns of every response token; H and c are [N, T], 0 off the mask."""
    row, _ = np.nonzero(mask)
    position = (np.cumsum(mask, axis=1) - 1)[mask]
    Q0, C = (reach_transposed(x, estimator)[mask] for x in (H, c))
    return Returns(Q0, C, position, row, inverse[row])


def row_statistics(H: FloatArray, S: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """[M, 7] of every response token: k, log(1 + k), H_k, H_{k−1}, S_{k−1}, and the sum and mean of H before k; all known before t_k."""
    k = np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.float64)
    before = np.where(mask, reach(H, "per_decision"), 0.0)
    last_H, last_S = (np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1) for x in (H, S))
    columns = (k, np.log1p(k), H, last_H, last_S, before, before / np.maximum(k, 1))
    return np.stack([x[mask] for x in columns], axis=1)


def checked_features(features: ArrayLike, mask: NDArray[np.bool_]) -> FloatArray:
    """The features as float64 [N, T, F].

    Raises:
        UserError: another shape.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 3 or x.shape[:2] != mask.shape or not x.shape[2]:
        raise UserError(
            f"features has shape {x.shape}, expected {(*mask.shape, 'F')}: F numbers for every token."
        )
    return x


# --- the kinds ---------------------------------------------------------------------------------------------


def of_group(found: Returns, totals: tuple[FloatArray, FloatArray], size: NDArray[np.intp]) -> FloatArray:
    """Mean of Q at the same position over the prompt's other responses that reach it; 0 where none does. h is of other prompts.

    Raises:
        UserError: no prompt has two responses.
    """
    if size.max() < 2:
        raise UserError(
            "baseline: 'group' compares the responses to one prompt, and each prompt has a single one. Draw more responses per prompt "
            "(--group-size-e 2 or more), or choose another baseline."
        )
    cell = found.prompt * (found.position.max() + 1) + found.position
    others = np.bincount(cell)[cell] - 1
    Q0, C = (np.bincount(cell, weights=x)[cell] - x for x in (found.entropy, found.counted))
    H, D = totals
    h = ((H.sum() - H) / (D.sum() - D))[found.prompt]
    return np.divide(Q0 - h * C, others, out=np.zeros_like(Q0), where=others > 0)


def moving_average(found: Returns, totals: tuple[FloatArray, FloatArray]) -> FloatArray:
    """One number per prompt: the mean return of the prompts before it, the nearest counting most; 0 for the first."""
    B = len(totals[0])
    tokens = np.bincount(found.prompt, minlength=B)
    Q0, C = (by_prompt(x, found.prompt, B) / tokens for x in (found.entropy, found.counted))
    b = np.zeros(B)
    mean_Q0 = mean_C = weight = 0.0
    for n in range(1, B):
        mean_Q0, mean_C, weight = (
            EMA_DECAY * old + new for old, new in ((mean_Q0, Q0[n - 1]), (mean_C, C[n - 1]), (weight, 1.0))
        )
        h = totals[0][:n].sum() / totals[1][:n].sum()
        b[n] = (mean_Q0 - h * mean_C) / weight
    return b[found.prompt]


def of_position(found: Returns, totals: tuple[FloatArray, FloatArray], fold: NDArray[np.intp]) -> FloatArray:
    """Mean of Q at the same position over the other folds; 0 where none of their responses reaches it."""
    b = np.zeros_like(found.entropy)
    length = found.position.max() + 1
    for f in range(fold.max() + 1):
        inside = fold[found.prompt] == f
        h = mean_entropy(totals, fold != f)
        position = found.position[~inside]
        count = np.bincount(position, minlength=length)
        Q = np.bincount(position, weights=(found.entropy - h * found.counted)[~inside], minlength=length)
        b[inside] = np.divide(Q, count, out=np.zeros(length), where=count > 0)[found.position[inside]]
    return b


def of_features(
    X: FloatArray,
    w: FloatArray,
    found: Returns,
    totals: tuple[FloatArray, FloatArray],
    fold: NDArray[np.intp],
) -> FloatArray:
    """Ridge regression of Q on X, fitted on the other folds; its penalty is the best one among those when each is left out in turn."""
    count = int(fold.max()) + 1
    sums = [_sums(X, w, found, fold[found.prompt] == f) for f in range(count)]
    b = np.zeros(len(X))
    for f in range(count):
        others = [g for g in range(count) if g != f]
        loss = np.zeros(len(PENALTIES))
        for g in others if len(others) > 1 else []:
            rest = [e for e in others if e != g]
            h = mean_entropy(totals, np.isin(fold, rest))
            inside = fold[found.prompt] == g
            Q = found.entropy[inside] - h * found.counted[inside]
            for i, (slope, level) in enumerate(_ridge([sums[e] for e in rest], h, PENALTIES)):
                loss[i] += w[inside] @ (Q - X[inside] @ slope - level) ** 2
        h = mean_entropy(totals, fold != f)
        ((slope, level),) = _ridge([sums[e] for e in others], h, (PENALTIES[int(loss.argmin())],))
        inside = fold[found.prompt] == f
        b[inside] = X[inside] @ slope + level
    return b


def of_least_error(
    X: FloatArray, S1: FloatArray, sums: PromptSums, found: Returns, fold: NDArray[np.intp]
) -> FloatArray:
    """X β with β from the other folds: regression over prompts of D·IF' on Z_n − D_n ΣZ/ΣD; the penalty as in `of_features`."""
    B, count = len(sums.numerator), int(fold.max()) + 1
    Z = np.stack([by_prompt(column * S1, found.prompt, B) for column in X.T], axis=1)

    def problem(chosen: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
        N, D, N1, D1 = (x[chosen] for x in arrays_first(sums))
        own = sums._replace(numerator=N, denominator=D, d_numerator=N1, d_denominator=D1)
        return Z[chosen] - np.outer(D, Z[chosen].sum(axis=0) / D.sum()), D.sum() * influence_first(own)

    def fit(chosen: NDArray[np.bool_], penalties: tuple[float, ...]) -> list[FloatArray]:
        z, y = problem(chosen)
        size = np.sqrt(np.mean(z**2, axis=0))
        scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
        values, vectors = np.linalg.eigh((z * scale).T @ (z * scale) / len(z))
        along = vectors.T @ (scale * (z.T @ y) / len(z))
        return [scale * (vectors @ (along / (np.maximum(values, 0.0) + penalty))) for penalty in penalties]

    b = np.zeros(len(X))
    for f in range(count):
        others = [g for g in range(count) if g != f]
        loss = np.zeros(len(PENALTIES))
        for g in others if len(others) > 1 else []:
            z, y = problem(fold == g)
            rest = np.isin(fold, [e for e in others if e != g])
            loss += [np.sum((y - z @ beta) ** 2) for beta in fit(rest, PENALTIES)]
        (beta,) = fit(fold != f, (PENALTIES[int(loss.argmin())],))
        inside = fold[found.prompt] == f
        b[inside] = X[inside] @ beta
    return b


def mean_entropy(totals: tuple[FloatArray, FloatArray], chosen: NDArray[np.bool_]) -> float:
    """H = ΣN/ΣD of the chosen prompts."""
    return float(totals[0][chosen].sum() / totals[1][chosen].sum())


class _Sums(NamedTuple):
    """Weighted sums over tokens: 1, X, XXᵀ, and Q₀, C, X Q₀, X C."""

    weight: float
    X: FloatArray
    XX: FloatArray
    returns: FloatArray  # [2]
    X_returns: FloatArray  # [F, 2]


def _sums(X: FloatArray, w: FloatArray, found: Returns, chosen: NDArray[np.bool_]) -> _Sums:
    x, v = X[chosen], w[chosen, None]
    Q = np.stack([found.entropy, found.counted], axis=1)[chosen] * v
    return _Sums(float(v.sum()), (x * v).sum(axis=0), x.T @ (x * v), Q.sum(axis=0), x.T @ Q)


def _ridge(parts: list[_Sums], h: float, penalties: tuple[float, ...]) -> list[tuple[FloatArray, float]]:
    """(slope, level) of Q on X for each penalty, features scaled to variance one; a constant feature has slope 0."""
    n, X, XX, returns, X_returns = (sum(x[1:], start=x[0]) for x in zip(*parts, strict=True))
    mean, Q = X / n, (returns[0] - h * returns[1]) / n
    covariance = XX / n - np.outer(mean, mean)
    XQ = (X_returns[:, 0] - h * X_returns[:, 1]) / n - mean * Q
    variance = np.diag(covariance)
    varies = variance > 1e-12 * np.diag(XX) / n
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    values, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    along = vectors.T @ (scale * XQ)
    fits = []
    for penalty in penalties:
        slope = scale * (vectors @ (along / (np.maximum(values, 0.0) + penalty)))
        fits.append((slope, float(Q - mean @ slope)))
    return fits
