"""Shares add up to δH₁, marginals are derivatives: against brute force and finite differences on a tiny model, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entropy_kernels.attribution import (
    TokenWeights,
    entropy_weights,
    half_gradient,
    marginal_direction,
    part_values,
    reward_weights,
    share_direction,
    token_influence,
    total_weights,
)
from entropy_kernels.derivatives import entropy_gradient, token_gradient, token_stats
from entropy_kernels.updates import OptimizerState, update_direction
from tests import tiny

ADVANTAGE = torch.tensor([1.2, -0.7, 0.4, -0.4, -1.0, 2.0], dtype=torch.float64)
RULES = [("adamw", None), ("adamw", 0.3), ("rmsprop", 0.3), ("sgd", None), ("sgd", 0.3), ("square_avg", 0.3)]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy()


@pytest.fixture(scope="module")
def update_batch():
    return tiny.batch(seed=5)


@pytest.fixture(scope="module")
def X(policy):
    return entropy_gradient(policy, tiny.batch(seed=2))


def weights(batch) -> dict[str, TokenWeights]:
    """A policy gradient and an entropy bonus with a KL-like part, as a loss would have."""
    mask = batch.response_mask.double()
    omega = mask / mask.sum()
    generator = torch.Generator().manual_seed(3)
    penalty = omega * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    return {
        "reward": TokenWeights(-omega * ADVANTAGE[:, None]),
        "bonus": TokenWeights(0.1 * penalty, -0.3 * omega),
    }


def gradient(policy, batch, parts, factor=1.0):
    """g_raw = Σ f (g∇S + q∇H) over all parts."""
    g, q = total_weights(parts)
    return token_gradient(policy, batch, logprob_weight=factor * g, entropy_weight=factor * q)


def state(policy, rule) -> OptimizerState:
    """Moments of a state some steps old, two groups with different rates, sizes like those of the gradient."""
    generator = torch.Generator().manual_seed(7)
    slots, hyper = {}, {}
    for name, p in policy.params.items():
        m, u = (torch.randn(p.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        slots[name] = {"exp_avg": 0.02 * m, "exp_avg_sq": (0.03 * u) ** 2, "step": torch.tensor(4.0)}
        if rule == "square_avg":
            slots[name] = {"square_avg": (0.03 * u) ** 2}
        hyper[name] = {"lr": 2e-3 if "norm" in name else 1e-3, "betas": (0.9, 0.95), "eps": 1e-4}
        hyper[name] |= {"alpha": 0.9} if rule == "square_avg" else {"weight_decay": 0.1}
    return OptimizerState(params=policy.params, slots=slots, hyper=hyper)


def direction(policy, batch, rule, clip, factor=1.0):
    return update_direction(
        gradient(policy, batch, weights(batch), factor), state(policy, rule),
        rule="rmsprop" if rule == "square_avg" else rule, lr=1e-3, max_grad_norm=clip, marginal=True,
    )  # fmt: skip


def inner(a, b):
    return sum(float((x * b[name]).sum()) for name, x in a.items())


def test_halves_add_up_to_the_gradient_and_hold_different_prompts(policy, X):
    batch = tiny.batch(seed=2)
    weights = entropy_weights(token_stats(policy, batch), batch, per="token", estimator="per_decision")
    a, b = (half_gradient(policy, batch, weights, half) for half in (0, 1))
    for name, x in X.items():
        torch.testing.assert_close(a[name] + b[name], x, rtol=1e-11, atol=1e-13)
    moved = batch.input_ids.clone()
    odd = batch.prompt_index == 1
    moved[odd] = (moved[odd] + 1) % 23  # another second prompt
    reward = np.array([1.0, 0.0, 1.0, 0.2, 0.0, 0.5])
    other = type(batch)(moved, batch.attention_mask, batch.response_mask, batch.prompt_index)
    before, after = (
        [half_gradient(policy, x, reward_weights(reward, x), half) for half in (0, 1)] for x in (batch, other)
    )
    assert all(torch.equal(before[0][name], after[0][name]) for name in X)
    assert not all(torch.equal(before[1][name], after[1][name]) for name in X)


@pytest.mark.parametrize("rule, clip", RULES)
def test_shares_momentum_and_decay_add_up_to_the_change(policy, update_batch, X, rule, clip):
    update = direction(policy, update_batch, rule, clip)
    assert (update.clip < 1) == (clip is not None)
    shares = token_influence(policy, update_batch, share_direction(update, X), weights(update_batch))
    parts = part_values(update, X)
    total = sum(x.sum() for x in shares.values()) + parts["momentum"] + parts["decay"]
    assert abs(shares["bonus"].sum()) > 1e-3 * abs(total)
    assert total == pytest.approx(inner(update.direction, X), rel=1e-10)
    assert sum(x.sum() for x in shares.values()) == pytest.approx(parts["gradient"], rel=1e-10)


def test_a_share_is_the_tokens_own_part_of_the_direction(policy, update_batch, X):
    """Against the gradient of one token alone, pushed through the frozen preconditioner."""
    update = direction(policy, update_batch, "adamw", 0.3)
    parts = weights(update_batch)
    shares = token_influence(policy, update_batch, share_direction(update, X), parts)
    for i, t in update_batch.response_mask.nonzero()[::7].tolist():
        one = torch.zeros_like(parts["bonus"].logprob)
        one[i, t] = 1.0
        own = token_gradient(
            policy,
            update_batch,
            logprob_weight=one * parts["bonus"].logprob,
            entropy_weight=one * parts["bonus"].entropy,
        )
        want = -sum(
            update.gain[n] * float((update.preconditioner[n] * x * X[n]).sum()) for n, x in own.items()
        )
        assert shares["bonus"][i, t] == pytest.approx(want, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("rule, clip", RULES)
def test_a_marginal_is_the_derivative_in_the_tokens_weight(policy, update_batch, X, rule, clip):
    """Central differences of X·v in the factor of a token, every moment, clip and normaliser recomputed."""
    update = direction(policy, update_batch, rule, clip)
    found = token_influence(policy, update_batch, marginal_direction(update, X), weights(update_batch))
    marginal = sum(found.values())
    shares = sum(
        token_influence(policy, update_batch, share_direction(update, X), weights(update_batch)).values()
    )
    step = 1e-5
    for i, t in update_batch.response_mask.nonzero()[::9].tolist():
        ends = []
        for sign in (1, -1):
            factor = torch.ones(update_batch.response_mask.shape, dtype=torch.float64)
            factor[i, t] += sign * step
            ends.append(inner(direction(policy, update_batch, rule, clip, factor).direction, X))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert marginal[i, t] == pytest.approx(slope, rel=1e-6, abs=1e-9)
        if rule != "sgd":  # what a share leaves out is no small thing here
            assert abs(shares[i, t] / slope - 1) > 1e-2


def test_where_nothing_ever_flowed_the_marginal_is_finite():
    zero = torch.zeros(3, dtype=torch.float64)
    params = {"p": torch.ones(3, dtype=torch.float64)}
    update = update_direction(
        {"p": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)},
        OptimizerState(
            params=params, slots={"p": {"exp_avg": zero, "exp_avg_sq": zero, "step": torch.tensor(0.0)}},
            hyper={"p": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}},
        ),
        rule="adamw", marginal=True,
    )  # fmt: skip
    assert torch.isfinite(update.marginal["p"]).all()
    assert update.marginal["p"][0] == pytest.approx(
        1e8
    )  # m̂/(√v̂ + ε) is g/ε at 0, with a kink from √v̂ beyond it
    assert abs(float(update.marginal["p"][1])) < 1e-7  # the first step is a sign: no answer to the size of g
    assert (
        not update.clip_axis
        and not update_direction(params, OptimizerState.fresh(params, lr=1e-3), rule="sgd").marginal
    )
