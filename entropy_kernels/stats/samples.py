r"""From per-token arrays to one numerator and one denominator per prompt: everything the estimators need.

Legend (docs/theory.md, sections 5 to 7). Sequence i, response tokens k = 1..T_i, S_k log-prob, H_k entropy.

All six estimators (three kinds × per token or per sequence) are one formula,

    h(η) = N/D,   N = Σ_i Σ_k w_k H_k(η),   D = Σ_i Σ_k w_k c_k,   log w = R[S(η) − S(0)],

where the linear map R says which tokens' ratios stand in front of token k,

    per_decision     (R x)_k = Σ_{j<k} x_j      the tokens already drawn
    whole_sequence   (R x)_k = Σ_j x_j          all tokens of the sequence
    path             (R x)_k = 0                no weight: the samples stay as they are

and c says what is counted: c_k = 1 per token; per sequence c_k = [k = 1], so that D is Σ_i w_i for
whole_sequence and, as nothing stands in front of the first token, the number of sequences for the other two.

With A = R S' and C = R S'' (so w' = w A, w'' = w (C + A²)) the derivatives are

    N' = Σ w (H' + A H),   N'' = Σ w (H'' + 2 A H' + (C + A²) H),   D' = Σ w A c,   D'' = Σ w (C + A²) c.

A baseline b_k, any function of the prompt and of the tokens before k that was fitted on other prompts, takes the sum
M = Σ b_k (u_{k+1} − u_k) from N, where u_k is the per-decision weight and u_{k+1}/u_k the ratio of token k alone, of
conditional mean one: M has mean zero at every η. With x_k = S_k(η) − S_k(0), a_k = Σ_{j<k} S'_j and γ_k = Σ_{j<k} S''_j,

    M   = Σ b u expm1(x)
    M'  = Σ b u [S' + expm1(x)(a + S')]
    M'' = Σ b u [S'' + S'² + 2 a S' + expm1(x)(γ + S'' + (a + S')²)],

in which no two large terms cancel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

FloatArray = NDArray[np.float64]
Per = Literal["token", "sequence"]
EstimatorKind = Literal["per_decision", "whole_sequence", "path"]


class TokenValues(NamedTuple):
    """H and S of every token, nats, each [N, T]; entries outside the mask are never read."""

    entropy: ArrayLike
    logprob: ArrayLike


class TokenTangents(NamedTuple):
    """H' and S' along the direction, nats per unit η, each [N, T]."""

    d_entropy: ArrayLike
    d_logprob: ArrayLike


class TokenCurvature(NamedTuple):
    """H'' and S'' along the direction, nats per unit η², each [N, T]."""

    d2_entropy: ArrayLike
    d2_logprob: ArrayLike


class PromptSums(NamedTuple):
    """N_n, D_n and their derivatives at one η, summed over the sequences of each prompt n, each float64 [B].

    Prompts are in increasing order of their prompt_index. Derivatives that were not asked for are None.
    """

    numerator: FloatArray
    denominator: FloatArray
    per: Per
    estimator: EstimatorKind
    d_numerator: FloatArray | None = None
    d_denominator: FloatArray | None = None
    d2_numerator: FloatArray | None = None
    d2_denominator: FloatArray | None = None

    @property
    def unit(self) -> str:
        """Unit of N/D."""
        return f"nats/{self.per}"


def prompt_sums(
    base: TokenValues,
    moved: TokenValues,
    mask: ArrayLike,
    prompt_index: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    tangents: TokenTangents | None = None,
    curvature: TokenCurvature | None = None,
    baseline: ArrayLike | None = None,
) -> PromptSums:
    """N_n = Σ_{i∈n} Σ_k w_k H_k − M_n and D_n = Σ_{i∈n} Σ_k w_k c_k at the moved policy, with derivatives there.

    The estimate is ΣN_n/ΣD_n; weights and c are those of the module's head (docs/theory.md, sections 5 to 7).

    Args:
        base: H and S at the policy that drew the samples, [N, T]; only its S is used.
        moved: H and S at the policy to be judged, [N, T]; pass base again for η = 0.
        mask: bool [N, T], True on response tokens. Each row needs one at least.
        prompt_index: integers [N]; rows with the same integer share a prompt. Groups may differ in size.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        tangents: H', S' taken at the moved policy, [N, T]; without them there are no first derivatives.
        curvature: H'', S'' taken at the moved policy, [N, T]; needs tangents.
        baseline: b of the module's head, nats, [N, T]; None for 0. Truth and predictions must be given the same.

    Returns:
        PromptSums, float64 [B]. NaN inside the mask makes that prompt NaN.

    Raises:
        UserError: shapes, dtypes or names do not fit, a row without a response token, curvature without
            tangents, a baseline for "path".
    """
    check_names(per, estimator)
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    b = check_baseline(baseline, mask, estimator)
    if curvature is not None and tangents is None:
        raise UserError(
            "curvature was given without tangents; second derivatives need both: pass tangents too."
        )

    H = on_mask(moved.entropy, mask, "moved.entropy")
    c = counted(mask, per)
    x = log_ratio(base, moved, mask)
    H1, S1 = (None, None) if tangents is None else _pair(tangents, mask, "tangents")
    H2, S2 = (None, None) if curvature is None else _pair(curvature, mask, "curvature")

    # A ratio that overflows ends as inf or NaN, never as a number.
    with np.errstate(over="ignore", invalid="ignore"):
        w = np.exp(reach(x, estimator))
        M, M1, M2 = baseline_terms(b, x, S1, S2)

        def totals(terms: FloatArray, less: FloatArray | float = 0.0) -> FloatArray:
            return by_prompt(np.where(mask, w * terms - less, 0.0).sum(axis=1), inverse, B)

        sums = PromptSums(totals(H, M), totals(c), per, estimator)
        if H1 is None or S1 is None:
            return sums
        A = reach(S1, estimator)
        sums = sums._replace(d_numerator=totals(H1 + A * H, M1), d_denominator=totals(A * c))
        if H2 is None or S2 is None:
            return sums
        C = reach(S2, estimator)
        return sums._replace(
            d2_numerator=totals(H2 + 2 * A * H1 + (C + A**2) * H, M2), d2_denominator=totals((C + A**2) * c)
        )


# --- the pieces of the formula, used by the other files of this room ---------------------------------------


def reach(x: FloatArray, estimator: EstimatorKind) -> FloatArray:
    """R x of the module's head; x is [N, T], 0 off the mask, so padding on either side is harmless."""
    if estimator == "per_decision":
        # Shifted, not cumsum(x) − x: the subtraction would cancel where a late x is small.
        return np.concatenate([np.zeros_like(x[:, :1]), np.cumsum(x, axis=1)[:, :-1]], axis=1)
    if estimator == "whole_sequence":
        return np.broadcast_to(x.sum(axis=1, keepdims=True), x.shape)
    return np.zeros_like(x)


