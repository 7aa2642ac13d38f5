"""The gradient of the expected reward, against enumeration of every pair of samples; its change against its derivative."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from entropy_kernels.errors import UserError
from entropy_kernels.stats import (
    TokenTangents,
    TokenValues,
    centred_rewards,
    first_derivative,
    reward_cotangents,
    reward_sums,
)

PROBABILITY = np.array([0.5, 0.3, 0.2])
REWARD = np.array([1.0, 0.0, 0.4])


@pytest.mark.parametrize("prompt", [[0, 0], [0, 1]])
def test_leaving_the_response_out_of_its_baseline_costs_no_bias(prompt):
    """All pairs of actions of a softmax over three, weighted by their probability: the mean is ∇J."""
    J = PROBABILITY @ REWARD
    truth = PROBABILITY * (REWARD - J)
    mean = np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        g = reward_cotangents(REWARD[list(pair)], np.array(prompt), np.ones((2, 1), bool))[:, 0]
        scores = np.eye(3)[list(pair)] - PROBABILITY
        mean += PROBABILITY[list(pair)].prod() * (g @ scores)
    assert mean == pytest.approx(truth, abs=1e-15)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((8, 5)) < 0.7
    mask[:, 0] = True
    S, dS = (np.where(mask, rng.normal(size=mask.shape), 0.0) for _ in range(2))
    return mask, S, dS, rng.random(8), np.repeat(np.arange(4), 2)


def test_the_derivative_is_that_of_the_weighted_mean_at_any_point():
    mask, S, dS, reward, prompt = batch()
    zero = np.zeros_like(S)

    def sums(eta):
        values = (TokenValues(zero, S), TokenValues(zero, S + eta * dS))
        return reward_sums(*values, TokenTangents(zero, dS), reward, mask, prompt)

    def J(eta):
        found = sums(eta)
        return found.numerator.sum() / found.denominator.sum()

    for eta in (0.0, 0.3):
        slope = (J(eta + 1e-5) - J(eta - 1e-5)) / 2e-5
        assert first_derivative(sums(eta)).value == pytest.approx(slope, rel=1e-8)
    at_zero = (reward_cotangents(reward, prompt, mask) * dS).sum()
    assert first_derivative(sums(0.0)).value == pytest.approx(at_zero, rel=1e-12)


def test_a_response_is_compared_with_its_group_or_across_prompts():
    assert centred_rewards([1.0, 0.0, 0.5, 1.0], [0, 0, 0, 3]) == pytest.approx([0.75, -0.75, 0.0, 0.5])
    with pytest.raises(UserError, match="expected two arrays"):
        centred_rewards([1.0], [0])
