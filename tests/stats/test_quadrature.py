from __future__ import annotations

import numpy as np
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.stats import integral_weights, nested_error_weights, next_node, radau_nodes

ETA_MAX = 1e-4
ETAS = ETA_MAX * 10.0 ** np.arange(0, -11, -1)  # down to 1e-10 of the interval


def primitive(coefficients, etas):
    """∫₀^η Σ_p a_p (s/η_max)^p ds."""
    y = etas / ETA_MAX
    return ETA_MAX * sum(a * y ** (p + 1) / (p + 1) for p, a in enumerate(coefficients))


def polynomial(coefficients, s):
    return sum(a * (s / ETA_MAX) ** p for p, a in enumerate(coefficients))


def test_radau_nodes_are_the_known_ones():
    assert radau_nodes(1, 2.0).tolist() == [0.0]
    np.testing.assert_allclose(radau_nodes(2, 3.0), [0, 2.0], rtol=1e-15)
    np.testing.assert_allclose(radau_nodes(3, 1.0), [0, (6 - 6**0.5) / 10, (6 + 6**0.5) / 10], rtol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12])
def test_polynomials_are_exact_at_every_eta(n):
    """Degree n − 1 anywhere, to rounding relative to the value itself, also at 1e-10 of the interval."""
    nodes = radau_nodes(n, ETA_MAX)
    coefficients = 1.0 / (1 + np.arange(n))  # all positive: the integral itself is well conditioned
    got = integral_weights(nodes, ETAS) @ polynomial(coefficients, nodes)
    np.testing.assert_allclose(got, primitive(coefficients, ETAS), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_the_whole_interval_is_exact_to_degree_2n_minus_2(n):
    nodes = radau_nodes(n, ETA_MAX)
    weights = integral_weights(nodes, ETA_MAX)[0]
    for degree, exact in ((2 * n - 2, True), (2 * n - 1, False)):
        got = weights @ (nodes / ETA_MAX) ** degree
        assert (abs(got * (degree + 1) / ETA_MAX - 1) < 1e-12) == exact


def test_relative_accuracy_holds_as_eta_goes_to_zero():
    nodes = radau_nodes(5, ETA_MAX)
    got = integral_weights(nodes, ETAS) @ np.exp(-nodes / ETA_MAX)
    exact = -ETA_MAX * np.expm1(-ETAS / ETA_MAX)
    relative = np.abs(got / exact - 1)
    assert relative.max() < 1e-4
    # The interpolation error vanishes at the node 0, so inside the interval the relative error falls with η.
    np.testing.assert_allclose(relative[3:7], 0.1 * relative[2:6], rtol=0.1)
    assert relative[-3:].max() < 1e-11
    single = integral_weights(nodes, ETAS)
    np.testing.assert_allclose(single[-1] / ETAS[-1], [1, 0, 0, 0, 0], atol=1e-8)


def test_order_of_the_nodes_and_sign_of_eta_do_not_matter():
    nodes = radau_nodes(4, ETA_MAX)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        integral_weights(nodes[order], ETAS), integral_weights(nodes, ETAS)[:, order], rtol=1e-12
    )
    f = polynomial([1, 2, 3], nodes)
    np.testing.assert_allclose(integral_weights(nodes, -ETAS) @ f, primitive([1, 2, 3], -ETAS), rtol=1e-12)
    assert not integral_weights(nodes, [0.0]).any()


def test_nested_error_is_the_difference_to_a_smaller_rule():
    nodes = radau_nodes(5, ETA_MAX)
    etas = ETA_MAX * np.linspace(0.02, 1, 40)
    got = nested_error_weights(nodes, etas)
    full = integral_weights(nodes, etas)
    differences = []
    for d in range(1, 5):
        smaller = np.zeros_like(full)
        smaller[:, np.arange(5) != d] = integral_weights(np.delete(nodes, d), etas)
        differences.append(full - smaller)
    f = np.exp(nodes / ETA_MAX)
    sizes = np.abs(np.stack(differences) @ f)  # [d, eta]
    np.testing.assert_allclose(np.abs(got @ f), sizes.max(axis=0), rtol=1e-7)
    assert (sizes.min(axis=0) < 0.02 * sizes.max(axis=0)).any()  # a fixed choice would be blind somewhere
    # Degree n − 2 leaves nothing, and what is left bounds the error of the full rule at every eta.
    cubic = polynomial([1, 1, 1, 1], nodes)
    assert (np.abs(got @ cubic) < 1e-12 * primitive([1, 1, 1, 1], etas)).all()
    for rate in (1.0, 3.0):
        error = np.abs(
            full @ np.exp(rate * nodes / ETA_MAX) - ETA_MAX / rate * np.expm1(rate * etas / ETA_MAX)
        )
        assert (error < np.abs(got @ np.exp(rate * nodes / ETA_MAX))).all()


def test_nested_error_keeps_its_relative_size_at_tiny_eta():
    nodes = radau_nodes(5, ETA_MAX)
    f = np.exp(nodes / ETA_MAX)
    relative = np.abs(nested_error_weights(nodes, ETAS) @ f) / ETAS
    # Proportional to η relative to the integral, as the true error is.
    np.testing.assert_allclose(relative[3:] / relative[2:-1], 0.1, rtol=0.05)
    np.testing.assert_allclose(relative[5:] / relative[4:-1], 0.1, rtol=1e-3)


def test_next_node_is_the_leja_point():
    nodes = radau_nodes(4, ETA_MAX)
    grid = np.linspace(0, ETA_MAX, 200_001)
    expected = grid[np.abs(np.prod(grid[:, None] - nodes, axis=1)).argmax()]
    assert next_node(nodes, ETA_MAX) == pytest.approx(expected, abs=1e-5 * ETA_MAX)
    assert next_node([0.0], ETA_MAX) == ETA_MAX
    assert next_node([0.0, 1.0], 1.0) == pytest.approx(0.5, abs=1e-6)
    assert next_node([1.0, 0.0, 0.5], 1.0) == pytest.approx(0.5 - 12**-0.5, abs=1e-6) or next_node(
        [1.0, 0.0, 0.5], 1.0
    ) == pytest.approx(0.5 + 12**-0.5, abs=1e-6)


def test_added_nodes_converge_where_the_curve_is_stiff():
    def f(s):
        return 1 / (1 + 25 * s**2)  # poles near the interval

    exact = np.arctan(5) / 5
    nodes = list(radau_nodes(4, 1.0))
    errors, estimates = [], []
    for _ in range(12):
        nodes.append(next_node(nodes, 1.0))
        values = f(np.array(nodes))
        errors.append(abs(integral_weights(nodes, 1.0)[0] @ values - exact))
        estimates.append(abs(nested_error_weights(nodes, 1.0)[0] @ values))
    assert errors[-1] < 1e-6 < errors[0]
    assert estimates[-1] < 1e-3 * estimates[0]


def test_bad_nodes_are_refused():
    for bad, what in (
        ([0.1, 0.2], "exactly 0"),
        ([0.0, 0.1, 0.1], "distinct"),
        ([0.0, np.nan], "finite"),
        ([[0.0, 1.0]], "distinct finite"),
    ):
        with pytest.raises(UserError, match=what):
            integral_weights(bad, [0.1])
    with pytest.raises(UserError, match="one entry"):
        nested_error_weights([0.0], [0.1])
    with pytest.raises(UserError, match="eta_max is -1"):
        radau_nodes(3, -1)
    with pytest.raises(UserError, match="n is 0"):
        radau_nodes(0, 1.0)
    with pytest.raises(UserError, match="span"):
        next_node([0.0, 2.0], 1.0)
