"""The change itself: two truths that must agree, their errors, and the paired comparison with the prediction."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from enumerable import COMBOS, draw
from test_prompt_sums import batch_sums

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    TokenValues,
    change_sums,
    compare_direct,
    compare_integrated,
    direct_change,
    entropy,
    first_derivative,
    influence_change,
    influence_entropy,
    integral_weights,
    integrated_change,
    integration_error,
    linear_change,
    nested_error_weights,
    noise_floor,
    prompt_sums,
    quadratic_change,
    radau_nodes,
    second_derivative,
)

combos = pytest.mark.parametrize(("per", "estimator"), COMBOS)
ETA = 0.3


def batch_change(batch, eta, per, estimator):
    values = [batch.at(x)[0] for x in (0.0, eta)]
    return change_sums(*values, batch.mask, batch.prompt_index, per=per, estimator=estimator)


def part_of(batch, kept):
    return batch._replace(rows=batch.rows[kept], prompt_index=batch.prompt_index[kept], mask=batch.mask[kept])


@combos
def test_direct_change_is_the_difference_of_the_estimates(per, estimator):
    batch = draw(30, 2, seed=31)
    got = direct_change(batch_change(batch, ETA, per, estimator))
    sums = [batch_sums(batch, eta, per, estimator) for eta in (ETA, 0.0)]
    assert got.value == pytest.approx(entropy(sums[0]).value - entropy(sums[1]).value, rel=1e-12)
    pulls = influence_entropy(sums[0]) - influence_entropy(sums[1])
    np.testing.assert_allclose(influence_change(batch_change(batch, ETA, per, estimator)), pulls, atol=1e-14)
    assert got.stderr == pytest.approx(np.sqrt(30 / 29 * np.sum(pulls**2)), rel=1e-10)


def exact_change(base, moved, mask, per, estimator):
    """h(η) − h(0) from the definition in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        totals = [[Decimal(0), Decimal(0)], [Decimal(0), Decimal(0)]]
        for which, values in enumerate((base, moved)):
            for i in range(len(mask)):
                tokens = np.flatnonzero(mask[i])
                ratio = [
                    (Decimal(float(values.logprob[i, t])) - Decimal(float(base.logprob[i, t]))).exp()
                    for t in tokens
                ]
                whole = math.prod(ratio, start=Decimal(1))
                for k, t in enumerate(tokens):
                    before = math.prod(ratio[:k], start=Decimal(1))
                    w = {"per_decision": before, "whole_sequence": whole, "path": Decimal(1)}[estimator]
                    totals[which][0] += w * Decimal(float(values.entropy[i, t]))
                    totals[which][1] += w if per == "token" or k == 0 else 0
        return float(totals[1][0] / totals[1][1] - totals[0][0] / totals[0][1])


@combos
def test_direct_change_does_not_cancel(per, estimator):
    """Changes of 1e-11 in values of order 1: the naive difference keeps 5 digits, this one 10."""
    batch = draw(10, 1, seed=32)
    rng = np.random.default_rng(33)
    base = batch.at(0.0)[0]
    moved = TokenValues(*(x + 1e-11 * rng.standard_normal(x.shape) for x in base))
    kinds = {"per": per, "estimator": estimator}
    exact = exact_change(base, moved, batch.mask, **kinds)
    got = direct_change(change_sums(base, moved, batch.mask, batch.prompt_index, **kinds))
    assert got.value == pytest.approx(exact, rel=1e-10, abs=0)


@combos
def test_leaving_a_prompt_out_is_the_change_without_it(per, estimator):
    """Each replicate must use the remaining prompts' own entropy at 0, not that of the whole batch."""
    batch = draw(9, 2, seed=34)
    left_out = [
        direct_change(batch_change(part_of(batch, batch.prompt_index != n), ETA, per, estimator)).value
        for n in range(9)
    ]
    got = direct_change(batch_change(batch, ETA, per, estimator), error="jackknife")
    assert got.stderr == pytest.approx(
        np.sqrt(8 / 9 * np.sum((left_out - np.mean(left_out)) ** 2)), rel=1e-10
    )


