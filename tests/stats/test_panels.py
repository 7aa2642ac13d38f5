"""Panels integrate what one polynomial cannot, and their error estimate tells."""

from __future__ import annotations

import numpy as np
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.stats import integral_weights, nested_error_weights, panel_weights, radau_nodes, refine

ETAS = np.array([1e-9, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4])


def stiff(s):
    """Falls within 3e-6, then slowly, with a bump: what few samples with uneven weights give."""
    return -8000 * (np.exp(-s / 3e-6) + 0.4 * np.exp(-s / 3e-5)) + 300 * np.exp(-(((s - 6e-5) / 1e-5) ** 2))


def exact(eta):
    from scipy.integrate import quad

    points = [x for x in (3e-6, 1e-5, 3e-5, 6e-5) if x < eta]
    return quad(stiff, 0, eta, epsabs=0, epsrel=1e-12, limit=400, points=points or None)[0]


def adapt(f, rtol, most):
    breaks, nodes = [0.0, ETAS[-1]], list(radau_nodes(5, ETAS[-1]))
    while True:
        W, error_weights = panel_weights(breaks, nodes, ETAS)
        values = f(np.array(nodes))
        errors = np.abs(error_weights @ values)
        share = errors.sum(axis=0) / np.abs(W @ values)
        if share.max() <= rtol or len(nodes) >= most:
            return W @ values, errors.sum(axis=0), nodes, breaks
        breaks, new = refine(breaks, nodes, int(errors[:, share.argmax()].argmax()))
        nodes += new


def test_one_panel_is_one_polynomial():
    nodes = radau_nodes(5, 1e-4)
    W, error = panel_weights([0.0, 1e-4], nodes, ETAS)
    assert np.array_equal(W, integral_weights(nodes, ETAS))
    assert np.array_equal(error[0], nested_error_weights(nodes, ETAS))


def test_refinement_reaches_the_wanted_accuracy_on_a_stiff_curve():
    want = np.array([exact(eta) for eta in ETAS])
    got, errors, nodes, breaks = adapt(stiff, 1e-4, 80)
    assert len(breaks) > 2 and len(nodes) < 60
    assert (np.abs(got - want) <= 1e-4 * np.abs(want)).all()
    assert (np.abs(got - want) <= errors + 1e-13 * np.abs(want)).all()
    plain = integral_weights(radau_nodes(5, 1e-4), ETAS) @ stiff(radau_nodes(5, 1e-4))
    assert np.abs(plain / want - 1).max() > 0.05  # the curve is one that needs it


def test_relative_accuracy_at_tiny_eta_survives_splitting():
    got, _, _, _ = adapt(stiff, 1e-4, 80)
    assert got[0] == pytest.approx(exact(1e-9), rel=1e-7)


def test_pieces_of_different_polynomials_are_exact():
    def f(s):
        return np.where(
            s <= 2.0, s**2, 10 - 3 * s
        )  # continuous at no matter: the break is a node of both sides

    nodes = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    f_at = f(nodes)
    W, _ = panel_weights([0.0, 2.0, 4.0], nodes, [1.0, 2.0])
    assert W @ f_at == pytest.approx([1 / 3, 8 / 3])
    assert not W[:, 3:].any()


def test_refine_adds_then_splits():
    nodes = list(radau_nodes(5, 1.0))
    breaks = [0.0, 1.0]
    for count in (6, 7):
        breaks, new = refine(breaks, nodes, 0)
        nodes += new
        assert len(nodes) == count and breaks == [0.0, 1.0]
    breaks, new = refine(breaks, nodes, 0)
    assert new == [] and breaks[1] in nodes and len(breaks) == 3
    _, new = refine(breaks, nodes, 1)
    assert breaks[1] < new[0] <= 1.0


def test_a_left_end_must_be_a_node():
    with pytest.raises(UserError, match="0"):
        panel_weights([0.0, 0.5, 1.0], [0.0, 0.2, 0.4, 0.6, 1.0], [1.0])
