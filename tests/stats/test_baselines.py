"""Baselines: the mean untouched, exactly; truth, first and second order moved by one and the same b."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enumerable import T, at, draw, draw_rows, probabilities, world
from test_coefficients import estimator_of, tensors
from torch.func import grad, jvp

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    baseline,
    change_sums,
    compare_direct,
    compare_integrated,
    entropy,
    first_derivative,
    integral_weights,
    prompt_sums,
    radau_nodes,
    second_derivative,
    token_contributions,
    token_cotangent_tangents,
    token_cotangents,
    variance_ratio,
)
from entropy_kernels.stats.ratio import first_of

KINDS = ("position", "group", "ema", "regression", "critic", "least_error")
COMBOS = [("token", "per_decision"), ("token", "whole_sequence"), ("sequence", "per_decision")]
ARRAYS = ("numerator", "d_numerator", "d2_numerator")


def features(rows):
    return world().features.numpy()[rows]


def fitted(kind, batch, per="token", estimator="per_decision", **more):
    if kind == "critic":
        more["features"] = features(batch.rows)
    if kind == "least_error":
        more["tangents"] = batch.at(0.0)[1]
    return baseline(
        kind, batch.at(0.0)[0], batch.mask, batch.prompt_index, per=per, estimator=estimator, **more
    )


def sums_of(batch, b, eta=0.0, per="token", estimator="per_decision"):
    values, tangents, curvature = batch.at(eta)
    given = (batch.at(0.0)[0], values, batch.mask, batch.prompt_index)
    kinds = {"per": per, "estimator": estimator, "tangents": tangents, "curvature": curvature, "baseline": b}
    return prompt_sums(*given, **kinds)


def means_with_one_prompt_enumerated(kind, per, estimator, eta):
    """E[N], E[N'], E[N''] of one prompt with its baseline, over all its responses, the other prompts held fixed.

    For "group" the prompt has two responses, and all pairs are listed.
    """
    w, p = world(), probabilities()
    others = draw_rows(np.random.default_rng(5), 6, 2)
    per_prompt = len(p) // 3
    for own in range(3):
        block = np.arange(own * per_prompt, (own + 1) * per_prompt)
        q = p[block] * 3
        pairs = [(i, j) for i in block for j in block] if kind == "group" else [(i, i) for i in block]
        weight = np.array([q[i - block[0]] * (q[j - block[0]] if kind == "group" else 1) for i, j in pairs])
        with_b, without = [], []
        for i, j in pairs:
            mine = [i, j] if kind == "group" else [i]
            # The enumerated prompt is the fifth of seven: others come before it, for "ema".
            rows = np.concatenate([others[:4].ravel(), mine, others[4:].ravel()])
            index = np.concatenate([np.repeat(np.arange(4), 2), [4] * len(mine), [5, 5, 6, 6]])
            batch = draw(1, 1, 0)._replace(rows=rows, prompt_index=index, mask=w.mask[rows])
            b = fitted(kind, batch, per, estimator)
            for found, given in ((with_b, b), (without, None)):
                sums = sums_of(batch, given, eta, per, estimator)
                found.append([getattr(sums, name)[4] for name in ARRAYS])
        yield weight @ np.array(with_b), weight @ np.array(without), np.ptp(np.array(with_b) - without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("per", "estimator", "eta"), [(*COMBOS[0], 0.3), (*COMBOS[1], 0.3)])
def test_every_baseline_leaves_every_expectation_unchanged(kind, per, estimator, eta):
    if kind in ("group", "critic") and estimator == "whole_sequence":
        pytest.skip("covered by the per-decision cases; the pairs are many")
    for got, exact, moved in means_with_one_prompt_enumerated(kind, per, estimator, eta):
        np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-12)
        assert moved > 1e-3  # it did something


def test_a_baseline_that_knows_its_own_token_is_caught():
    """The enumeration above can fail: with b_k = S_k, which depends on t_k, the mean moves."""
    w, p = world(), probabilities()
    values, tangents, _ = at(0.0)
    bad = np.where(w.mask, values.logprob, 0.0)
    given = (values, values, w.mask, np.arange(len(p)))
    kinds = {"per": "token", "estimator": "per_decision", "tangents": tangents}
    moved = prompt_sums(*given, **kinds, baseline=bad).d_numerator - prompt_sums(*given, **kinds).d_numerator
    assert abs(p @ moved) > 1e-2


@pytest.mark.parametrize(("per", "estimator"), COMBOS)
def test_sums_are_their_own_derivatives(per, estimator):
    """N, N', N'' with b against central differences in η."""
    batch = draw(6, 2, seed=31)
    b = np.where(batch.mask, np.random.default_rng(32).normal(size=batch.mask.shape), np.nan)
    step = 1e-4
    for eta in (0.0, 0.4):
        low, mid, high = (sums_of(batch, b, eta + x, per, estimator) for x in (-step, 0, step))
        for of, derivative in (("numerator", "d_numerator"), ("d_numerator", "d2_numerator")):
            slope = (getattr(high, of) - getattr(low, of)) / (2 * step)
            np.testing.assert_allclose(getattr(mid, derivative), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("per", "estimator"), COMBOS)
def test_cotangents_with_a_baseline_are_the_gradient_of_the_estimator(per, estimator):
    batch = draw(8, 2, seed=33)
    b = fitted("regression", batch, per, estimator)
    values, tangents, _ = batch.at(0.0)
    H, S = tensors(values, batch.mask)
    plain = estimator_of(batch.mask, S, per, estimator)
    count = batch.mask.sum() if per == "token" else len(batch.mask)
    b_, base, mask = torch.tensor(b), S, torch.tensor(batch.mask)

    def h(H, S):
        change = torch.where(mask, S - base, 0.0)
        upto = torch.cumsum(change, 1).exp()
        before = torch.cat([torch.ones_like(upto[:, :1]), upto[:, :-1]], 1)
        taken = (torch.where(mask, b_ * (upto - before), 0.0)).sum()
        if per == "sequence" and estimator == "per_decision":
            return plain(H, S) - taken / count
        weight = (
            before if estimator == "per_decision" else change.sum(1, keepdim=True).exp().expand_as(change)
        )
        return plain(H, S) - taken / torch.where(mask, weight, 0.0).sum()

    gradient = grad(h, argnums=(0, 1))
    expected, moved = jvp(gradient, (H, S), tensors(tangents, batch.mask))
    kinds = {"per": per, "estimator": estimator, "baseline": b}
    got = token_cotangents(values, batch.mask, **kinds)
    np.testing.assert_allclose(got.logprob, expected[1], rtol=1e-11, atol=1e-15)
    rates = token_cotangent_tangents(values, tangents, batch.mask, **kinds)
    np.testing.assert_allclose(rates.entropy, moved[0], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(rates.logprob, moved[1], rtol=1e-10, atol=1e-14)
    shares = token_contributions(values, tangents, batch.mask, **kinds)
    sums = sums_of(batch, b, 0.0, per, estimator)
    assert shares.sum() == pytest.approx(first_derivative(sums).value, rel=1e-12)


def test_truth_and_predictions_share_the_baseline():
    """Direct = integrated, and what the linear law misses falls as η², with b ≠ 0; with b in only one of them neither holds."""
    batch = draw(30, 2, seed=34)
    b = fitted("group", batch)
    base = sums_of(batch, b)
    plain = sums_of(batch, None)
    assert abs(first_derivative(base).value - first_derivative(plain).value) > 1e-3
    assert entropy(base).value == entropy(plain).value

    def direct(eta, b):
        given = (batch.at(0.0)[0], batch.at(eta)[0], batch.mask, batch.prompt_index)
        return change_sums(*given, per="token", estimator="per_decision", baseline=b)

    nodes = radau_nodes(7, 0.2)
    W = integral_weights(nodes, 0.2)[0]
    at_nodes = [sums_of(batch, b, float(s)) for s in nodes]
    exact = compare_direct(direct(0.2, b), base, 0.2)
    assert compare_integrated(at_nodes, W, base, 0.2).change.value == pytest.approx(
        exact.change.value, rel=1e-8
    )
    missed = [compare_direct(direct(eta, b), base, eta).minus_linear.value for eta in (1e-3, 1e-4)]
    assert missed[0] / missed[1] == pytest.approx(100, rel=2e-2)
    mixed = [compare_direct(direct(eta, None), base, eta).minus_linear.value for eta in (1e-3, 1e-4)]
    assert mixed[0] / mixed[1] == pytest.approx(10, rel=0.2)
    cubic = [compare_direct(direct(eta, b), base, eta).minus_quadratic.value for eta in (1e-2, 1e-3)]
    assert cubic[0] / cubic[1] == pytest.approx(1000, rel=5e-2)
    assert second_derivative(base).value != second_derivative(plain).value


def test_group_baseline_by_hand():
    """Two responses of one prompt, one of another: the mean return of the other response at that position, h of the other prompt."""
    H = np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0], [6.0, 8.0, 9.0]])
    mask = np.array([[True, True, True], [True, True, False], [True, True, False]])
    b = baseline(
        "group",
        (v := type(at(0.0)[0])(H, 0 * H)),
        mask,
        np.array([4, 4, 7]),
        per="token",
        estimator="per_decision",
    )
    h = 7.0
    expected = [[5 - h, 0, 0], [6 - 2 * h, 4 - h, 0], [0, 0, 0]]
    np.testing.assert_allclose(b, expected)
    moving = baseline("ema", v, mask, np.array([4, 4, 7]), per="token", estimator="per_decision")
    h = 15 / 5
    returns = [6 - 2 * h, 4 - h, 0, 5 - h, 0]
    np.testing.assert_allclose(moving, [[0] * 3, [0] * 3, [np.mean(returns), np.mean(returns), 0]])


