r"""The true change ΔH = h(η) − h(0) on samples drawn at 0, in two ways (docs/theory.md, section 5).

Direct. With h₀ = N₀/D₀ = Σ H(0)/Σ c, and log w, c as in samples.py,

    ΔH = Σ w_k (H_k(η) − h₀ c_k) / Σ w_k c_k
       = Σ [H_k(η) − H_k(0) + expm1(log w_k)(H_k(η) − h₀ c_k)] / Σ w_k c_k,

as Σ (H_k(0) − h₀ c_k) = 0 may be taken off. Every term is now of order η: nothing of the size of H cancels. Kept as
X = Σ [H(η) − H(0) + (w − 1) H(η)] − M and E = Σ (w − 1) c, it reads ΔH = (X − h₀ E)/(D₀ + E), a function of four
totals from which any prompt can be left out, h₀ following. M is what a baseline takes away (samples.py).

The samples may also come from a third policy, with w⁰ = exp R[S(0) − S(drawn)] in front of every term: h₀ = Σ w⁰H(0)/Σ w⁰c, and
X, E, N₀, D₀ are the same sums with weights w⁰ (docs/theory.md, section 12).

Integrated. ΔH = ∫₀^η h'(s) ds by quadrature: no difference at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .ratio import (
    ERROR,
    METHOD,
    ErrorKind,
    arrays_first,
    check_error,
    first_derivative,
    first_of,
    influence_first,
)
from .resampling import check_prompt_count, influence_error, jackknife
from .samples import (
    EstimatorKind,
    FloatArray,
    Per,
    PromptSums,
    TokenValues,
    baseline_terms,
    by_prompt,
    check_baseline,
    check_mask,
    check_names,
    check_prompts,
    counted,
    log_ratio,
    on_mask,
    reach,
)


class ChangeSums(NamedTuple):
    """X, E, N₀, D₀ of the module's head for each prompt, float64 [B]: ΔH = (ΣX − (ΣN₀/ΣD₀) ΣE)/(ΣD₀ + ΣE)."""

    change: FloatArray  # X
    excess: FloatArray  # E
    base_numerator: FloatArray  # N₀
    base_denominator: FloatArray  # D₀
    per: Per
    estimator: EstimatorKind


def change_sums(
    base: TokenValues,
    moved: TokenValues,
    mask: ArrayLike,
    prompt_index: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    drawn: TokenValues | None = None,
    baseline: ArrayLike | None = None,
) -> ChangeSums:
    """The per-prompt sums of the direct difference, per-token differences first.

    Args:
        base: H and S at the policy from which the change counts, nats, [N, T]; without `drawn` the one that drew the samples.
        moved: H and S at the moved policy, [N, T], computed in the same way.
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        drawn: H and S at the policy that drew the samples, [N, T], where that is not base; only its S is used.
        baseline: b of samples.py, nats, [N, T]; None for 0. Not together with `drawn`.

    Raises:
        UserError: shapes, dtypes or names do not fit, a row without a response token, a baseline for "path" or with `drawn`.
    """
    check_names(per, estimator)
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    b = check_baseline(baseline, mask, estimator)
    if b is not None and drawn is not None:
        raise UserError(
            "change_sums was given a baseline and `drawn`: a baseline is fitted at the policy that drew the samples, and the change is "
            "then counted from there. Leave one of them out."
        )
    H0, H = on_mask(base.entropy, mask, "base.entropy"), on_mask(moved.entropy, mask, "moved.entropy")
    c = counted(mask, per)

    # A ratio that overflows ends as inf or NaN, never as a number.
    with np.errstate(over="ignore", invalid="ignore"):
        w0 = 1.0 if drawn is None else np.exp(reach(log_ratio(drawn, base, mask), estimator))

        def totals(terms: FloatArray) -> FloatArray:
            return by_prompt(np.where(mask, w0 * terms, 0.0).sum(axis=1), inverse, B)

        x = log_ratio(base, moved, mask)
        excess = np.expm1(reach(x, estimator))
        M, _, _ = baseline_terms(b, x)
        return ChangeSums(
            change=totals(H - H0 + excess * H - M),
            excess=totals(excess * c),
            base_numerator=totals(H0),
            base_denominator=totals(c),
            per=per,
            estimator=estimator,
        )