def reach_transposed(y: FloatArray, estimator: EstimatorKind) -> FloatArray:
    """Rᵀ y: Σ_{k>j} y_k per decision, Σ_k y_k for whole sequences, 0 for path; y [N, T] is 0 off the mask."""
    if estimator == "per_decision":
        return reach(y[:, ::-1], estimator)[:, ::-1]
    return reach(y, estimator)


def counted(mask: NDArray[np.bool_], per: Per) -> FloatArray:
    """Counting weights c of the module's head, [N, T]: 1 on each response token, or on each row's first."""
    if per == "sequence":
        mask = mask & (np.cumsum(mask, axis=1) == 1)
    return mask.astype(np.float64)


def log_ratio(base: TokenValues, moved: TokenValues, mask: NDArray[np.bool_]) -> FloatArray:
    """S_k(η) − S_k(0), [N, T], 0 outside the mask; a token the moved policy cannot draw gives −inf."""
    after = on_mask(moved.logprob, mask, "moved.logprob")
    return after - on_mask(base.logprob, mask, "base.logprob")


def baseline_terms(
    b: FloatArray | None, x: FloatArray, S1: FloatArray | None = None, S2: FloatArray | None = None
) -> tuple[FloatArray | float, FloatArray | float, FloatArray | float]:
    """The terms of M, M', M'' of the module's head, [N, T] each; 0 without a baseline, or without that derivative.

    b, x = S(η) − S(0), S1 = S' and S2 = S'' are [N, T] and 0 off the mask.
    """
    if b is None:
        return 0.0, 0.0, 0.0
    bu, e = b * np.exp(reach(x, "per_decision")), np.expm1(x)
    if S1 is None:
        return bu * e, 0.0, 0.0
    a = reach(S1, "per_decision")
    M1 = bu * (S1 + e * (a + S1))
    if S2 is None:
        return bu * e, M1, 0.0
    C = reach(S2, "per_decision")
    return bu * e, M1, bu * (S2 + S1**2 + 2 * a * S1 + e * (C + S2 + (a + S1) ** 2))


