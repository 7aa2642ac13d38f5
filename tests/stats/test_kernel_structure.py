"""Structure of kernel matrices against matrices whose structure is known; seeds and sizes are fixed beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.stats import kernel


def made(N=60, d=400, spikes=(), seed=0):
    """Gradients of N responses: noise in d dimensions, and a part of size ±spike in common directions."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, d)) / np.sqrt(d)
    for i, size in enumerate(spikes):
        direction = np.zeros(d)
        direction[i] = size
        X += rng.choice([-1.0, 1.0], (N, 1)) * direction
    return X


PROMPT = np.repeat(np.arange(15), 4)


def test_noise_has_no_outliers_and_planted_directions_are_counted():
    counted = {spikes: [] for spikes in ((), (1.0,), (1.0, 0.8))}
    fits = []
    for seed in range(30):
        for spikes in counted:
            X = made(spikes=spikes, seed=seed)
            found = kernel.spectrum(X @ X.T, PROMPT)
            counted[spikes].append(found.outliers)
            if not spikes:
                fits.append(found.dimension)
                assert found.scale == pytest.approx(1, abs=0.1) and found.misfit < 0.15
            else:  # the share that is noise
                assert found.scale == pytest.approx(1 / (1 + sum(x**2 for x in spikes)), abs=0.1)
    # noise has one in 1 % of cases, a little more often as d and σ² are fitted: 5 of 30 is a chance below 1e-3 at 3 %
    assert np.mean(np.array(counted[()]) > 0) < 5 / 30
    assert np.mean(np.array(counted[(1.0,)]) == 1) > 0.8 and np.mean(np.array(counted[(1.0, 0.8)]) == 2) > 0.8
    assert abs(np.mean(fits) / 400 - 1) < 0.1


def test_density_has_mass_one_and_the_moments_of_noise():
    for N, d in ((50, 200), (90, 100)):
        (low, high), threshold = kernel.marchenko_pastur_range(N, d)
        x = np.linspace(low, high, 400001)
        f = kernel.marchenko_pastur_density(x, N, d)
        width = x[1] - x[0]
        assert f.sum() * width == pytest.approx(1, abs=1e-3)
        assert (x * f).sum() * width == pytest.approx(1, abs=1e-3)
        assert (x**2 * f).sum() * width == pytest.approx(1 + N / d, abs=2e-3)
        assert threshold > high
        below = kernel.marchenko_pastur_quantiles(0.3, N, d)
        assert f[x <= below].sum() * width == pytest.approx(0.3, abs=1e-3)


def test_blocks_have_the_quantiles_of_their_entries():
    X = made(spikes=(0.5,))
    X += 0.7 * made(N=15, seed=9)[PROMPT]  # responses to one prompt have something in common
    K = X @ X.T
    found = kernel.block_distributions(K, PROMPT, unit="u")
    same = PROMPT[:, None] == PROMPT
    upper = np.triu(np.ones((60, 60), dtype=bool), 1)
    C = kernel.cosines(K)
    for block, kind, entries in (
        ("diagonal", "raw", np.diag(K)),
        ("same_prompt", "raw", K[same & upper]),
        ("same_prompt", "cosine", C[same & upper]),
        ("cross_prompt", "raw", K[~same & upper]),
        ("cross_prompt", "cosine", C[~same & upper]),
    ):
        got = found[block][kind]
        assert got.mean.value == pytest.approx(entries.mean(), rel=1e-12, abs=1e-15)
        for q, estimate in got.quantiles.items():
            assert estimate.value == pytest.approx(np.quantile(entries, float(q), method="hazen"), rel=1e-9)
        assert got.mean.unit == ("u" if kind == "raw" else "1") and got.mean.n == 15
    assert found["same_prompt"]["cosine"].mean.value > 10 * abs(found["cross_prompt"]["cosine"].mean.value)
    assert "cosine" not in found["diagonal"]


def test_errors_over_prompts_are_those_of_repetition():
    means, claimed = {"diagonal": [], "cross_prompt": []}, {"diagonal": [], "cross_prompt": []}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scale = np.exp(0.5 * rng.standard_normal(15))[PROMPT]  # shared by a prompt: responses are no units
        X = scale[:, None] * (made(d=50, seed=1000 + seed) + 0.6 * np.eye(50)[0])
        found = kernel.block_distributions(X @ X.T, PROMPT, unit="u", draws=40)
        for block in means:
            means[block].append(found[block]["raw"].mean.value)
            claimed[block].append(found[block]["raw"].mean.stderr)
    for block in means:
        # 100 repetitions know a spread to 7 %; the bootstrap's own bias at 15 prompts is about 5 %
        assert np.mean(claimed[block]) / np.std(means[block]) == pytest.approx(1, abs=0.25)


