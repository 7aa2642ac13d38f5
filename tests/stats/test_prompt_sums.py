"""The sums against enumeration, against the definition written as loops, and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from enumerable import COMBOS, at, draw, population, probabilities, ratio_derivatives, world

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    PromptSums,
    TokenTangents,
    TokenValues,
    entropy,
    first_derivative,
    prompt_sums,
    second_derivative,
)

combos = pytest.mark.parametrize(("per", "estimator"), COMBOS)
ARRAYS = ("numerator", "denominator", "d_numerator", "d_denominator", "d2_numerator", "d2_denominator")


def batch_sums(batch, eta, per, estimator) -> PromptSums:
    values, tangents, curvature = batch.at(eta)
    return prompt_sums(
        batch.at(0.0)[0],
        values,
        batch.mask,
        batch.prompt_index,
        per=per,
        estimator=estimator,
        tangents=tangents,
        curvature=curvature,
    )


@combos
@pytest.mark.parametrize("eta", [0.0, 0.3, -0.5])
def test_expectations_are_exact(per, estimator, eta):
    w, p = world(), probabilities()
    values, tangents, curvature = at(eta)
    rows = np.arange(len(p))
    kinds = {"per": per, "estimator": estimator, "tangents": tangents, "curvature": curvature}
    sums = prompt_sums(at(0.0)[0], values, w.mask, rows, **kinds)
    got = np.array([p @ getattr(sums, name) for name in ARRAYS]).reshape(3, 2).T
    exact = np.stack(population(per, estimator, eta))
    np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-13)
    # The ratios of the whole population, through the public functions: each row weighted with its probability.
    weighted = sums._replace(**{name: p * getattr(sums, name) for name in ARRAYS})
    ratios = [f(weighted).value for f in (entropy, first_derivative, second_derivative)]
    np.testing.assert_allclose(ratios, ratio_derivatives(*exact), rtol=1e-10)


def by_the_definition(batch, eta, per, estimator):
    """N and D of each prompt with plain loops."""
    base, moved = batch.at(0.0)[0], batch.at(eta)[0]
    N, D = {}, {}
    for i, n in enumerate(batch.prompt_index):
        tokens = np.flatnonzero(batch.mask[i])
        ratio = [math.exp(moved.logprob[i, t] - base.logprob[i, t]) for t in tokens]
        whole = math.prod(ratio)
        numerator = denominator = 0.0
        for k, t in enumerate(tokens):
            w = {"per_decision": math.prod(ratio[:k]), "whole_sequence": whole, "path": 1.0}[estimator]
            numerator += w * moved.entropy[i, t]
            denominator += w if per == "token" else 0.0
        if per == "sequence":
            denominator = whole if estimator == "whole_sequence" else 1.0
        N[n], D[n] = N.get(n, 0.0) + numerator, D.get(n, 0.0) + denominator
    return [np.array([x[n] for n in sorted(x)]) for x in (N, D)]


@combos
def test_sums_equal_the_definition_for_unequal_groups(per, estimator):
    batch = draw(40, 1, seed=11)
    labels = np.random.default_rng(12).choice([-7, 3, 10**12, 5], size=40)
    batch = batch._replace(prompt_index=labels)
    sums = batch_sums(batch, 0.4, per, estimator)
    assert len(sums.numerator) == 4
    for got, expected in zip(sums[:2], by_the_definition(batch, 0.4, per, estimator), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


@combos
def test_derivatives_equal_finite_differences_of_the_estimator(per, estimator):
    batch = draw(25, 2, seed=13)

    def h(eta):
        return entropy(batch_sums(batch, eta, per, estimator)).value

    step = 2e-3  # five points: errors step⁴·h⁗' /30 and rounding/step (step² for the second) are below the bounds
    for eta in (0.0, 0.35):
        sums = batch_sums(batch, eta, per, estimator)
        f = [h(eta + j * step) for j in (-2, -1, 0, 1, 2)]
        first = (f[0] - 8 * f[1] + 8 * f[3] - f[4]) / (12 * step)
        second = (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * step**2)
        assert first_derivative(sums).value == pytest.approx(first, rel=1e-7)
        assert second_derivative(sums).value == pytest.approx(second, rel=1e-5)


@combos
def test_padding_on_either_side_changes_nothing(per, estimator):
    batch = draw(12, 2, seed=14)

    def wide(x, fill):
        """Each row moved right by its own number of columns, rubbish around it."""
        out = np.full((len(x), 9), fill)
        for i, row in enumerate(x):
            out[i, i % 5 : i % 5 + 4] = np.where(batch.mask[i], row, fill)
        return out

    def arrays(eta):
        return tuple(type(x)(*(wide(a, np.nan) for a in x)) for x in batch.at(eta))

    values, tangents, curvature = arrays(0.3)
    moved = prompt_sums(
        arrays(0.0)[0],
        values,
        wide(batch.mask, False),
        batch.prompt_index,
        per=per,
        estimator=estimator,
        tangents=tangents,
        curvature=curvature,
    )
    plain = batch_sums(batch, 0.3, per, estimator)
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(moved, name), getattr(plain, name), rtol=1e-13, atol=1e-15)


def test_nan_stays_in_its_prompt_and_an_impossible_token_gets_no_weight():
    batch = draw(4, 2, seed=15)
    base, moved = batch.at(0.0)[0], batch.at(0.3)[0]
    H, S = moved.entropy.copy(), moved.logprob.copy()
    H[2, 0] = np.nan
    sums = prompt_sums(
        base, TokenValues(H, S), batch.mask, batch.prompt_index, per="token", estimator="per_decision"
    )
    assert np.isnan(sums.numerator).tolist() == [False, True, False, False]
    assert math.isnan(entropy(sums).value)
    S[2, 0] = -np.inf
    sums = prompt_sums(
        base,
        moved._replace(logprob=S),
        batch.mask,
        batch.prompt_index,
        per="sequence",
        estimator="whole_sequence",
    )
    kept = np.exp(np.nansum(moved.logprob[3] - base.logprob[3]))
    assert sums.denominator[1] == pytest.approx(kept, rel=1e-14)


def test_inputs_that_do_not_fit_are_refused():
    batch = draw(3, 1, seed=16)
    values, tangents, curvature = batch.at(0.0)
    kinds = {"per": "token", "estimator": "per_decision"}
    good = (values, values, batch.mask, batch.prompt_index)
    prompt_sums(*good, **kinds)
    with pytest.raises(UserError, match="per is 'word'"):
        prompt_sums(*good, per="word", estimator="path")
    with pytest.raises(UserError, match="estimator is 'snis'"):
        prompt_sums(*good, per="token", estimator="snis")
    with pytest.raises(UserError, match="without tangents"):
        prompt_sums(*good, **kinds, curvature=curvature)
    with pytest.raises(UserError, match="tangents.d_entropy has shape"):
        prompt_sums(*good, **kinds, tangents=TokenTangents(*(x[:2] for x in tangents)))
    with pytest.raises(UserError, match="mask has dtype int"):
        prompt_sums(values, values, batch.mask.astype(int), batch.prompt_index, **kinds)
    with pytest.raises(UserError, match="prompt_index has dtype float64"):
        prompt_sums(values, values, batch.mask, batch.prompt_index * 1.0, **kinds)
    empty = batch.mask.copy()
    empty[1] = False
    with pytest.raises(UserError, match="no response token in 1 of 3 rows"):
        prompt_sums(values, values, empty, batch.prompt_index, **kinds)
    with pytest.raises(UserError, match="no first derivatives"):
        first_derivative(prompt_sums(*good, **kinds))
    with pytest.raises(UserError, match="no second derivatives"):
        second_derivative(prompt_sums(*good, **kinds, tangents=tangents))
