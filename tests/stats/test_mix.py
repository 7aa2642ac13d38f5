"""Rao-Blackwell, Monte Carlo and their mix: the counter-example, and the mean left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from enumerable import at, draw, draw_rows, population, world

from entropy_kernels.errors import UserError
from entropy_kernels.stats import TokenValues, best_mix


def counter_example(copies):
    """The first token is a with probability 0.1 and ends, or b and then one of nine: ten responses of probability 0.1 each."""
    h1 = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    H = np.array([[h1, 0.0]] + [[h1, math.log(9)]] * 9)
    S = np.array([[math.log(0.1), 0.0]] + [[math.log(0.9), -math.log(9)]] * 9)
    mask = np.array([[True, False]] + [[True, True]] * 9)
    return *(np.repeat(x, copies, axis=0) for x in (H, S)), np.repeat(mask, copies, axis=0)


def test_rao_blackwell_can_be_the_worse_of_the_two():
    """Var(−S) = 0 and Var(ΣH) = 0.09 (log 9)² = 0.43, exactly; the mix finds c = 1."""
    H, S, mask = counter_example(copies=3)
    found = best_mix(TokenValues(H, S), mask, np.arange(30), per="sequence")
    assert found.monte_carlo.stderr == pytest.approx(0, abs=1e-14)
    variance = found.rao_blackwell.stderr**2 * 29
    assert variance == pytest.approx(0.09 * math.log(9) ** 2, rel=1e-12) and variance == pytest.approx(
        0.43, abs=5e-3
    )
    assert found.coefficients == pytest.approx([1.0] * 5, rel=1e-12)
    assert found.best_mix.value == pytest.approx(math.log(10), rel=1e-12)
    assert found.best_mix.stderr == pytest.approx(0, abs=1e-13)
    assert found.monte_carlo_variance_ratio.value == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_mix_has_the_right_mean_and_the_least_spread(per):
    """600 batches of 320 prompts × 1: z of the mean below 4, after the ratio's own bias (the same for all three, of order 1/320)."""
    values = at(0.0)[0]
    N, D = population(per, "per_decision", 0.0)
    h = N[0] / D[0]
    found = []
    for r in draw_rows(np.random.default_rng(51), 600, 320, 1)[..., 0]:
        mix = best_mix(TokenValues(*(x[r] for x in values)), world().mask[r], np.arange(320), per=per)
        found.append([mix.rao_blackwell.value, mix.monte_carlo.value, mix.best_mix.value])
    found = np.array(found)
    error = found.std(axis=0) / math.sqrt(len(found))
    print(f"per {per}: means {found.mean(axis=0) - h}, spreads {found.std(axis=0)}")
    allowed = 4 * error + (0 if per == "sequence" else 0.001 * h)
    assert (np.abs(found.mean(axis=0) - h) < allowed).all()
    # What the mix adds to Rao-Blackwell has mean zero: no bias of a ratio to allow for, to first order.
    added = found[:, 2] - found[:, 0]
    assert abs(added.mean()) < 4 * added.std() / math.sqrt(len(added)) + (
        0 if per == "sequence" else 2e-4 * h
    )
    assert found.std(axis=0)[2] < 1.02 * found.std(axis=0)[:2].min()


def test_too_few_prompts_are_refused():
    batch = draw(3, 2, seed=52)
    with pytest.raises(UserError, match="expected 4"):
        best_mix(batch.at(0.0)[0], batch.mask, batch.prompt_index, per="token")