def test_growth_finds_the_exponent_and_the_prefix():
    rng = np.random.default_rng(3)
    T = rng.integers(4, 40, 60)
    X = made(d=4000) * np.sqrt(T)[:, None] ** 1.5
    prefix = rng.integers(0, 6, (60, 60))
    prefix = np.triu(prefix, 1) + np.triu(prefix, 1).T
    K = X @ X.T
    same = PROMPT[:, None] == PROMPT
    size = np.sqrt(np.outer(np.diag(K), np.diag(K)))
    K = K + np.where(same & ~np.eye(60, dtype=bool), 0.05 * prefix * size, 0)
    found = kernel.growth(K, T, prefix, PROMPT)
    assert found["length_exponent"].value == pytest.approx(
        1.5, abs=4 * found["length_exponent"].stderr + 0.02
    )
    assert found["length_exponent"].stderr < 0.05 and found["length_rank"].value > 0.95
    assert found["prefix_rank"].value > 0.9
    alike = kernel.growth(K, np.full(60, 8), prefix, PROMPT)
    assert np.isnan(alike["length_exponent"].value) and np.isnan(alike["length_rank"].value)


def test_agreement_of_a_prediction():
    rng = np.random.default_rng(4)
    p = rng.standard_normal(60)
    noise = 0.1 * rng.standard_normal(60)
    found = kernel.agreement(p, 1.2 * p + noise, PROMPT)
    assert found["slope"].value == pytest.approx(1.2, abs=4 * found["slope"].stderr)
    assert found["unexplained"].value == pytest.approx(
        ((0.2 * p + noise) ** 2).sum() / ((1.2 * p + noise) ** 2).sum()
    )
    assert found["rank"].value > 0.95
    assert kernel.agreement(p, p, PROMPT)["unexplained"].value == 0


def test_laws_are_exact_where_they_hold():
    """One table of logits per prompt: the natural kernel makes `natural` exact, the plain one `table`, `kernel` reads either."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((15, 4))
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    S, A = np.log(pi).ravel(), rng.standard_normal(60)
    A -= np.repeat(A.reshape(15, 4).mean(1), 4)
    omega = np.full(60, 1 / 60)
    laws = kernel.covariance_laws(np.eye(60), S, A, omega * A, PROMPT)
    for j in range(15):
        s, a = S.reshape(15, 4)[j], A.reshape(15, 4)[j]
        assert laws["natural"][j] == pytest.approx(-np.mean((s - s.mean()) * (a - a.mean())))
    assert not laws["kernel"].any()  # nothing is shared between prompts
    shared = np.outer(S, A)  # K(t, i) = S_t A_i: the update of every prompt moves log π along S
    K = (shared + shared.T) / 2
    centred = (S.reshape(15, 4) - S.reshape(15, 4).mean(1, keepdims=True)).ravel() * 4 / 3
    want = [
        -sum(omega[i] * A[i] * np.mean([centred[t] * K[t, i] for t in range(60) if PROMPT[t] != j]) for i in range(60) if PROMPT[i] == j)
        for j in range(15)
    ]  # fmt: skip
    assert kernel.covariance_laws(K, S, A, omega * A, PROMPT)["kernel"] == pytest.approx(want)
    compared = kernel.compare_laws(laws, laws["natural"])
    assert (
        compared["natural"]["rank"].value == pytest.approx(1) and compared["natural"]["same_sign"].value == 1
    )
    assert compared["natural"]["sum_has_the_sign"] and compared["table"]["rank"].value < 1
    with pytest.raises(UserError, match="one response"):
        kernel.covariance_laws(K, S, A, omega * A, np.arange(60))


def test_shared_prefixes_are_counted():
    found = kernel.shared_prefixes([(1, 2, 3), (1, 2, 4), (1, 2), (5,)])
    assert found.tolist() == [[3, 2, 2, 0], [2, 3, 2, 0], [2, 2, 2, 0], [0, 0, 0, 1]]
    twice = kernel.shared_prefixes([(1, 2), (1, 2), (1, 2, 3), (1, 2)])
    assert kernel.identical_pairs(twice, [2, 2, 3, 2], [0, 0, 0, 1]) == pytest.approx(1 / 3)
    assert np.isnan(kernel.identical_pairs(twice, [2, 2, 3, 2], [0, 1, 2, 3]))


def test_input_that_does_not_fit_is_refused():
    for K, prompt in ((np.eye(3)[:2], [0, 1]), (np.eye(3), [0, 1]), (np.eye(2), [0, 0])):
        with pytest.raises(UserError):
            kernel.spectrum(K, prompt)
