r"""δH₁ from one batch in both roles, without a prompt multiplying itself (docs/theory.md, section 11).

    X_n = Σ_{i∈n} x_i ∇S_i,   Y_n = Σ_{i∈n} y_i P∇S_i,   x_i = (f_i − f̄_{−i})/G,
    U = mean of X_n·Y_m over n ≠ m = [B² X̄·Ȳ − Σ X_n·Y_n]/(B(B−1)).

With f = S, E[X] = −∇𝓗 and δH₁ = −ηU per sequence (y_i = ω_i A_i times the number of prompts, P frozen). For the entropy per token
f = (S + hT)/T̄, as ∇h = (∇𝓗 − h∇E[T])/E[T]. All of it is arithmetic on the Gram matrix K_ij = ∇S_iᵀP∇S_j.

With the symmetrised h(n, m) = ½(X_n·Y_m + X_m·Y_n) = μ + g₁(n) + g₁(m) + g₂(n, m), ζ₁ = Var(g₁), ζ₂ = Var(g₂),

    Var(U) = 4ζ₁/B + 2ζ₂/(B(B−1)).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .estimate import Estimate
from .samples import FloatArray, by_prompt

BOOTSTRAP = 1000


class OneBatch(NamedTuple):
    """U with its error in three ways.

    u: value and jackknife error. The jackknife's variance has mean 4ζ₁/B + 4ζ₂/(B(B−2)), above the true one.
    zeta_1, zeta_2: unbiased, and therefore sometimes negative.
    variance: Hoeffding's with these, unbiased, and sometimes negative.
    bootstrap_stderr: over prompts; pairs of a prompt with itself are left out of every draw.
    """

    u: Estimate
    zeta_1: float
    zeta_2: float
    variance: float
    bootstrap_stderr: float


def leave_one_out(f: ArrayLike, prompt_index: ArrayLike) -> FloatArray:
    """x_i = (f_i − mean of f over the other responses to the prompt)/G, [N]: a score's weight whose baseline costs no bias.

    Args:
        f: [N], one number per response, such as its log-prob.
        prompt_index: integers [N], equal for responses to the same prompt.

    Raises:
        UserError: shapes do not fit, or a prompt with a single response.
    """
    values, index = np.asarray(f, dtype=np.float64), np.asarray(prompt_index)
    if values.ndim != 1 or values.shape != index.shape:
        raise UserError(f"f has shape {values.shape}, prompt_index {index.shape}; expected both [N].")
    _, inverse = np.unique(index, return_inverse=True)
    size = np.bincount(inverse)
    if size.min() < 2:
        raise UserError(
            f"{int((size < 2).sum())} of {len(size)} prompts have a single response, expected two at least: the baseline of a response "
            "is the mean of the others. Draw more responses per prompt."
        )
    G = size[inverse]
    total = by_prompt(values, inverse, len(size))[inverse]
    return (values - (total - values) / (G - 1)) / G


def pair_products(
    K: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    prompt_index: ArrayLike,
    other_prompt_index: ArrayLike | None = None,
) -> FloatArray:
    """Q_nm = X_n·Y_m = Σ_{i∈n} Σ_{j∈m} x_i K_ij y_j, [B, B'].

    Args:
        K: Gram matrix ∇S_iᵀP∇S_j, [N, M].
        x: weights of the rows, [N].
        y: weights of the columns, [M].
        prompt_index: integers [N], of the rows.
        other_prompt_index: integers [M], of the columns; None for those of the rows (one batch).

    Raises:
        UserError: shapes do not fit.
    """
    gram, rows, columns = (np.asarray(a, dtype=np.float64) for a in (K, x, y))
    index = np.asarray(prompt_index)
    others = index if other_prompt_index is None else np.asarray(other_prompt_index)
    if gram.shape != (len(rows), len(columns)) or index.shape != rows.shape or others.shape != columns.shape:
        raise UserError(
            f"K has shape {gram.shape}, x {rows.shape}, y {columns.shape}, the prompt indices {index.shape} and {others.shape}; "
            "expected [N, M], [N], [M], [N] and [M]."
        )
    membership = [(np.unique(i)[:, None] == i).astype(np.float64) for i in (index, others)]
    product: FloatArray = (membership[0] * rows) @ gram @ (membership[1] * columns).T
    return product


def one_batch(products: ArrayLike, *, unit: str, seed: int = 0, draws: int = BOOTSTRAP) -> OneBatch:
    """U, its Hoeffding variances and its errors from Q_nm = X_n·Y_m of one batch.

    Args:
        products: [B, B], from pair_products; the diagonal is left out.
        unit: of U.
        seed: of the bootstrap.
        draws: of the bootstrap.

    Raises:
        UserError: not square, or fewer than four prompts.
    """
    Q = np.asarray(products, dtype=np.float64)
    B = len(Q)
    if Q.shape != (B, B) or B < 4:
        raise UserError(
            f"products has shape {Q.shape}, expected [B, B] with B ≥ 4 prompts: ζ₁ and ζ₂ are not to be had from fewer."
        )
    h = (Q + Q.T) / 2
    np.fill_diagonal(h, 0.0)
    pairs = B * (B - 1)
    U = h.sum() / pairs
    r = h.sum(axis=1) / (B - 1)
    zeta_1, zeta_2 = hoeffding(h, r, float(U))
    stderr = 2 * (B - 1) / (B - 2) * np.sqrt(np.sum((r - U) ** 2) / (B * (B - 1)))
    return OneBatch(
        u=Estimate(
            value=float(U),
            stderr=float(stderr),
            n=B,
            unit=unit,
            method="U-statistic over pairs of different prompts; jackknife over prompts",
        ),
        zeta_1=zeta_1,
        zeta_2=zeta_2,
        variance=4 * zeta_1 / B + 2 * zeta_2 / pairs,
        bootstrap_stderr=_bootstrap(h, seed, draws),
    )


def hoeffding(h: FloatArray, r: FloatArray, U: float) -> tuple[float, float]:
    """Unbiased (ζ₁, ζ₂) from the symmetric h [B, B] with zero diagonal, its row means r and their mean U.

    ζ̂₁ = Σ(r_n − U)²/(B−1) and σ̂² = mean of (h − U)² over pairs have the means
        ((B−2)/(B−1))² ζ₁ + (B−2)/(B−1)² ζ₂   and   2(B−2)/B ζ₁ + (B−2)(B+1)/(B(B−1)) ζ₂,
    two equations that are solved here. (The jackknife's ζ₁ is ((B−1)/(B−2))² ζ̂₁ identically: no second opinion.)
    """
    B = len(r)
    off = ~np.eye(B, dtype=bool)
    found = [np.sum((r - U) ** 2) / (B - 1), np.mean((h[off] - U) ** 2)]
    means = [
        [((B - 2) / (B - 1)) ** 2, (B - 2) / (B - 1) ** 2],
        [2 * (B - 2) / B, (B - 2) * (B + 1) / (B * (B - 1))],
    ]
    zeta_1, zeta_2 = np.linalg.solve(np.array(means), np.array(found))
    return float(zeta_1), float(zeta_2)


def _bootstrap(h: FloatArray, seed: int, draws: int) -> float:
    """Spread of Σ_{n≠m} k_n k_m h_nm/Σ_{n≠m} k_n k_m over multinomial k."""
    B = len(h)
    k: NDArray[np.int64] = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=draws)
    pairs = k.sum(axis=1) ** 2 - (k**2).sum(axis=1)
    values = np.einsum("dn,nm,dm->d", k, h, k, optimize=True) / pairs
    return float(values.std(ddof=1))