def test_position_and_regression_find_what_there_is_to_find():
    """Returns that are a function of position, or linear in a feature, are predicted on the folds left out."""
    rng = np.random.default_rng(35)
    H = np.tile([3.0, 1.0, 2.0, 5.0, 0.5], (40, 1))
    mask = np.ones(H.shape, dtype=bool)
    values = type(at(0.0)[0])(H, rng.normal(size=H.shape))
    returns = np.cumsum((H - H.mean())[:, ::-1], axis=1)[:, ::-1] - (H - H.mean())
    kinds = {"per": "token", "estimator": "per_decision"}
    np.testing.assert_allclose(
        baseline("position", values, mask, np.arange(40), **kinds), returns, atol=1e-12
    )

    H = rng.gamma(1.0, size=(200, 5))
    H[:, 4] = 2.0
    x = np.stack([np.cumsum(H[:, ::-1], axis=1)[:, ::-1] - H, rng.normal(size=H.shape)], axis=-1)
    values = type(values)(H, rng.normal(size=H.shape))
    b = baseline("critic", values, np.ones(H.shape, dtype=bool), np.arange(200), features=x, **kinds)
    returns = x[..., 0] - H.mean() * np.arange(4, -1, -1)
    assert np.mean((b - returns) ** 2) < 1e-3 * np.var(returns)