def by_prompt(x: FloatArray, inverse: NDArray[np.intp], B: int) -> FloatArray:
    """Sums of x [N] over the rows of each prompt, [B]."""
    return np.asarray(np.bincount(inverse, weights=x, minlength=B), dtype=np.float64)


def on_mask(x: ArrayLike, mask: NDArray[np.bool_], name: str) -> FloatArray:
    """X as float64 with 0 outside the mask.

    Raises:
        UserError: x has another shape than the mask.
    """
    values = np.asarray(x, dtype=np.float64)
    if values.shape != mask.shape:
        raise UserError(f"{name} has shape {values.shape}, expected that of mask, {mask.shape}.")
    return np.where(mask, values, 0.0)


def _pair(
    x: TokenTangents | TokenCurvature, mask: NDArray[np.bool_], name: str
) -> tuple[FloatArray, FloatArray]:
    """Both arrays of a NamedTuple on the mask, entropy first."""
    of_entropy, of_logprob = (on_mask(a, mask, f"{name}.{field}") for field, a in x._asdict().items())
    return of_entropy, of_logprob


# --- checks of what a caller passes ------------------------------------------------------------------------


def check_names(per: str, estimator: str) -> None:
    """Refuse unknown names.

    Raises:
        UserError: per or estimator is not one of the known names.
    """
    for argument, got, known in (
        ("per", per, get_args(Per)),
        ("estimator", estimator, get_args(EstimatorKind)),
    ):
        if got not in known:
            raise UserError(f"{argument} is {got!r}, expected one of {', '.join(map(repr, known))}.")


def check_mask(mask: ArrayLike) -> NDArray[np.bool_]:
    """The mask as a bool array [N, T] with a response token in every row.

    Raises:
        UserError: wrong dtype or dimension, no row, or a row without a response token.
    """
    checked = np.asarray(mask)
    if checked.dtype != np.bool_ or checked.ndim != 2 or checked.size == 0:
        raise UserError(
            f"mask has dtype {checked.dtype} and shape {checked.shape}, expected bool [sequences, tokens], "
            "not empty: True exactly on the response tokens."
        )
    empty = np.flatnonzero(~checked.any(axis=1))
    if empty.size:
        raise UserError(
            f"mask has no response token in {empty.size} of {len(checked)} rows (first: row {empty[0]}), "
            "expected one at least, as the end-of-sequence token counts: leave such rows out."
        )
    return checked


def check_baseline(
    baseline: ArrayLike | None, mask: NDArray[np.bool_], estimator: EstimatorKind
) -> FloatArray | None:
    """The baseline as float64 [N, T], 0 outside the mask.

    Raises:
        UserError: another shape than the mask, or a baseline for "path", which holds the weights at 1.
    """
    if baseline is None:
        return None
    if estimator == "path":
        raise UserError(
            "baseline was given for the estimator 'path', whose weights are held at 1: there is no noise of scores that it could "
            "take away. Use 'per_decision' or 'whole_sequence', or no baseline."
        )
    return on_mask(baseline, mask, "baseline")


def check_prompts(prompt_index: ArrayLike, mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], int]:
    """The position of each row's prompt among the B distinct ones, [N], and B.

    Raises:
        UserError: not integers, or not one per row of mask.
    """
    index = np.asarray(prompt_index)
    if index.shape != mask.shape[:1] or not np.issubdtype(index.dtype, np.integer):
        raise UserError(
            f"prompt_index has dtype {index.dtype} and shape {index.shape}, expected integers of shape "
            f"{mask.shape[:1]}: one per sequence, equal for sequences of the same prompt."
        )
    distinct, inverse = np.unique(index, return_inverse=True)
    return inverse.reshape(-1), len(distinct)
