"""The lag profile against its definition, against the estimator it splits, and against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from enumerable import T, at, draw, draw_rows, population, probabilities, ratio_derivatives, world
from test_prompt_sums import batch_sums

from entropy_kernels.stats import first_derivative, lag_profile, lag_sums, truncated
from entropy_kernels.stats.lag import groups, weighted_lags
from entropy_kernels.stats.ratio import influence_first

PER = pytest.mark.parametrize("per", ["token", "sequence"])


def given(batch):
    values, tangents, _ = batch.at(0.0)
    return values, tangents, batch.mask, batch.prompt_index


@PER
def test_parts_add_up_to_the_estimator_and_its_influence(per):
    batch = draw(40, 2, seed=41)
    sums = batch_sums(batch, 0.0, per, "per_decision")
    found = lag_sums(*given(batch), per=per)
    value, pull = weighted_lags(found, np.ones(T - 1))
    assert value == pytest.approx(first_derivative(sums).value, rel=1e-12)
    np.testing.assert_allclose(pull, influence_first(sums), rtol=1e-9, atol=1e-14)
    profile = lag_profile(*given(batch), per=per)
    assert profile.path.value + sum(lag.part.value for lag in profile.lags) == pytest.approx(value, rel=1e-12)
    assert profile.full.stderr == pytest.approx(first_derivative(sums).stderr, rel=1e-9)
    last = profile.lags[-1].up_to
    assert (last.value.value, last.bias.value) == (
        pytest.approx(value, rel=1e-12),
        pytest.approx(0, abs=1e-12),
    )
    assert last.bias.stderr == pytest.approx(0, abs=1e-12)
    first = batch_sums(batch, 0.0, per, "path")
    assert profile.path.value == pytest.approx(first_derivative(first).value, rel=1e-12)


@PER
def test_lags_by_the_definition(per):
    batch = draw(15, 2, seed=42)
    values, tangents, _ = batch.at(0.0)
    H, S1, m = values.entropy, tangents.d_logprob, batch.mask
    count = m.sum() if per == "token" else len(m)
    h = H[m].sum() / count if per == "token" else 0.0  # nothing but a first token is counted per sequence
    profile = lag_profile(*given(batch), per=per)
    assert [(lag.first, lag.last) for lag in profile.lags] == [(d, d) for d in range(1, T)]
    for lag in profile.lags:
        d = lag.first
        expected = sum(
            (H[i, k + d] - h) * S1[i, k] for i in range(len(m)) for k in range(T - d) if m[i, k + d]
        )
        assert lag.part.value == pytest.approx(expected / count, rel=1e-12)
    gamma, discounted = profile.discounted[0]
    by_hand = profile.path.value + sum(gamma**lag.first * lag.part.value for lag in profile.lags)
    assert discounted.value.value == pytest.approx(by_hand, rel=1e-12)
    assert discounted.bias.value == pytest.approx(by_hand - profile.full.value, rel=1e-9)


def exact_sums(per):
    """The whole population as one sample: sums weighted with probabilities."""
    values, tangents, _ = at(0.0)
    w, p = world(), probabilities()
    found = lag_sums(values, tangents, w.mask, np.arange(len(p)), per=per)
    return found._replace(
        entropy=p * found.entropy,
        counted=p * found.counted,
        path=p * found.path,
        score_entropy=p[:, None] * found.score_entropy,
        score_count=p[:, None] * found.score_count,
    )


@PER
def test_bias_of_a_truncated_sum_is_estimated_and_its_interval_covers(per):
    """Nominal 95 %: 93 to 97 % at 300 prompts × 2 over 1000 batches (the count's own standard error is 0.7 %).

    At 60 prompts the few long responses that the bias comes from are too few: 89 % per token.
    """
    exact = exact_sums(per)
    h1 = ratio_derivatives(*population(per, "per_decision", 0.0))[1]
    assert weighted_lags(exact, np.ones(T - 1))[0] == pytest.approx(h1, rel=1e-10)
    weights = np.array([1.0, 0.0, 0.0])
    bias = weighted_lags(exact, weights)[0] - h1
    assert abs(bias) > 0.01 * abs(h1)
    values, tangents, _ = at(0.0)
    rows = draw_rows(np.random.default_rng(43), 1000, 300, 2).reshape(1000, -1)
    hits = []
    for r in rows:
        sample = [type(x)(*(a[r] for a in x)) for x in (values, tangents)]
        sums = lag_sums(*sample, world().mask[r], np.repeat(np.arange(300), 2), per=per)
        low, high = truncated(sums, weights, "lag 1").bias.interval()
        hits.append(low <= bias <= high)
    print(f"per {per}: bias {bias:.4f} of {h1:.4f}, coverage {np.mean(hits):.3f}")
    assert 0.93 <= np.mean(hits) <= 0.97


def test_groups_of_lags_cover_every_lag_once():
    for longest in (0, 1, 16, 17, 500):
        found = groups(longest)
        assert [d for first, last in found for d in range(first, last + 1)] == list(range(1, longest + 1))
    assert len(groups(1000)) < 50


def test_responses_of_one_token_have_no_lags():
    batch = draw(5, 1, seed=44)
    mask = np.zeros_like(batch.mask)
    mask[:, 0] = True
    values, tangents, _ = batch.at(0.0)
    profile = lag_profile(values, tangents, mask, batch.prompt_index, per="token")
    assert profile.lags == [] and profile.full.value == profile.path.value
