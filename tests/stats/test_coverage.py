"""Over many batches from the enumerable policy: bias, spread, and whether intervals hold what they promise.

Seeds and numbers of replications are fixed, and none was chosen by its result; the noise of each check is stated.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from enumerable import at, draw_rows, population, probabilities, ratio_derivatives, world
from test_prompt_sums import ARRAYS

from entropy_kernels.stats import (
    ChangeSums,
    PromptSums,
    change_sums,
    compare_direct,
    compare_integrated,
    direct_change,
    entropy,
    first_derivative,
    integral_weights,
    integrated_change,
    prompt_sums,
    radau_nodes,
    second_derivative,
)
from entropy_kernels.stats.ratio import entropy_of, first_of

ETA = 0.2
KINDS = [("token", "per_decision"), ("token", "whole_sequence"), ("sequence", "per_decision")]


def row_sums(per, estimator, eta) -> PromptSums:
    """The sums of every row of the world as a prompt of its own."""
    values, tangents, curvature = at(eta)
    rows = np.arange(len(values.entropy))
    kinds = {"per": per, "estimator": estimator, "tangents": tangents, "curvature": curvature}
    return prompt_sums(at(0.0)[0], values, world().mask, rows, **kinds)


def gather(sums, rows):
    """Batches of prompts from row sums; rows [R, B, G] -> a list of R sums over B prompts."""
    arrays = {k: v for k, v in sums._asdict().items() if k not in ("per", "estimator")}
    drawn = {k: v[rows].sum(-1) for k, v in arrays.items()}
    return [sums._replace(**{k: v[r] for k, v in drawn.items()}) for r in range(len(rows))]


def row_changes(per, estimator) -> ChangeSums:
    kinds = {"per": per, "estimator": estimator}
    return change_sums(at(0.0)[0], at(ETA)[0], world().mask, np.arange(len(world().prompt)), **kinds)


@lru_cache(maxsize=5)
def counts(B):
    """How often each row of the world is drawn in each of 40,000 batches of B, float64 for a fast product."""
    return np.random.default_rng(81 + B).multinomial(B, probabilities(), size=40_000).astype(float)


@pytest.mark.parametrize(("per", "estimator"), [("token", "per_decision"), ("token", "whole_sequence")])
@pytest.mark.parametrize("what", ["entropy", "first"])
def test_bias_of_ratios_falls_as_one_over_prompts(per, estimator, what):
    """Slope of log |bias| against log B is −1 ± 0.1, itself known to better than 0.05.

    The linear part of the ratio, whose mean is exactly 0, is taken off first: it only adds noise.
    """
    Bs = np.array([5, 10, 20, 40, 80])
    p, sums = probabilities(), row_sums(per, estimator, ETA)
    f, names = (entropy_of, ARRAYS[:2]) if what == "entropy" else (first_of, ARRAYS[:4])
    arrays = np.stack([getattr(sums, name) for name in names], axis=1)
    mean = p @ arrays
    exact = f(*mean)
    step = 1e-6 * np.abs(mean).max()
    slopes = [(f(*(mean + step * e)) - f(*(mean - step * e))) / (2 * step) for e in np.eye(len(mean))]

    bias, error = [], []
    for B in Bs:
        means = counts(B) @ arrays / B
        rest = f(*means.T) - exact - (means - mean) @ slopes
        bias.append(rest.mean())
        error.append(rest.std() / np.sqrt(len(rest)))
    bias, error = np.abs(bias), np.array(error)
    weights = bias / error  # 1/error of log bias
    (slope, _), covariance = np.polyfit(np.log(Bs), np.log(bias), 1, w=weights, cov="unscaled")
    print(f"{per} {estimator} {what}: bias {bias}, slope {slope:.3f} ± {covariance[0, 0] ** 0.5:.3f}")
    assert covariance[0, 0] ** 0.5 < 0.05
    assert slope == pytest.approx(-1, abs=0.1)


def replicate(per, estimator, B, replications, seed):
    """Names -> (exact value, list of estimates) for `replications` batches of B prompts × 2 responses."""
    rows = draw_rows(np.random.default_rng(seed), replications, B, 2)
    at_zero = gather(row_sums(per, estimator, 0.0), rows)
    changes = gather(row_changes(per, estimator), rows)

    h, h1, h2 = ratio_derivatives(*population(per, estimator, 0.0))
    moved = ratio_derivatives(*population(per, estimator, ETA))[0] - h
    direct = [compare_direct(c, z, ETA) for c, z in zip(changes, at_zero, strict=True)]
    named = {
        "h": (h, [entropy(z) for z in at_zero]),
        "h'": (h1, [first_derivative(z) for z in at_zero]),
        "h''": (h2, [second_derivative(z) for z in at_zero]),
        "dH direct": (moved, [direct_change(c) for c in changes]),
        "dH direct - linear": (moved - ETA * h1, [c.minus_linear for c in direct]),
        "dH direct - quadratic": (moved - ETA * h1 - ETA**2 / 2 * h2, [c.minus_quadratic for c in direct]),
    }
    if (per, estimator) == KINDS[0]:  # the others would only repeat that both truths are one number
        nodes = radau_nodes(4, ETA)
        weights = integral_weights(nodes, ETA)[0]
        at_nodes = list(zip(*(gather(row_sums(per, estimator, s), rows) for s in nodes), strict=True))
        # The target is what four nodes make of the exact derivative: this is about spread, not about quadrature.
        target = float(weights @ [ratio_derivatives(*population(per, estimator, s))[1] for s in nodes])
        pairs = [compare_integrated(n, weights, z, ETA) for n, z in zip(at_nodes, at_zero, strict=True)]
        named["dH integrated"] = (target, [integrated_change(n, weights) for n in at_nodes])
        named["dH integrated - linear"] = (target - ETA * h1, [c.minus_linear for c in pairs])
    return named


def coverage(exact, estimates):
    ends = np.array([e.interval() for e in estimates])
    return np.mean((ends[:, 0] <= exact) & (exact <= ends[:, 1]))


@pytest.mark.parametrize(("per", "estimator"), KINDS)
def test_intervals_cover(per, estimator):
    """Nominal 95 %: 93 to 97 % at 100 prompts over 2,000 batches (the count's own standard error is 0.5 %)."""
    few = {name: coverage(*x) for name, x in replicate(per, estimator, 20, 1000, seed=82).items()}
    many = {name: coverage(*x) for name, x in replicate(per, estimator, 100, 2000, seed=83).items()}
    for name in many:
        print(f"{per} {estimator} {name}: B = 20 {few[name]:.3f}, B = 100 {many[name]:.3f}")
    assert {name: x for name, x in many.items() if not 0.93 <= x <= 0.97} == {}


@pytest.mark.parametrize(("per", "estimator"), KINDS)
def test_errors_fall_with_the_root_of_prompts_and_match_the_spread(per, estimator):
    Bs = (50, 200, 800)
    mean_error = {}
    for B in Bs:
        for name, (_, estimates) in replicate(per, estimator, B, 200 if B == 800 else 50, seed=84).items():
            stderr = np.array([e.stderr for e in estimates])
            mean_error.setdefault(name, []).append(stderr.mean())
            if B == 800:  # spread of 200 values: known to 5 %
                spread = np.std([e.value for e in estimates], ddof=1)
                assert stderr.mean() / spread == pytest.approx(1, abs=4 * 0.05), name
    for name, errors in mean_error.items():
        assert np.polyfit(np.log(Bs), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.05), name