def direct_change(sums: ChangeSums, *, error: ErrorKind = "influence") -> Estimate:
    """ΔH = h(η) − h(0) as a difference on the same samples, nats per token or sequence.

    Args:
        sums: from change_sums.
        error: "influence" or "jackknife", both over prompts and of the paired difference.

    Raises:
        UserError: fewer than two prompts, or an unknown error.
    """
    check_error(error)
    B = check_prompt_count(*change_arrays(sums))
    if error == "jackknife":
        value, stderr, _ = jackknife(change_of, *change_arrays(sums))
    else:
        value = float(change_of(*(x.sum() for x in change_arrays(sums))))
        stderr = influence_error(influence_change(sums))
    method = f"{METHOD[sums.estimator]}, direct difference; {ERROR[error]}"
    return Estimate(value=value, stderr=stderr, n=B, unit=f"nats/{sums.per}", method=method)


def noise_floor(
    base: TokenValues,
    plus: TokenValues,
    minus: TokenValues,
    mask: ArrayLike,
    prompt_index: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    baseline: ArrayLike | None = None,
) -> Estimate:
    """½[ĥ(+η) + ĥ(−η)] − ĥ(0): its standard error is the floor below which a direct difference says nothing.

    In exact arithmetic this is ½η²h'' + O(η⁴); at a small η what is left is rounding, of the model and of η v
    itself.

    Args:
        base: H and S at η = 0, nats, [N, T].
        plus: the same at +η.
        minus: the same at −η.
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N], equal for sequences of the same prompt.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        baseline: b of samples.py, nats, [N, T]; None for 0.

    Returns:
        The symmetric difference with its influence-function error, nats per token or sequence.

    Raises:
        UserError: as change_sums, or fewer than two prompts.
    """
    sides = [
        change_sums(base, moved, mask, prompt_index, per=per, estimator=estimator, baseline=baseline)
        for moved in (plus, minus)
    ]
    check_prompt_count(*change_arrays(sides[0]))
    values = [change_of(*(x.sum() for x in change_arrays(side))) for side in sides]
    influence = np.mean([influence_change(side) for side in sides], axis=0)
    return Estimate(
        value=float(sum(values) / 2),
        stderr=influence_error(influence),
        n=len(influence),
        unit=f"nats/{per}",
        method=f"{METHOD[estimator]}, symmetric difference at ±eta; {ERROR['influence']}",
    )


def integrated_change(
    node_sums: Sequence[PromptSums], weights: ArrayLike, *, error: ErrorKind = "influence"
) -> Estimate:
    """ΔH = Σ_j W_j h'(s_j), the integral of the estimator's own derivative; nats per token or sequence.

    Args:
        node_sums: J per-prompt sums with first derivatives, taken at the nodes s_j, of the same prompts.
        weights: [J], one row of quadrature.integral_weights.
        error: "influence" or "jackknife", both over prompts.

    Raises:
        UserError: weights and nodes do not fit, nodes of different samples, fewer than two prompts.
    """
    check_error(error)
    W, arrays = node_arrays(node_sums, weights)
    B = check_prompt_count(*arrays)
    first = node_sums[0]
    if error == "jackknife":
        value, stderr, _ = jackknife(lambda *totals: integral_of(W, *totals), *arrays)
    else:
        value = float(integral_of(W, *(x.sum(axis=0) for x in arrays)))
        stderr = influence_error(np.stack([influence_first(node) for node in node_sums], axis=-1) @ W)
    method = f"{METHOD[first.estimator]}, derivative integrated over {len(W)} nodes; {ERROR[error]}"
    return Estimate(value=value, stderr=stderr, n=B, unit=first.unit, method=method)