def test_least_error_finds_the_coefficient_that_makes_the_error_least():
    """Noise c S'_k added to every term: all of it is taken away by b = c, whatever the returns are worth."""
    rng = np.random.default_rng(39)
    shape = (300, 6)
    mask = np.arange(6) < rng.integers(1, 7, size=300)[:, None]
    values = type(at(0.0)[0])(np.ones(shape), rng.normal(size=shape))
    S1 = rng.normal(size=shape)
    tangents = type(at(0.0)[1])(5.0 * S1, S1)  # H' = 5 S', and H = h everywhere: ĥ' is nothing but that noise
    given, kinds = (mask, np.arange(300)), {"per": "token", "estimator": "per_decision"}
    b = baseline("least_error", values, *given, **kinds, tangents=tangents)
    np.testing.assert_allclose(b[mask], 5.0, rtol=1e-2)
    sums = [prompt_sums(values, values, *given, **kinds, tangents=tangents, baseline=x) for x in (b, None)]
    assert variance_ratio(*sums).value < 1e-4


def test_variance_ratio_is_that_of_the_spread():
    """Against the variance over 400 batches: known to 10 % there, and the baseline must matter for the test to mean anything."""
    rows = draw_rows(np.random.default_rng(36), 400, 60, 2)
    values, tangents, _ = at(0.0)
    w = world()
    b = np.where(w.mask, 3.0 - 1.5 * np.arange(T), 0.0)  # any function of the position
    given = (values, values, w.mask, np.arange(len(w.mask)))
    kinds = {"per": "token", "estimator": "per_decision", "tangents": tangents}
    spread, ratios = [], []
    for c in (None, b):
        sums = prompt_sums(*given, **kinds, baseline=c)
        arrays = np.stack([sums.numerator, sums.denominator, sums.d_numerator, sums.d_denominator])
        spread.append(np.var(first_of(*arrays[:, rows].sum(axis=(2, 3)))))
    for r in rows[:20]:
        batch = draw(1, 1, 0)._replace(
            rows=r.ravel(), prompt_index=np.repeat(np.arange(60), 2), mask=w.mask[r.ravel()]
        )
        ratios.append(variance_ratio(sums_of(batch, b[r.ravel()]), sums_of(batch, None)).value)
    assert abs(spread[1] / spread[0] - 1) > 0.2
    assert np.mean(ratios) == pytest.approx(spread[1] / spread[0], rel=0.25)


def test_inputs_that_do_not_fit_are_refused():
    batch = draw(4, 1, seed=37)
    values = batch.at(0.0)[0]
    given = (values, batch.mask, batch.prompt_index)
    kinds = {"per": "token", "estimator": "per_decision"}
    for kind, more, match in (
        ("nothing", {}, "baseline is 'nothing'"),
        ("critic", {}, "without features"),
        ("least_error", {}, "without tangents"),
        ("position", {"tangents": batch.at(0.0)[1]}, "with tangents"),
        ("position", {"features": features(batch.rows)}, "with features"),
        ("group", {}, "single one"),
        ("critic", {"features": np.ones(3)}, "features has shape"),
    ):
        with pytest.raises(UserError, match=match):
            baseline(kind, *given, **kinds, **more)
    with pytest.raises(UserError, match="path"):
        baseline("position", *given, per="token", estimator="path")
    with pytest.raises(UserError, match="'path', whose weights"):
        prompt_sums(
            values, values, batch.mask, batch.prompt_index, per="token", estimator="path", baseline=batch.mask
        )
    one = draw(1, 2, seed=38)
    with pytest.raises(UserError, match="two at least"):
        baseline("position", one.at(0.0)[0], one.mask, one.prompt_index, **kinds)
