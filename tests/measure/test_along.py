"""The demo in float64: two forms of the truth agree, and the predictions miss it by η² and η³.

Every derivative is also scaled by 1.01, one at a time, to see the very same checks fail.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from entropy_kernels import stats
from entropy_kernels.measure.along import Along
from entropy_kernels.measure.config import MeasureConfig
from entropy_kernels.measure.direction import get_update, load_state
from entropy_kernels.measure.steps import batch_of, get_rollouts, load_policy

# Powers are read from doubling steps: below, truth − quadratic is lost in the rounding of the truth; above, importance weights
# of 48 sequences make the series itself useless.
DOUBLING = tuple(4e-7 * 2**k for k in range(4))
ETAS = (*DOUBLING, *(float(x) for x in np.geomspace(4.6e-6, 1e-4, 5)))
AGREEING = slice(1, None)  # the two truths are compared in [8e-7, 1e-4]


def demo(**changes):
    settings = dict(prompts_u=16, prompts_e=24, group_size_e=2, precision="float64", integration_rtol=1e-8)
    return MeasureConfig.demo(**{**settings, **changes})


@pytest.fixture(scope="module")
def along():
    config = demo()
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U, E = get_rollouts(config, policy, None, False)
    update = get_update(config, policy, state, U, batch_of(U), info.stored_lr, False)
    return Along(config, policy, update.direction, batch_of(E), ETAS, False)


def rebuilt(along, *, scale_at=None, name=None, curvature=None):
    """The same evaluation with one derivative scaled by 1.01: at the nodes, at 0, or of second order."""
    other = copy.copy(along)
    other.nodes = list(along.nodes)
    for i, node in enumerate(along.nodes):
        if scale_at == "nodes" and node.eta or scale_at == "zero" and not node.eta:
            tangents = node.tangents._replace(**{name: 1.01 * getattr(node.tangents, name)})
            other.nodes[i] = node._replace(tangents=tangents)
    other.curvature = along.curvature
    if curvature is not None:
        other.curvature = along.curvature._replace(**{curvature: 1.01 * getattr(along.curvature, curvature)})
    other.base = other.nodes[0]
    other.base_sums = other.sums(other.base, curvature=other.curvature)
    other.node_sums = [other.base_sums] + [other.sums(node) for node in other.nodes[1:]]
    return other


def truths(along):
    direct = [along._change(i, eta)["true_direct"].value for i, eta in enumerate(along.etas)]
    integrated = [stats.integrated_change(along.node_sums, w).value for w in along.weights]
    return np.array(direct), np.array(integrated)


def disagreement(along):
    direct, integrated = truths(along)
    return np.abs(integrated / direct - 1)[AGREEING].max()


def exponents(along):
    """Log-log slopes in η of truth − linear and truth − quadratic, by the direct truth, with the next power cancelled.

    A miss c_p·η^p + c_{p+1}·η^{p+1} + … leaves 2^p·c_p·η^p in 2^{p+1}·miss(η) − miss(2η): which samples the demo drew, and with
    them c_{p+1}, depends on the machine's rounding. Every lower power would stay in it and pull the slope down.
    """
    direct, _ = truths(along)
    rows = [along._change(i, x) for i, x in enumerate(along.etas)]
    slopes = []
    for name, power in (("linear", 2), ("quadratic", 3)):
        miss = (direct - [row[name].value for row in rows])[: len(DOUBLING)]
        leading = np.abs(2 ** (power + 1) * miss[:-1] - miss[1:])
        slopes.append(np.polyfit(np.log(DOUBLING[:-1]), np.log(leading), 1)[0])
    return slopes


def test_integrated_equals_direct(along):
    assert disagreement(along) < 1e-6


def test_predictions_miss_by_the_second_and_third_power(along):
    second, third = exponents(along)
    assert second == pytest.approx(2, abs=0.1)
    assert third == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("name", ["d_entropy", "d_logprob"])
@pytest.mark.parametrize("at", ["nodes", "zero"])
def test_a_scaled_first_derivative_is_seen(along, at, name):
    assert disagreement(rebuilt(along)) < 1e-6  # rebuilding alone changes nothing
    assert disagreement(rebuilt(along, scale_at=at, name=name)) > 1e-5


@pytest.mark.parametrize("name", ["d_entropy", "d_logprob"])
def test_a_scaled_first_derivative_spoils_the_linear_prediction(along, name):
    assert abs(exponents(rebuilt(along, scale_at="zero", name=name))[0] - 2) > 0.1


@pytest.mark.parametrize("name", ["d2_entropy", "d2_logprob"])
def test_a_scaled_second_derivative_spoils_the_quadratic_prediction(along, name):
    assert abs(exponents(rebuilt(along, curvature=name))[1] - 3) > 0.1


def test_error_estimate_bounds_the_error(along):
    direct, integrated = truths(along)
    assert (np.abs(integrated - direct) <= np.array(along.errors) + 1e-9 * np.abs(direct)).all()


def test_repeat_at_zero_differs_by_exactly_nothing(along):
    sums = stats.change_sums(
        along.direct[0.0], along.direct[0.0], along.mask, along.prompt, per="token", estimator="per_decision"
    )
    assert stats.direct_change(sums).value == 0.0
    values = along.base.values
    assert np.abs(np.asarray(along.direct[0.0].entropy) - values.entropy).max() < 1e-12
