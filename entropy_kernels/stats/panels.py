r"""The integral of a curve that is too stiff for one polynomial: panels, refined where the error is (docs/theory.md, section 5).

Panels are neighbouring intervals [b_p, b_{p+1}] that start at 0. On each the polynomial through the nodes inside it (ends
included) is integrated, so that

    ∫₀^η f ≈ Σ_p ∫_{b_p}^{min(η, b_{p+1})} polynomial_p = Σ_j W_j(η) f(s_j).

Every left end is a node, which keeps the relative accuracy of `quadrature` as η → 0. With one panel this is `quadrature`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .quadrature import integral_weights, nested_error_weights, next_node
from .samples import FloatArray

MOST_IN_A_PANEL = 7  # a polynomial of higher degree than 6 helps less than two of lower degree


def panel_weights(breaks: ArrayLike, nodes: ArrayLike, etas: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """(W [E, n], error weights [P, E, n]): ∫₀^{η_e} f ≈ Σ_j W_ej f(s_j); panel p is off by about |Σ_j (error weights)_pej f(s_j)|.

    Args:
        breaks: [P + 1] increasing, from 0 to the largest η. Each but the last is a node.
        nodes: [n] distinct, in any order; at least two in each panel.
        etas: [E] upper ends within the panels.

    Raises:
        UserError: a left end that is not a node, or a panel with fewer than two nodes.
    """
    ends, s, eta = (np.asarray(x, dtype=np.float64) for x in (breaks, nodes, etas))
    W = np.zeros((len(eta), len(s)))
    error = np.zeros((len(ends) - 1, len(eta), len(s)))
    for p, (low, high) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        inside = (s >= low) & (s <= high)
        shifted, upper = s[inside] - low, np.clip(eta, low, high) - low
        W[:, inside] += integral_weights(shifted, upper)
        error[p][:, inside] = nested_error_weights(shifted, upper)
    return W, error


def refine(breaks: ArrayLike, nodes: ArrayLike, panel: int) -> tuple[list[float], list[float]]:
    """(breaks, nodes to evaluate) after one refinement of a panel: one more node, or, once it is full, a split at its middle node.

    Args:
        breaks: [P + 1] as in panel_weights.
        nodes: [n] as in panel_weights.
        panel: which one to refine.

    Returns:
        The new breaks, and the new nodes: one, or none where a panel was split.
    """
    ends = [float(x) for x in np.asarray(breaks, dtype=np.float64)]
    low, high = ends[panel], ends[panel + 1]
    inside = np.sort([s for s in np.asarray(nodes, dtype=np.float64) if low <= s <= high])
    if len(inside) < MOST_IN_A_PANEL:
        return ends, [low + next_node(inside - low, high - low)]
    return [*ends[: panel + 1], float(inside[len(inside) // 2]), *ends[panel + 1 :]], []
