"""Rank correlations against scipy, also of a resampled batch written out; what a ranking holds, with and without noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from entropy_kernels.errors import UserError
from entropy_kernels.stats import cross_fitted_top, doubled_reliability, held_by_top, rank_correlations, ranks


def tokens(seed=0, n=300, prompts=12):
    """Scores with ties, a target that is related to the first only, prompts of unequal length."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, n).astype(float)
    y = x + rng.standard_t(2, n) * 3
    return {"related": x, "unrelated": rng.normal(size=n)}, y, np.sort(rng.integers(0, prompts, n))


def test_correlations_are_spearmans_and_their_errors_are_over_prompts():
    scores, y, prompt = tokens()
    found = rank_correlations(scores, y, prompt, draws=50)
    for name, x in scores.items():
        assert found[name].estimate.value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert found[name].low < found[name].estimate.value < found[name].high
        assert found[name].estimate.n == 12
    assert found["related"].low > 0.2
    assert found["unrelated"].low < 0 < found["unrelated"].high


def test_a_draw_is_the_correlation_of_the_batch_with_prompts_repeated():
    scores, y, prompt = tokens(seed=3)
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=4)
    rows = [np.repeat(np.arange(len(y)), count[prompt]) for count in counts]
    want = [spearmanr(scores["related"][r], y[r]).statistic for r in rows]
    got = rank_correlations(scores, y, prompt, draws=4, seed=0)["related"].estimate
    assert got.stderr == pytest.approx(np.std(want, ddof=1), rel=1e-10)


def test_what_the_top_holds():
    amount = np.array([-5.0, 3.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    prompt = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    held = held_by_top(amount, amount, prompt, (0.1, 0.15, 0.2, 1.0), draws=5)
    assert [h.held.estimate.value for h in held] == pytest.approx([0.5, 0.65, 0.8, 1.0])
    blind = held_by_top(np.arange(10)[::-1] * (-1.0) ** np.arange(10), np.ones(10), prompt, (0.2,), draws=5)
    assert blind[0].held.estimate.value == pytest.approx(0.2)


def test_noise_makes_the_top_look_heavier_and_two_halves_tell():
    """Equal true amounts: the top 5 % hold 5 %. Their noisy sum says more; ranked on one half, added up on the other, it does not."""
    rng = np.random.default_rng(1)
    n, noise = 4000, 3.0
    a, b = (1.0 + noise * rng.normal(size=n) for _ in range(2))
    prompt = np.arange(n) % 100
    raw = held_by_top(a + b, a + b, prompt, (0.05,), draws=50)[0].held
    fitted = cross_fitted_top(a, b, prompt, (0.05,), draws=50)[0].held
    assert raw.low > 0.12
    # sign(a) b has mean P(a > 0) − P(a < 0) = 0.261 over all and 0.998 over the top 5 %, whose signs are nearly all right
    top = np.argsort(-np.abs(a))[: n // 20]
    expected = 0.05 * np.sign(a[top]).mean() / np.sign(a).mean()
    assert abs(fitted.estimate.value - expected) < 3 * fitted.estimate.stderr
    assert fitted.estimate.value < raw.low


def test_reliability_of_the_sum_of_two_halves():
    rng = np.random.default_rng(2)
    signal, noise = rng.normal(size=20000), rng.normal(size=(4, 20000))
    halves = np.corrcoef(signal + noise[0], signal + noise[1])[0, 1]
    sums = np.corrcoef(2 * signal + noise[0] + noise[1], 2 * signal + noise[2] + noise[3])[0, 1]
    assert doubled_reliability(halves) == pytest.approx(sums, abs=0.02)


def test_undefined_stays_undefined_and_misuse_is_refused():
    scores, y, prompt = tokens()
    constant = rank_correlations({"constant": np.ones(len(y))}, y, prompt, draws=3)["constant"].estimate
    assert np.isnan(constant.value)
    y[7] = np.nan
    assert np.isnan(rank_correlations(scores, y, prompt, draws=3)["related"].estimate.value)
    assert np.isnan(held_by_top(y, np.abs(y), prompt, (0.1,), draws=3)[0].held.estimate.value)
    with pytest.raises(UserError, match="over prompts"):
        rank_correlations(scores, y, np.zeros(len(y), int))
    with pytest.raises(UserError, match="lengths"):
        rank_correlations(scores, y[1:], prompt)
    assert ranks.DRAWS >= 100
