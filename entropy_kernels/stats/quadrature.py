r"""∫₀^η f(s) ds for every η of a sweep from one set of nodes that includes 0 (docs/theory.md, section 5).

The polynomial through (s_j, f_j) is integrated from 0 to η:

    W_j(η) = ∫₀^η ℓ_j(s) ds,   ℓ_j(s) = Π_{k≠j} (s − s_k)/(s_j − s_k).

As η → 0, W → η on the node 0 and O(η²) elsewhere, so Σ W_j f_j goes to η f(0) with full relative
accuracy; without a node at 0 the value there would be an extrapolation, with an error that does not vanish
relative to η.

Everything is computed on x = s/max|s_j|. Each ℓ_j is evaluated as a product of its factors, which keeps its
relative accuracy near 0 (an expanded polynomial would not), and integrated exactly by Gauss-Legendre on [0, η].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import roots_jacobi, roots_legendre

from ..errors import UserError
from .samples import FloatArray


def radau_nodes(n: int, eta_max: float) -> FloatArray:
    """The n nodes of the left Radau rule on [0, eta_max], increasing, the first exactly 0; float64 [n].

    On [−1, 1] they are −1 and the roots of the Jacobi polynomial P_{n−1}^{(0,1)}: the weight (1 + x) is what
    the fixed node takes.

    Raises:
        UserError: n < 1, or eta_max not positive and finite.
    """
    if n < 1:
        raise UserError(f"n is {n}, expected 1 node at least.")
    check_eta_max(eta_max)
    inner = roots_jacobi(n - 1, 0.0, 1.0)[0] if n > 1 else np.empty(0)
    return np.concatenate([[0.0], eta_max * (1 + inner) / 2])


def integral_weights(nodes: ArrayLike, etas: ArrayLike) -> FloatArray:
    """W[e, j] = ∫₀^{η_e} ℓ_j(s) ds, float64 [len(etas), n], so that ∫₀^η f ≈ Σ_j W_j f(s_j).

    Exact for polynomials of degree n − 1 at any η, and 2n − 2 at η = eta_max of Radau nodes.

    Args:
        nodes: [n] distinct, in any order, one of them 0.
        etas: [E] upper ends; a number counts as one.

    Raises:
        UserError: nodes without 0, repeated or not finite.
    """
    x, y, scale = _scaled(nodes, etas)
    weights = [_integral(y, np.delete(x, j)) / np.prod(x[j] - np.delete(x, j)) for j in range(len(x))]
    return scale * np.stack(weights, axis=-1)


def nested_error_weights(nodes: ArrayLike, etas: ArrayLike) -> FloatArray:
    """W − W_sub per η, float64 [len(etas), n]: |Σ_j (W − W_sub)_j f(s_j)| estimates the error.

    W_sub is the rule on all nodes but s_d. The interpolants differ by f[s_0..s_{n−1}] Π_{k≠d}(s − s_k), so

        (W − W_sub)_j = ∫₀^η Π_{k≠d} (s − s_k) ds / Π_{k≠j} (s_j − s_k).

    The dropped node is, for each η, the one that makes this largest, never the node 0: a fixed choice would
    have an η where the integral vanishes and the estimate says 0 for no reason. The full rule is
    better than this says, by orders of magnitude at η = eta_max of Radau nodes, whose exactness doubles there.

    Args:
        nodes: [n] distinct, in any order, one of them 0; n ≥ 2.
        etas: [E] upper ends; a number counts as one.

    Raises:
        UserError: one node only, nodes without 0, repeated or not finite.
    """
    x, y, scale = _scaled(nodes, etas)
    if len(x) < 2:
        raise UserError("nodes has one entry, expected 2 at least: a single node leaves no smaller rule.")
    dropped = np.stack([_integral(y, np.delete(x, d)) for d in range(len(x)) if x[d] != 0.0])
    largest = np.take_along_axis(dropped, np.abs(dropped).argmax(axis=0)[None], axis=0)[0]
    divided_difference = np.array([1 / np.prod(x[j] - np.delete(x, j)) for j in range(len(x))])
    return scale * largest[:, None] * divided_difference


def next_node(nodes: ArrayLike, eta_max: float) -> float:
    """The argmax over [0, eta_max] of Π_j |s − s_j|: the Leja point, where one more node helps most.

    Between neighbouring nodes log Π|s − s_j| is concave, so each gap has one maximum; beyond the last node
    the product only grows.

    Args:
        nodes: [n] distinct, one of them 0, within [0, eta_max].
        eta_max: the end of the interval.

    Raises:
        UserError: nodes outside [0, eta_max], without 0, repeated or not finite.
    """
    check_eta_max(eta_max)
    x = np.sort(check_nodes(nodes)) / eta_max
    if x[0] < 0 or x[-1] > 1:
        raise UserError(f"nodes span [{x[0] * eta_max:g}, {x[-1] * eta_max:g}], expected [0, {eta_max:g}].")

    def log_product(u: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.log(np.abs(u - x)).sum())

    gaps = [
        minimize_scalar(
            lambda u: -log_product(u), bounds=(low, high), method="bounded", options={"xatol": 1e-9}
        ).x
        for low, high in zip(x[:-1], x[1:], strict=True)
    ]
    return eta_max * max([*map(float, gaps), 1.0], key=log_product)


def check_nodes(nodes: ArrayLike) -> FloatArray:
    """Nodes as float64 [n].

    Raises:
        UserError: not one-dimensional, without 0, repeated or not finite.
    """
    checked = np.asarray(nodes, dtype=np.float64)
    if checked.ndim != 1 or not np.isfinite(checked).all() or len(np.unique(checked)) != checked.size:
        raise UserError(f"nodes is {checked}, expected distinct finite numbers [n].")
    if not (checked == 0.0).any():
        raise UserError(
            f"nodes is {checked}, expected one to be exactly 0: without it the result loses all relative "
            "accuracy as eta goes to 0. Start from radau_nodes."
        )
    return checked


def check_eta_max(eta_max: float) -> None:
    """Refuse an interval that is none.

    Raises:
        UserError: eta_max is not positive and finite.
    """
    if not (np.isfinite(eta_max) and eta_max > 0):
        raise UserError(f"eta_max is {eta_max}, expected a positive finite number.")


def _scaled(nodes: ArrayLike, etas: ArrayLike) -> tuple[FloatArray, FloatArray, float]:
    checked = check_nodes(nodes)
    scale = float(np.abs(checked).max()) or 1.0  # the node 0 alone has no scale of its own
    return checked / scale, np.atleast_1d(np.asarray(etas, dtype=np.float64)) / scale, scale


def _integral(y: FloatArray, roots: FloatArray) -> FloatArray:
    """∫₀^y Π_k (u − root_k) du for y [E], exact up to rounding."""
    points, weights = roots_legendre(len(roots) // 2 + 1)
    u = y[:, None] * (1 + points) / 2
    return y / 2 * (np.prod(u[..., None] - roots, axis=-1) @ weights)
