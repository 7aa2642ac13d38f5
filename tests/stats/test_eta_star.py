from __future__ import annotations

import json
import math

import numpy as np
import pytest
from enumerable import COMBOS, draw, population, ratio_derivatives
from test_prompt_sums import batch_sums

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    PromptSums,
    eta_star,
    first_derivative,
    jackknife,
    linear_change,
    quadratic_change,
    second_derivative,
)
from entropy_kernels.stats.linear import fieller_reach
from entropy_kernels.stats.ratio import first_of, second_of


def made(first, second):
    """Sums whose h' and h'' are plain means of the arrays given."""
    one, zero = np.ones(len(first)), np.zeros(len(first))
    return PromptSums(one, one, "sequence", "path", np.asarray(first), zero, np.asarray(second), zero)


@pytest.mark.parametrize(
    ("a", "b"), [(3.0, 2.0), (-3.0, 2.0), (0.5, 2.0), (3.0, 0.5), (0.5, 0.4), (-3.0, -0.5), (0.0, 2.0)]
)
@pytest.mark.parametrize("V12", [0.0, 0.7, -0.7])
def test_interval_is_the_set_of_ratios_not_rejected(a, b, V12):
    t = 2.0
    low, high = fieller_reach(a, b, 1.0, V12, 0.8, t)
    # ρ on a grid through tan, so that both ends of the line are covered.
    rho = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 400_001)[1:-1])
    inside = np.abs(rho[(a - rho * b) ** 2 <= t**2 * (1 - 2 * rho * V12 + rho**2 * 0.8)])
    assert low == pytest.approx(inside.min(), rel=1e-3, abs=1e-4)
    if b**2 > t**2 * 0.8:
        assert high == pytest.approx(inside.max(), rel=1e-3)
    else:
        assert high == math.inf and inside.max() > 1e4


def test_interval_without_error_is_the_ratio_and_nan_stays():
    assert fieller_reach(-6.0, 2.0, 0.0, 0.0, 0.0, 2.0) == (3.0, 3.0)
    assert fieller_reach(0.0, 2.0, 0.0, 0.0, 0.0, 2.0) == (0.0, 0.0)
    assert fieller_reach(1.0, 0.0, 0.0, 0.0, 0.0, 2.0) == (math.inf, math.inf)
    assert all(math.isnan(x) for x in fieller_reach(math.nan, 2.0, 1.0, 0.0, 1.0, 2.0))


def test_small_errors_keep_their_digits():
    """Numbers as met in practice: 2e3, 5e8 and errors of 1e-9 of them."""
    low, high = fieller_reach(2e3, 5e8, (2e-6) ** 2, 0.0, 0.5**2, 1.0)
    half = 4e-6 * math.hypot(1e-9, 1e-9)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4, abs=0)


def test_resolved_or_not():
    rng = np.random.default_rng(51)
    noise = rng.normal(size=(2, 50))
    sharp = eta_star(made(4 + noise[0], -8 + noise[1]))
    assert sharp.resolved and sharp.low < sharp.value < sharp.high and sharp.n == 50
    assert sharp.value == pytest.approx(1.0, rel=0.1)
    assert f"({100 * sharp.level:g} %: " in str(sharp)
    blunt = eta_star(made(4 + noise[0], 0.05 + noise[1]))
    assert not blunt.resolved and blunt.high == math.inf
    assert 0 < blunt.low < blunt.value
    assert str(blunt).startswith("not resolved (95 %: above")
    nothing = eta_star(made(noise[0], noise[1]))
    assert not nothing.resolved and nothing.low == 0.0
    flat = eta_star(made(4 + noise[0], 0 * noise[1]))
    assert flat.value == math.inf and not flat.resolved
    undefined = eta_star(made(4 + noise[0], np.nan * noise[1]))
    assert math.isnan(undefined.value) and math.isnan(undefined.low) and not undefined.resolved
    assert json.loads(json.dumps(sharp.to_json())) == sharp.to_json()


def test_interval_covers_also_with_a_doubtful_denominator():
    """h'' at 2.5 standard errors from 0, correlated with h': the linearised interval would miss far more often."""
    rng = np.random.default_rng(52)
    replications, B = 2000, 40
    z = rng.standard_normal((replications, 2, B))
    first, second = 1.5 + z[:, 0], 2.5 / math.sqrt(B) + 0.6 * z[:, 0] + 0.8 * z[:, 1]
    truth = 2 * 1.5 / (2.5 / math.sqrt(B))
    stars = [eta_star(made(a, b)) for a, b in zip(first, second, strict=True)]
    covered = np.mean([star.low <= truth <= star.high for star in stars])
    assert 0.935 < covered < 0.965
    assert 0.2 < np.mean([star.resolved for star in stars]) < 0.9


@pytest.mark.parametrize(("per", "estimator"), COMBOS)
def test_predictions_and_range_on_the_enumerable_policy(per, estimator):
    sums = batch_sums(draw(3000, 2, seed=53), 0.0, per, estimator)
    first, second = first_derivative(sums), second_derivative(sums)
    assert linear_change(sums, -0.1).value == pytest.approx(-0.1 * first.value)
    assert linear_change(sums, -0.1).stderr == pytest.approx(0.1 * first.stderr)
    assert quadratic_change(sums, 0.1).value == pytest.approx(0.1 * first.value + 0.005 * second.value)
    arrays = (sums.numerator, sums.denominator, sums.d_numerator, sums.d_denominator)
    arrays += (sums.d2_numerator, sums.d2_denominator)
    by_jackknife = jackknife(lambda *x: 0.1 * first_of(*x[:4]) + 0.005 * second_of(*x), *arrays)
    assert quadratic_change(sums, 0.1).stderr == pytest.approx(by_jackknife.stderr, rel=0.01)
    _, h1, h2 = ratio_derivatives(*population(per, estimator, 0.0))
    star = eta_star(sums, level=0.999)
    assert star.resolved and star.low < 2 * abs(h1 / h2) < star.high


def test_level_and_derivatives_are_checked():
    sums = made([1.0, 2.0], [3.0, 4.0])
    with pytest.raises(UserError, match="level is 1"):
        eta_star(sums, level=1.0)
    with pytest.raises(UserError, match="no second derivatives"):
        eta_star(sums._replace(d2_numerator=None))
