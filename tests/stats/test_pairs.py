"""One batch and two batches against an enumeration of everything a prompt's responses can be."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from enumerable import PROMPTS, draw_rows, entropy_logprob, probabilities, world
from torch.func import jacrev

from entropy_kernels.errors import UserError
from entropy_kernels.stats import leave_one_out, one_batch, pair_products, two_batch, without_trace

REPLICATIONS = 4000


@lru_cache(maxsize=1)
def scores():
    """log-prob S [M], its gradient [M, P], a made-up reward [M] and preconditioner [P]."""
    w = world()
    mask = torch.tensor(w.mask)

    def total(theta):
        return torch.where(mask, entropy_logprob(w, theta)[1], 0.0).sum(1)

    rng = np.random.default_rng(61)
    J = jacrev(total)(w.theta).numpy()
    return total(w.theta).numpy(), J, rng.normal(size=len(J)), rng.uniform(0.5, 2, size=J.shape[1])


@lru_cache(maxsize=1)
def outcomes():
    """Everything two responses to one prompt can be: index [M, M] of the pair, probabilities [O], X [O, P] and √P-free Y = PY [O, P]."""
    S, J, reward, P = scores()
    p, per_prompt = probabilities(), len(S) // PROMPTS
    number = np.full((len(S), len(S)), -1)
    rows = []
    for n in range(PROMPTS):
        block = range(n * per_prompt, (n + 1) * per_prompt)
        rows += list(itertools.product(block, block))
    i, j = np.array(rows).T
    number[i, j] = np.arange(len(rows))
    weight = p[i] * p[j] * PROMPTS
    X = ((S[i] - S[j])[:, None] * J[i] + (S[j] - S[i])[:, None] * J[j]) / 2
    Y = P * ((reward[i] - reward[j])[:, None] * J[i] + (reward[j] - reward[i])[:, None] * J[j]) / 2
    return number, weight, X, Y


def drawn(seed, *shape):
    rows = draw_rows(np.random.default_rng(seed), *shape, 2)
    return outcomes()[0][rows[..., 0], rows[..., 1]]


def exact():
    """μ, ζ₁, ζ₂ over the outcomes."""
    _, p, X, Y = outcomes()
    mX, mY = p @ X, p @ Y
    mu = mX @ mY
    g1 = (X @ mY + Y @ mX) / 2 - mu
    CX, CY, CXY = (a.T @ (p[:, None] * b) for a, b in ((X, X), (Y, Y), (X, Y)))
    var_h = (np.sum(CX * CY) + np.sum(CXY * CXY.T)) / 2 - mu**2
    zeta_1 = p @ g1**2
    return mu, zeta_1, var_h - 2 * zeta_1


def test_x_estimates_minus_the_gradient_of_entropy():
    """E[X] = −∇𝓗: the enumerated mean against autograd of the enumerated entropy."""
    w = world()
    mask = torch.tensor(w.mask)

    def entropy(theta):
        H, S = entropy_logprob(w, theta)
        p = torch.where(mask, S, 0.0).sum(1).exp() / PROMPTS
        return (p * torch.where(mask, H, 0.0).sum(1)).sum()

    _, p, X, _ = outcomes()
    np.testing.assert_allclose(p @ X, -torch.func.grad(entropy)(w.theta).numpy(), atol=1e-12)


def test_products_of_a_gram_matrix_are_those_of_the_vectors():
    S, J, reward, P = scores()
    rows = draw_rows(np.random.default_rng(62), 5, 2)
    r, index = rows.ravel(), np.repeat([7, 3, 9, 1, 4], 2)
    K = (J[r] * P) @ J[r].T
    Q = pair_products(K, leave_one_out(S[r], index), leave_one_out(reward[r], index), index)
    number, _, X, Y = outcomes()
    order = np.argsort([7, 3, 9, 1, 4])
    o = number[rows[:, 0], rows[:, 1]][order]
    np.testing.assert_allclose(Q, X[o] @ Y[o].T, rtol=1e-10, atol=1e-14)


def test_u_and_zetas_are_unbiased_and_hoeffding_gives_the_variance():
    B = 6
    mu, zeta_1, zeta_2 = exact()
    _, _, X, Y = outcomes()
    o = drawn(63, REPLICATIONS, B)
    found = [one_batch(q, unit="1", draws=2) for q in np.einsum("rnp,rmp->rnm", X[o], Y[o])]
    values = np.array([[f.u.value, f.zeta_1, f.zeta_2, f.variance] for f in found])
    variance = 4 * zeta_1 / B + 2 * zeta_2 / (B * (B - 1))
    z = (values.mean(axis=0) - [mu, zeta_1, zeta_2, variance]) / (values.std(axis=0) / np.sqrt(REPLICATIONS))
    print(f"μ {mu:.4g}, ζ₁ {zeta_1:.4g}, ζ₂ {zeta_2:.4g}, z {z}")
    assert (np.abs(z) < 4).all()
    # The spread of U itself; that of a variance over 4000 values with kurtosis κ is known to √((κ−1)/4000).
    centred = values[:, 0] - mu
    spread, kurtosis = np.mean(centred**2), np.mean(centred**4) / np.mean(centred**2) ** 2
    assert abs(spread / variance - 1) < 4 * np.sqrt((kurtosis - 1) / REPLICATIONS)
    # Without the correction ζ̂₁ would be off by more than the test allows.
    assert abs(((B - 2) / (B - 1)) ** 2 * zeta_1 + (B - 2) / (B - 1) ** 2 * zeta_2 - zeta_1) > 0.1 * zeta_1


def test_jackknife_is_that_of_u_and_zeta_1_of_the_jackknife_is_no_second_opinion():
    B = 12
    _, _, X, Y = outcomes()
    o = drawn(64, B)
    Q = X[o] @ Y[o].T
    found = one_batch(Q, unit="1")
    without = [one_batch(np.delete(np.delete(Q, n, 0), n, 1), unit="1", draws=2).u.value for n in range(B)]
    variance = (B - 1) / B * np.sum((np.array(without) - np.mean(without)) ** 2)
    assert found.u.stderr**2 == pytest.approx(variance, rel=1e-10)
    h = (Q + Q.T) / 2 * (1 - np.eye(B))
    r = h.sum(1) / (B - 1)
    raw = np.sum((r - found.u.value) ** 2) / (B - 1)
    assert B / 4 * variance == pytest.approx(((B - 1) / (B - 2)) ** 2 * raw, rel=1e-10)


def test_intervals_of_one_batch_cover():
    """Nominal 95 %: 93 to 97 % at 200 prompts over 1000 batches (the count's own error is 0.7 %); at 40 the law is still skewed.

    The jackknife's variance counts ζ₂ twice: its mean over 1000 batches of 40 is that, and not the true one.
    """
    mu, zeta_1, zeta_2 = exact()
    _, _, X, Y = outcomes()
    hits = {}
    for B in (40, 200):
        ends = [one_batch(X[o] @ Y[o].T, unit="1", draws=2).u.interval() for o in drawn(65, 1000, B)]
        hits[B] = np.mean([low <= mu <= high for low, high in ends])
    bootstrap, jackknife = [], []
    for r, o in enumerate(drawn(68, 1000, 40)):
        found = one_batch(X[o] @ Y[o].T, unit="1", draws=200 if r < 100 else 2)
        if r < 100:
            bootstrap.append(found.bootstrap_stderr**2)
        jackknife.append(found.u.stderr**2)
    truth = 4 * zeta_1 / 40 + 2 * zeta_2 / (40 * 39)
    print(
        f"coverage {hits}, jackknife {np.mean(jackknife) / truth:.3f}, bootstrap {np.mean(bootstrap) / truth:.3f}"
    )
    assert 0.93 <= hits[200] <= 0.97
    expected = (4 * zeta_1 / 40 + 4 * zeta_2 / (40 * 38)) / truth
    assert np.mean(jackknife) / truth == pytest.approx(
        expected, abs=4 * np.std(jackknife) / truth / np.sqrt(1000)
    )
    assert 0.8 < np.mean(bootstrap) / truth < 1.3


@pytest.mark.parametrize("G", [2, 3])
def test_bias_of_pairs_within_a_prompt(G):
    """Σ_{i≠j}(S_i − S̄_{−i}) A_j ∇S_i·∇S_j, enumerated over all groups: ((G−1)²+1)/(G(G−1)) and 1 + (G−1)⁻² of the truth."""
    S, J, reward, P = scores()
    p, per_prompt = probabilities(), len(S) // PROMPTS
    for n in range(PROMPTS):
        rows = np.arange(n * per_prompt, (n + 1) * per_prompt)
        q, s, r = p[rows] * PROMPTS, S[rows], reward[rows]
        K = (J[rows] * P) @ J[rows].T
        truth = (q * s) @ K @ (q * r)
        groups = np.array(list(itertools.product(range(per_prompt), repeat=G)))
        weight = q[groups].prod(axis=1)
        left_out = s[groups] - (s[groups].sum(1, keepdims=True) - s[groups]) / (G - 1)
        mean = r[groups] - r[groups].mean(1, keepdims=True)
        gram = K[groups[:, :, None], groups[:, None, :]] * (1 - np.eye(G))
        for A, factor in (
            (mean, ((G - 1) ** 2 + 1) / (G * (G - 1))),
            (G / (G - 1) * mean, 1 + (G - 1) ** -2),
        ):
            pairs = np.einsum("gi,gij,gj->g", left_out, gram, A) / (G * (G - 1))
            assert weight @ pairs == pytest.approx(factor * truth, rel=1e-9)


def test_two_batches_and_the_trace_counted_once():
    B_E, B_U = 5, 4
    _, p, X, Y = outcomes()
    mX, mY = p @ X, p @ Y
    SX, SY = (a.T @ (p[:, None] * a) - np.outer(m, m) for a, m in ((X, mX), (Y, mY)))
    trace = np.sum(SX * SY) / (B_E * B_U)
    parts = mY @ SX @ mY / B_E, mX @ SY @ mX / B_U
    e, u = drawn(66, REPLICATIONS, B_E), drawn(67, REPLICATIONS, B_U)
    found = []
    for q in np.einsum("rnp,rmp->rnm", X[e], Y[u]):
        f = two_batch(q, unit="1")
        V_X, V_Y = f.given_update.stderr**2, f.given_evaluation.stderr**2
        assert f.value.stderr**2 == pytest.approx(V_X + V_Y - f.trace) or V_X + V_Y < f.trace
        found.append([f.value.value, V_X + V_Y - f.trace, V_X, V_Y, f.trace])
    found = np.array(found)
    error = found.std(axis=0) / np.sqrt(REPLICATIONS)
    z = (
        found.mean(axis=0) - [mX @ mY, sum(parts) + trace, parts[0] + trace, parts[1] + trace, trace]
    ) / error
    print(f"z {z}; the trace is {trace / (sum(parts) + trace):.2f} of the variance")
    assert (np.abs(z) < 4).all()
    assert trace > 8 * error[1]  # counted twice it would show
    centred = found[:, 0] - mX @ mY
    kurtosis = np.mean(centred**4) / np.mean(centred**2) ** 2
    assert abs(np.mean(centred**2) / (sum(parts) + trace) - 1) < 4 * np.sqrt((kurtosis - 1) / REPLICATIONS)


def test_two_batches_from_their_margins():
    """What is known without the matrix: V_Y as it was, and the sum with the trace counted twice."""
    _, _, X, Y = outcomes()
    Q = X[drawn(69, 7)] @ Y[drawn(70, 5)].T
    found = two_batch(Q, unit="1")
    of_update, of_both = without_trace(found.given_update, Q.mean(axis=0) / 5)
    assert of_update.stderr == pytest.approx(found.given_evaluation.stderr, rel=1e-12)
    assert of_both.stderr**2 == pytest.approx(found.value.stderr**2 + found.trace, rel=1e-12)
    with pytest.raises(UserError, match="two prompts of U"):
        without_trace(found.value, [1.0])


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="B ≥ 4"):
        one_batch(np.zeros((3, 3)), unit="1")
    with pytest.raises(UserError, match="two prompts each"):
        two_batch(np.zeros((1, 5)), unit="1")
    with pytest.raises(UserError, match="single response"):
        leave_one_out(np.ones(3), np.array([0, 0, 1]))
    with pytest.raises(UserError, match="both \\[N\\]"):
        leave_one_out(np.ones(3), np.array([0, 0]))
    with pytest.raises(UserError, match="K has shape"):
        pair_products(np.zeros((2, 3)), np.ones(2), np.ones(2), np.arange(2))
