r"""What multiplies each token's gradient in the gradient of h at η = 0 (docs/theory.md, sections 6 and 7).

In the letters of samples.py, with y_k = w_k (H_k − h c_k) and D = Σ w c, varying H and S in h = N/D gives

    dh = (dN − h dD)/D = Σ_k [w_k dH_k + y_k (R dS)_k]/D = Σ_k q_k dH_k + g_k dS_k,
    q = w/D,   g = Rᵀ y/D.

At η = 0, w = 1. Moving along v, with w' = A = R S', D' = Σ A c and y' = A (H − h c) + H' − h' c,

    q̇ = (A − D'/D)/D,   ġ = Rᵀ y'/D − g D'/D.

A baseline b (samples.py) adds −M to N, whose cotangent of S_j at 0 is −b_j, with the derivative −(b_j a_{j+1} + Σ_{k>j} b_k S'_k)
along v, a_{j+1} = Σ_{k≤j} S'_k; h' then includes −M'.

Then ∇h = Σ q ∇H + g ∇S, and its derivative along v is Σ q̇ ∇H + ġ ∇S + q ∇H' + g ∇S'.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .samples import (
    EstimatorKind,
    FloatArray,
    Per,
    TokenTangents,
    TokenValues,
    baseline_terms,
    check_baseline,
    check_mask,
    check_names,
    counted,
    on_mask,
    reach,
    reach_transposed,
)


class Cotangents(NamedTuple):
    """Weights of ∇H_k and ∇S_k, each float64 [N, T], 0 outside the mask."""

    entropy: FloatArray  # q
    logprob: FloatArray  # g


def token_cotangents(
    values: TokenValues,
    mask: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    baseline: ArrayLike | None = None,
) -> Cotangents:
    """(q, g) with ∇h = Σ q ∇H + g ∇S at η = 0: q = 1/D, g = [Rᵀ(H − h c) − b]/D.

    Written out, per token: per_decision g_j = Σ_{k>j}(H_k − h)/ΣT, whole_sequence g_j = (Σ_k H_k − h T_i)/ΣT;
    per sequence with n sequences: Σ_{k>j} H_k/n and (Σ_k H_k − h)/n; path: 0.

    Args:
        values: H and S at η = 0, nats, [N, T]; S is not read.
        mask: bool [N, T], True on response tokens.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        baseline: b, nats, [N, T]; None for 0.

    Raises:
        UserError: shapes, dtypes or names do not fit, or a row without a response token.
    """
    check_names(per, estimator)
    mask = check_mask(mask)
    b = check_baseline(baseline, mask, estimator)
    H, c = on_mask(values.entropy, mask, "values.entropy"), counted(mask, per)
    D = c.sum()
    h = H.sum() / D
    g = (reach_transposed(H - h * c, estimator) - (0.0 if b is None else b)) / D
    return Cotangents(mask / D, np.where(mask, g, 0.0))


def token_cotangent_tangents(
    values: TokenValues,
    tangents: TokenTangents,
    mask: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    baseline: ArrayLike | None = None,
) -> Cotangents:
    """(q̇, ġ), the derivative of token_cotangents along the direction of the tangents, at η = 0.

    Args:
        values: H and S at η = 0, nats, [N, T]; S is not read.
        tangents: H' and S' at η = 0, nats per unit η, [N, T].
        mask: bool [N, T], True on response tokens.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        baseline: b, nats, [N, T]; None for 0.

    Raises:
        UserError: shapes, dtypes or names do not fit, or a row without a response token.
    """
    g = token_cotangents(values, mask, per=per, estimator=estimator, baseline=baseline).logprob
    mask = check_mask(mask)
    b = check_baseline(baseline, mask, estimator)
    H, c = on_mask(values.entropy, mask, "values.entropy"), counted(mask, per)
    H1 = on_mask(tangents.d_entropy, mask, "tangents.d_entropy")
    S1 = on_mask(tangents.d_logprob, mask, "tangents.d_logprob")
    A = np.where(mask, reach(S1, estimator), 0.0)
    less = (
        0.0 if b is None else b * (reach(S1, "per_decision") + S1) + reach_transposed(b * S1, "per_decision")
    )

    D, D1 = c.sum(), (A * c).sum()
    h = H.sum() / D
    h1 = ((H1 + A * H).sum() - np.sum(baseline_terms(b, np.zeros_like(H), S1)[1]) - h * D1) / D
    y1 = A * (H - h * c) + H1 - h1 * c
    q1 = np.where(mask, A - D1 / D, 0.0) / D
    g1 = np.where(mask, reach_transposed(y1, estimator) - less, 0.0) / D - g * D1 / D
    return Cotangents(q1, g1)


def token_contributions(
    base: TokenValues,
    tangents: TokenTangents,
    mask: ArrayLike,
    *,
    per: Per,
    estimator: EstimatorKind,
    baseline: ArrayLike | None = None,
) -> FloatArray:
    """q_k H'_k + g_k S'_k, [N, T]: each token's share of h'(0), which is their sum.

    A token's score part sits with the token whose log-prob moves, not with the later ones whose weight it
    changes.

    Args:
        base: H and S at η = 0, nats, [N, T]; S is not read.
        tangents: H' and S' at η = 0, nats per unit η, [N, T].
        mask: bool [N, T], True on response tokens.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        baseline: b, nats, [N, T]; None for 0.

    Returns:
        Nats per token or sequence and unit η, float64 [N, T], 0 outside the mask.

    Raises:
        UserError: shapes, dtypes or names do not fit, or a row without a response token.
    """
    q, g = token_cotangents(base, mask, per=per, estimator=estimator, baseline=baseline)
    mask = check_mask(mask)
    H1 = on_mask(tangents.d_entropy, mask, "tangents.d_entropy")
    return q * H1 + g * on_mask(tangents.d_logprob, mask, "tangents.d_logprob")