def integrated_difference(
    changed: tuple[Sequence[PromptSums], ArrayLike], base: tuple[Sequence[PromptSums], ArrayLike]
) -> Estimate:
    """ΔH along one path minus ΔH along another, on the same samples: paired influence-function error.

    Args:
        changed: per-prompt sums at the nodes of one path and their weights, as in integrated_change.
        base: those of the other; from the same prompts in the same order.

    Raises:
        UserError: as integrated_change, or different numbers of prompts.
    """
    one, other = (integrated_change(*path) for path in (changed, base))
    pulls = [
        np.stack([influence_first(node) for node in nodes], axis=-1) @ np.asarray(weights, dtype=np.float64)
        for nodes, weights in (changed, base)
    ]
    check_prompt_count(*pulls)
    return Estimate(
        value=one.value - other.value,
        stderr=influence_error(pulls[0] - pulls[1]),
        n=one.n,
        unit=one.unit,
        method=f"difference of two paths on the same samples: {one.method}",
    )


def integration_error(node_sums: Sequence[PromptSums], error_weights: ArrayLike) -> float:
    """|Σ_j (W − W_sub)_j h'(s_j)|: the rule against the nested one, nats per token or sequence.

    Args:
        node_sums: as in integrated_change.
        error_weights: [J], one row of quadrature.nested_error_weights.

    Raises:
        UserError: weights and nodes do not fit, nodes of different samples, fewer than two prompts.
    """
    W, _ = node_arrays(node_sums, error_weights)
    return abs(float(W @ [first_derivative(node).value for node in node_sums]))


# --- functions of totals, any leading axes -----------------------------------------------------------------


def change_of(X: FloatArray, E: FloatArray, N0: FloatArray, D0: FloatArray) -> FloatArray:
    """(X − h₀ E)/(D₀ + E)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (X - N0 / D0 * E) / (D0 + E)


def change_arrays(sums: ChangeSums) -> tuple[FloatArray, ...]:
    """(X, E, N₀, D₀), each [B]."""
    return sums.change, sums.excess, sums.base_numerator, sums.base_denominator


def influence_change(sums: ChangeSums) -> FloatArray:
    """IF_n = [X_n − h₀E_n − E (N₀_n − h₀D₀_n)/D₀ − ΔH (D₀_n + E_n)]/(D₀ + E), [B]: how much prompt n pulls ΔH."""
    Xn, En, N0n, D0n = change_arrays(sums)
    X, E, N0, D0 = (x.sum() for x in change_arrays(sums))
    with np.errstate(divide="ignore", invalid="ignore"):
        h0 = N0 / D0
        own = Xn - h0 * En - E * (N0n - h0 * D0n) / D0
        return (own - change_of(X, E, N0, D0) * (D0n + En)) / (D0 + E)


def integral_of(W: FloatArray, N: FloatArray, D: FloatArray, N1: FloatArray, D1: FloatArray) -> FloatArray:
    """Σ_j W_j h'_j for totals [..., J]."""
    return first_of(N, D, N1, D1) @ W


def node_arrays(
    node_sums: Sequence[PromptSums], weights: ArrayLike
) -> tuple[FloatArray, tuple[FloatArray, ...]]:
    """Weights [J] and (N, D, N', D'), each [B, J].

    Raises:
        UserError: weights and nodes do not fit, or nodes of different samples or kinds.
    """
    W = np.asarray(weights, dtype=np.float64)
    if W.shape != (len(node_sums),) or not len(W):
        raise UserError(
            f"weights has shape {W.shape} for {len(node_sums)} nodes, expected one weight per node: pass one "
            "row of integral_weights."
        )
    kinds = {(sums.per, sums.estimator, len(sums.numerator)) for sums in node_sums}
    if len(kinds) != 1:
        raise UserError(
            f"node_sums mixes (per, estimator, prompts) {sorted(kinds)}, expected one and the same."
        )
    columns = zip(*(arrays_first(sums) for sums in node_sums), strict=True)
    return W, tuple(np.stack(column, axis=-1) for column in columns)
