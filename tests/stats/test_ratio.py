"""Influence functions are derivatives of the estimator in a prompt's weight; the jackknife drops prompts for real."""

from __future__ import annotations

import numpy as np
import pytest
from enumerable import COMBOS, draw
from test_prompt_sums import ARRAYS, batch_sums

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    entropy,
    first_derivative,
    influence_entropy,
    influence_first,
    influence_second,
    jackknife,
    second_derivative,
)

combos = pytest.mark.parametrize(("per", "estimator"), COMBOS)
PAIRS = [
    (entropy, influence_entropy),
    (first_derivative, influence_first),
    (second_derivative, influence_second),
]


def reweighted(sums, weights):
    return sums._replace(**{name: weights * getattr(sums, name) for name in ARRAYS})


@combos
def test_influence_is_the_derivative_in_the_weight_of_a_prompt(per, estimator):
    sums = batch_sums(draw(30, 2, seed=21), 0.3, per, estimator)
    for function, influence in PAIRS:
        got = influence(sums)
        assert abs(got.sum()) < 1e-13 * np.abs(got).sum()
        for n in (0, 7, 29):
            step = 1e-4 * np.eye(30)[n]
            up, down = (function(reweighted(sums, 1 + sign * step)).value for sign in (1, -1))
            # atol: rounding of the difference, about 1e-16 |f|/step
            np.testing.assert_allclose(got[n], (up - down) / 2e-4, rtol=1e-6, atol=1e-11)


@combos
def test_jackknife_leaves_prompts_out(per, estimator):
    batch = draw(12, 3, seed=22)
    sums = batch_sums(batch, 0.3, per, estimator)
    for function, _ in PAIRS:
        left_out = []
        for n in range(12):
            kept = batch.prompt_index != n
            part = batch._replace(
                rows=batch.rows[kept], prompt_index=batch.prompt_index[kept], mask=batch.mask[kept]
            )
            left_out.append(function(batch_sums(part, 0.3, per, estimator)).value)
        got = function(sums, error="jackknife")
        assert got.stderr == pytest.approx(
            np.sqrt(11 / 12 * np.sum((left_out - np.mean(left_out)) ** 2)), rel=1e-10
        )
        assert got.value == function(sums).value
        assert got.n == 12 and "jackknife" in got.method


@combos
def test_the_two_errors_agree_for_many_prompts(per, estimator):
    sums = batch_sums(draw(1000, 1, seed=23), 0.3, per, estimator)
    for function, _ in PAIRS:
        assert function(sums).stderr == pytest.approx(function(sums, error="jackknife").stderr, rel=0.02)


def test_the_error_of_a_mean_is_the_textbook_one():
    """With a constant denominator and no weights both errors are sd/√B, exactly."""
    sums = batch_sums(draw(15, 1, seed=24), 0.0, "sequence", "path")
    textbook = sums.numerator.std(ddof=1) / np.sqrt(15)
    assert entropy(sums).stderr == pytest.approx(textbook, rel=1e-13)
    assert entropy(sums, error="jackknife").stderr == pytest.approx(textbook, rel=1e-12)


def test_jackknife_of_any_function_of_totals():
    rng = np.random.default_rng(25)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=7) + 9

    def f(x, y):
        return (x**2).sum(-1) / y

    value, _, replicates = jackknife(f, x, y)
    assert value == f(x.sum(0), y.sum())
    assert replicates[4] == pytest.approx(f(np.delete(x, 4, 0).sum(0), np.delete(y, 4).sum()), rel=1e-12)
    with pytest.raises(UserError, match=r"lengths \[3, 7\]"):
        jackknife(f, x, y[:3])


def test_one_prompt_and_unknown_errors_are_refused():
    sums = batch_sums(draw(1, 4, seed=26), 0.0, "token", "per_decision")
    for function, _ in PAIRS:
        for error in ("influence", "jackknife"):
            with pytest.raises(UserError, match="prompts are the independent units"):
                function(sums, error=error)
    with pytest.raises(UserError, match="error is 'bootstrap'"):
        entropy(batch_sums(draw(3, 1, seed=27), 0.0, "token", "path"), error="bootstrap")


def test_units_and_methods_say_what_they_are():
    sums = batch_sums(draw(3, 1, seed=28), 0.0, "sequence", "whole_sequence")
    assert [f(sums).unit for f, _ in PAIRS] == [
        "nats/sequence",
        "nats/sequence per unit eta",
        "nats/sequence per unit eta^2",
    ]
    assert entropy(sums).method == "whole-sequence importance sampling; influence functions over prompts"
