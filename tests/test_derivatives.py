"""Tangents, curvature, gradients and Hessian-vector products against finite differences and against each other, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from entropy_kernels import stats
from entropy_kernels.derivatives import (
    entropy_gradient,
    hvp,
    token_curvature,
    token_gradient,
    token_stats,
    token_tangents,
)

KINDS = [
    (per, estimator)
    for per in ("token", "sequence")
    for estimator in ("per_decision", "whole_sequence", "path")
]


def dot(a, b):
    return sum((a[name].double() * b[name].double()).sum().item() for name in b)


def small(v, scale=0.01):
    return {name: scale * x for name, x in v.items()}


def five_point(f, step):
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


@pytest.mark.parametrize("tied", [True, False])
def test_tangents_and_curvature_equal_finite_differences(tied):
    policy, batch = tiny.policy(tied=tied), tiny.batch()
    v = tiny.direction(policy)
    c = token_curvature(policy, batch, v)
    for name in ("entropy", "logprob"):
        first = five_point(lambda x, name=name: getattr(token_stats(policy.shifted(v, x), batch), name), 5e-6)
        second = five_point(
            lambda x, name=name: getattr(token_tangents(policy.shifted(v, x), batch, v), f"d_{name}"), 5e-6
        )
        want = getattr(c, f"d_{name}"), getattr(c, f"d2_{name}")
        assert want[0].abs().max() > 0.1 and want[1].abs().max() > 0.1
        assert (first - want[0]).abs().max() < 1e-8 * want[0].abs().max()
        assert (second - want[1]).abs().max() < 1e-8 * want[1].abs().max()


def test_tangents_are_the_first_half_of_curvature():
    policy, batch = tiny.policy(), tiny.batch()
    v = tiny.direction(policy)
    t, c = token_tangents(policy, batch, v), token_curvature(policy, batch, v)
    for name in t._fields:
        assert (getattr(t, name) - getattr(c, name)).abs().max() < 1e-13 * getattr(c, name).abs().max()


def test_float32_derivatives_are_close_to_float64():
    batch = tiny.batch()
    double, single = tiny.policy(), tiny.policy(dtype=torch.float32)
    want = token_curvature(double, batch, tiny.direction(double))
    got = token_curvature(single, batch, tiny.direction(single))
    # Fields of one order are held against the largest of that order: d²logprob, say, is what remains of terms as large as
    # d²entropy, and carries their rounding.
    for order in (("entropy", "logprob"), ("d_entropy", "d_logprob"), ("d2_entropy", "d2_logprob")):
        largest = max(getattr(want, name).abs().max() for name in order)
        for name in order:
            assert getattr(got, name).dtype == torch.float32
            assert (getattr(got, name) - getattr(want, name)).abs().max() < 1e-5 * largest


def test_gradient_is_the_transpose_of_the_tangents():
    policy, batch = tiny.policy(tied=False), tiny.batch()
    v = tiny.direction(policy)
    generator = torch.Generator().manual_seed(5)
    q, g = (torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = token_tangents(policy, batch, v)
    both = token_gradient(policy, batch, entropy_weight=q, logprob_weight=g)
    assert dot(both, v) == pytest.approx((q * t.d_entropy + g * t.d_logprob).sum().item(), rel=1e-11)
    only = token_gradient(policy, batch, logprob_weight=g)
    assert dot(only, v) == pytest.approx((g * t.d_logprob).sum().item(), rel=1e-11)


def estimator_at(policy, batch, v, eta, per, estimator, **derivatives):
    base, moved = (
        stats.TokenValues(*map(np.asarray, token_stats(policy.shifted(v, x), batch))) for x in (0.0, eta)
    )
    return stats.prompt_sums(
        base,
        moved,
        batch.response_mask.numpy(),
        batch.prompt_index.numpy(),
        per=per,
        estimator=estimator,
        **derivatives,
    )


@pytest.mark.parametrize("per, estimator", KINDS)
def test_entropy_gradient_and_hvp_are_derivatives_of_the_estimator(per, estimator):
    policy, batch = tiny.policy(), tiny.batch()
    v = small(tiny.direction(policy))
    gradient = entropy_gradient(policy, batch, per=per, estimator=estimator)
    product = hvp(policy, batch, v, per=per, estimator=estimator)

    def h(eta):
        sums = estimator_at(policy, batch, v, eta, per, estimator)
        return sums.numerator.sum() / sums.denominator.sum()

    first = five_point(h, 1e-3)
    second = (16 * (h(1e-2) + h(-1e-2)) - (h(2e-2) + h(-2e-2)) - 30 * h(0.0)) / (12 * 1e-4)
    assert dot(gradient, v) == pytest.approx(first, rel=1e-7)
    assert dot(product, v) == pytest.approx(second, rel=1e-5)
    c = token_curvature(policy, batch, v)
    sums = estimator_at(
        policy, batch, v, 0.0, per, estimator,
        tangents=stats.TokenTangents(c.d_entropy.numpy(), c.d_logprob.numpy()),
        curvature=stats.TokenCurvature(c.d2_entropy.numpy(), c.d2_logprob.numpy()),
    )  # fmt: skip
    assert dot(gradient, v) == pytest.approx(stats.first_derivative(sums).value, rel=1e-11)
    assert dot(product, v) == pytest.approx(stats.second_derivative(sums).value, rel=1e-10)


def test_hvp_is_symmetric():
    policy, batch = tiny.policy(), tiny.batch()
    u, v = tiny.direction(policy, 1), tiny.direction(policy, 2)
    assert dot(hvp(policy, batch, v), u) == pytest.approx(dot(hvp(policy, batch, u), v), rel=1e-10)


def test_path_and_score_parts_both_matter():
    policy, batch = tiny.policy(), tiny.batch()
    v = tiny.direction(policy)
    whole, path = (dot(entropy_gradient(policy, batch, estimator=e), v) for e in ("per_decision", "path"))
    assert abs(whole - path) > 1e-3 * abs(whole)


def test_unknown_names_are_refused():
    policy, batch = tiny.policy(), tiny.batch()
    for options in ({"per": "word"}, {"estimator": "magic"}):
        with pytest.raises(ValueError, match="expected"):
            entropy_gradient(policy, batch, **options)


def test_progress_counts_every_sequence():
    policy, batch = tiny.policy(), tiny.batch()
    seen: list[int] = []
    token_stats(policy, batch, progress=seen.append)
    assert sum(seen) == 6 and len(seen) > 1
