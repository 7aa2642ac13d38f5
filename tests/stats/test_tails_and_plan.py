"""Tail diagnostics against laws whose tails are known; plans against the enumerated variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from enumerable import at, draw, draw_rows, probabilities, world
from scipy.stats import kurtosis
from test_prompt_sums import batch_sums

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    components,
    first_derivative,
    heavy_tails,
    influence_first,
    prompt_sums,
    prompt_variance,
    prompts_needed,
    tail_index,
    token_contributions,
    within_variance,
)


def test_hill_finds_the_exponent_and_its_interval_covers():
    """P(X > x) = x^−α: the law of the interval is exact there. 2000 samples: the count's own error is 0.5 %."""
    rng = np.random.default_rng(71)
    alpha = 2.5
    found = [tail_index(rng.pareto(alpha, 200) + 1) for _ in range(2000)]
    assert found[0].tail == 20
    assert np.mean([x.low <= alpha <= x.high for x in found]) == pytest.approx(0.95, abs=0.02)
    assert tail_index(np.abs(rng.normal(size=20_000))).low > 4
    assert math.isnan(tail_index(np.ones(3)).value)
    assert math.isnan(tail_index(np.zeros(100)).value)


def diagnosed(batch, seed=0):
    values, tangents, _ = batch.at(0.0)
    shares = token_contributions(values, tangents, batch.mask, per="token", estimator="per_decision")
    sums = batch_sums(batch, 0.0, "token", "per_decision")
    return heavy_tails(sums, shares, batch.mask, batch.prompt_index, seed=seed), shares[batch.mask], sums


def test_tails_of_a_batch():
    batch = draw(256, 2, seed=72)
    found, shares, sums = diagnosed(batch)
    assert found.kurtosis.value == pytest.approx(kurtosis(shares, fisher=False), rel=1e-10)
    size = np.sort(np.abs(shares))[::-1]
    assert found.top_share.value == pytest.approx(
        size[: len(size) // 100].sum() / size.sum(), abs=size[0] / size.sum()
    )
    assert [row.prompts for row in found.against_prompts] == [256, 128, 64, 32, 16, 8]
    # Bounded contributions: the middle of the error is that of a normal law, and falls with the root of the prompts.
    q50, q80, q95 = found.against_prompts[0].quantiles
    stderr = first_derivative(sums).stderr
    assert q50 / stderr == pytest.approx(0.674, rel=0.12) and q95 / stderr == pytest.approx(1.96, rel=0.12)
    medians = [row.quantiles[0] for row in found.against_prompts[:4]]
    assert np.polyfit(np.log([256, 128, 64, 32]), np.log(medians), 1)[0] == pytest.approx(-0.5, abs=0.1)
    assert diagnosed(batch)[0] == found  # the seed decides
    with pytest.raises(UserError, match="same samples"):
        heavy_tails(sums, shares[:4].reshape(2, 2), np.ones((2, 2), dtype=bool), np.arange(2))


def row_influence(batch):
    values, tangents, _ = batch.at(0.0)
    rows = np.arange(len(batch.rows))
    return influence_first(
        prompt_sums(
            values, values, batch.mask, rows, per="token", estimator="per_decision", tangents=tangents
        )
    )


@pytest.mark.parametrize("group", [1, 3])
def test_a_plan_for_the_pilots_own_size_is_its_own_error(group):
    batch = draw(50, group, seed=73)
    parts = components(row_influence(batch), batch.prompt_index)
    stderr = first_derivative(batch_sums(batch, 0.0, "token", "per_decision")).stderr
    assert prompt_variance(parts, group).value == pytest.approx(50 * stderr**2, rel=1e-9)
    assert prompts_needed(parts, group, stderr).prompts == pytest.approx(50, rel=1e-9)
    assert prompts_needed(parts, group, stderr / 2).prompts == pytest.approx(200, rel=1e-9)
    if group == 1:  # one response says nothing about two
        assert math.isnan(prompt_variance(parts, 2).value) and math.isnan(within_variance(parts).value)
        assert math.isnan(prompts_needed(parts, 2, stderr).prompts)


def exact_variances():
    """(σ_b², σ_w²) of e = IF'·N of a sequence at the population's h and h'."""
    values, tangents, _ = at(0.0)
    w, p = world(), probabilities()
    kinds = {"per": "token", "estimator": "per_decision", "tangents": tangents}
    sums = prompt_sums(values, values, w.mask, np.arange(len(p)), **kinds)
    N, D, N1, D1 = (p @ x for x in (sums.numerator, sums.denominator, sums.d_numerator, sums.d_denominator))
    h, h1 = N / D, (N1 - N / D * D1) / D
    own = sums.d_numerator - h * sums.d_denominator - h1 * sums.denominator
    e = (own - D1 * (sums.numerator - h * sums.denominator) / D) / D
    q = p * 3
    means = np.array([q[w.prompt == n] @ e[w.prompt == n] for n in range(3)])
    within = np.array([q[w.prompt == n] @ (e[w.prompt == n] - means[n]) ** 2 for n in range(3)])
    return np.mean(means**2) - np.mean(means) ** 2, within.mean()


def test_components_and_intervals_of_plans():
    """100 pilots of 240 prompts × 2: z of the variances below 4 (each is off by order 1/240 as well, less than one error).

    The interval of B: 88 of 100 at least hold the exact one.
    """
    between, within = exact_variances()
    wanted = 0.02
    exact = {G: (between + within / G) / wanted**2 for G in (1, 2, 8)}
    found, hits = [], {G: [] for G in exact}
    for seed, r in enumerate(draw_rows(np.random.default_rng(74), 100, 240, 2)):
        batch = draw(1, 1, seed)._replace(
            rows=r.ravel(), prompt_index=np.repeat(np.arange(240), 2), mask=world().mask[r.ravel()]
        )
        parts = components(row_influence(batch), batch.prompt_index)
        found.append([within_variance(parts).value, *(prompt_variance(parts, G).value for G in exact)])
        for G in exact:
            needed = prompts_needed(parts, G, wanted)
            hits[G].append(needed.low <= exact[G] <= needed.high)
    truth = np.array([within, *(e * wanted**2 for e in exact.values())])
    z = (np.mean(found, axis=0) - truth) / (np.std(found, axis=0) / np.sqrt(len(found)))
    print(
        f"means/truth {np.mean(found, axis=0) / truth}, z {z}, coverage { ({G: np.mean(x) for G, x in hits.items()}) }"
    )
    assert (np.abs(z) < 4).all()
    assert all(np.mean(x) >= 0.88 for x in hits.values())


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="expected 3"):
        components(np.ones(4), np.array([0, 0, 1, 1]))
    with pytest.raises(UserError, match="both \\[N\\]"):
        components(np.ones(4), np.arange(3))
    parts = components(np.arange(6.0), np.repeat(np.arange(3), 2))
    with pytest.raises(UserError, match="at least 1"):
        prompt_variance(parts, 0)
    with pytest.raises(UserError, match="positive"):
        prompts_needed(parts, 1, 0.0)