def integrated(batch, per, estimator, eta=ETA, n=9):
    nodes = radau_nodes(n, eta)
    sums = [batch_sums(batch, s, per, estimator) for s in nodes]
    return sums, integral_weights(nodes, eta)[0], nested_error_weights(nodes, eta)[0]


@combos
def test_integrated_change_is_the_direct_one(per, estimator):
    batch = draw(20, 2, seed=35)
    sums, weights, _ = integrated(batch, per, estimator)
    for error in ("influence", "jackknife"):
        direct = direct_change(batch_change(batch, ETA, per, estimator), error=error)
        other = integrated_change(sums, weights, error=error)
        assert other.value == pytest.approx(direct.value, rel=1e-9)
        assert other.stderr == pytest.approx(direct.stderr, rel=1e-9)


@combos
def test_integration_error_bounds_the_error_and_falls_with_more_nodes(per, estimator):
    batch = draw(20, 2, seed=35)
    direct = direct_change(batch_change(batch, ETA, per, estimator)).value
    estimates = []
    for n in (3, 6, 9):
        sums, weights, error_weights = integrated(batch, per, estimator, n=n)
        estimates.append(integration_error(sums, error_weights))
        assert abs(integrated_change(sums, weights).value - direct) < estimates[-1]
    assert estimates[0] > 10 * estimates[1] > 100 * estimates[2]


@combos
@pytest.mark.parametrize("array", ["d_entropy", "d_logprob", "d2_entropy", "d2_logprob"])
def test_one_percent_on_any_derivative_is_seen(per, estimator, array):
    """∫h' against ΔH and ∫h'' against h'(η) − h'(0), on nodes: each holds to 1e-8, and not after the scaling."""
    if estimator == "path" and "logprob" in array:
        return  # the path part has no score
    batch = draw(20, 2, seed=36)
    nodes = radau_nodes(10, ETA)
    weights = integral_weights(nodes, ETA)[0]
    base = batch.at(0.0)[0]

    def relative_gaps(scale):
        def sums(eta):
            values, tangents, curvature = batch.at(eta)
            if array in tangents._fields:
                tangents = tangents._replace(**{array: scale * getattr(tangents, array)})
            else:
                curvature = curvature._replace(**{array: scale * getattr(curvature, array)})
            kinds = {"per": per, "estimator": estimator, "tangents": tangents, "curvature": curvature}
            return prompt_sums(base, values, batch.mask, batch.prompt_index, **kinds)

        at_nodes = [sums(s) for s in nodes]
        direct = direct_change(batch_change(batch, ETA, per, estimator)).value
        first = abs(integrated_change(at_nodes, weights).value / direct - 1)
        change = first_derivative(sums(ETA)).value - first_derivative(at_nodes[0]).value
        second = abs(weights @ [second_derivative(x).value for x in at_nodes] / change - 1)
        return first, second

    assert max(relative_gaps(1.0)) < 1e-8
    assert max(relative_gaps(1.01)) > 1e-4


@combos
def test_comparison_is_paired(per, estimator):
    batch = draw(15, 2, seed=37)
    base = batch_sums(batch, 0.0, per, estimator)
    sums, weights, _ = integrated(batch, per, estimator)
    by_direct = compare_direct(batch_change(batch, ETA, per, estimator), base, ETA)
    by_integral = compare_integrated(sums, weights, base, ETA)

    def gaps(part):
        sums = batch_sums(part, 0.0, per, estimator)
        change = direct_change(batch_change(part, ETA, per, estimator)).value
        return [change - prediction(sums, ETA).value for prediction in (linear_change, quadratic_change)]

    left_out = np.array([gaps(part_of(batch, batch.prompt_index != n)) for n in range(15)])
    stderr = np.sqrt(14 / 15 * ((left_out - left_out.mean(0)) ** 2).sum(0))
    for result in (by_direct, by_integral):
        values = [result.minus_linear.value, result.minus_quadratic.value]
        np.testing.assert_allclose(values, gaps(batch), rtol=1e-7)
        np.testing.assert_allclose(
            [result.minus_linear.stderr, result.minus_quadratic.stderr], stderr, rtol=1e-7
        )
        np.testing.assert_allclose([result.z_linear, result.z_quadratic], gaps(batch) / stderr, rtol=1e-6)
        assert result.change.value == pytest.approx(
            direct_change(batch_change(batch, ETA, per, estimator)).value
        )
        assert result.linear.value == linear_change(base, ETA).value
        assert result.quadratic.value == pytest.approx(quadratic_change(base, ETA).value, rel=1e-14)


@combos
def test_what_is_left_falls_as_the_next_power(per, estimator):
    batch = draw(30, 1, seed=38)
    base = batch_sums(batch, 0.0, per, estimator)
    etas = np.array([1e-4, 2e-4, 4e-4])
    results = [compare_direct(batch_change(batch, eta, per, estimator), base, eta) for eta in etas]
    for left, power in (("minus_linear", 2), ("minus_quadratic", 3)):
        sizes = np.log([abs(getattr(r, left).value) for r in results])
        assert np.polyfit(np.log(etas), sizes, 1)[0] == pytest.approx(power, abs=0.1)


def test_nothing_against_nothing_is_undefined():
    batch = draw(5, 1, seed=39)
    base = batch_sums(batch, 0.0, "token", "per_decision")
    result = compare_direct(batch_change(batch, 0.0, "token", "per_decision"), base, 0.0)
    assert result.change.value == 0.0 and result.change.stderr == 0.0
    assert math.isnan(result.z_linear) and math.isnan(result.z_quadratic)
    sums, weights, _ = integrated(batch, "token", "per_decision")
    result = compare_integrated(sums, np.zeros_like(weights), base, 0.0)
    assert math.isnan(result.z_linear)
    first_only = base._replace(d2_numerator=None, d2_denominator=None)
    result = compare_direct(batch_change(batch, ETA, "token", "per_decision"), first_only, ETA)
    assert result.quadratic is None and result.minus_quadratic is None and math.isnan(result.z_quadratic)
    assert math.isfinite(result.z_linear)


@combos
def test_noise_floor_is_the_symmetric_difference(per, estimator):
    batch = draw(20, 2, seed=40)
    base, plus, minus = (batch.at(eta)[0] for eta in (0.0, 1e-2, -1e-2))
    kinds = {"per": per, "estimator": estimator}
    got = noise_floor(base, plus, minus, batch.mask, batch.prompt_index, **kinds)
    second = second_derivative(batch_sums(batch, 0.0, per, estimator))
    assert got.value == pytest.approx(0.5e-4 * second.value, rel=1e-2)
    assert got.stderr == pytest.approx(0.5e-4 * second.stderr, rel=1e-2)
    repeated = noise_floor(base, base, base, batch.mask, batch.prompt_index, **kinds)
    assert (repeated.value, repeated.stderr) == (0.0, 0.0)


def test_noise_floor_sees_rounding():
    batch = draw(200, 1, seed=41)
    rng = np.random.default_rng(42)
    base = batch.at(0.0)[0]
    plus, minus = (
        TokenValues(base.entropy + 1e-6 * rng.standard_normal(base.entropy.shape), base.logprob)
        for _ in range(2)
    )
    got = noise_floor(base, plus, minus, batch.mask, batch.prompt_index, per="token", estimator="path")
    # Independent errors of 1e-6 per token in either value: 1e-6 sqrt(½/number of tokens).
    assert got.stderr == pytest.approx(1e-6 * math.sqrt(0.5 / batch.mask.sum()), rel=0.2)


def test_pairs_that_do_not_match_are_refused():
    batch = draw(5, 1, seed=43)
    base = batch_sums(batch, 0.0, "token", "per_decision")
    with pytest.raises(UserError, match="matched pairs"):
        compare_direct(batch_change(batch, ETA, "sequence", "per_decision"), base, ETA)
    with pytest.raises(UserError, match="lengths"):
        compare_direct(batch_change(draw(6, 1, seed=44), ETA, "token", "per_decision"), base, ETA)
    sums, weights, _ = integrated(batch, "token", "per_decision")
    with pytest.raises(UserError, match="one weight per node"):
        integrated_change(sums, weights[1:])
    with pytest.raises(UserError, match="mixes"):
        integrated_change([*sums[1:], batch_sums(batch, 0.0, "token", "path")], weights)
    one = draw(1, 4, seed=45)
    with pytest.raises(UserError, match="prompts are the independent units"):
        direct_change(batch_change(one, ETA, "token", "per_decision"))
