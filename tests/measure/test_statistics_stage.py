"""The statistics stage on the demo: one baseline in every truth, prediction and gradient, and what the report says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_along import DOUBLING, demo

from entropy_kernels import stats
from entropy_kernels.derivatives import entropy_gradient, hvp
from entropy_kernels.errors import UserError
from entropy_kernels.measure.along import Along
from entropy_kernels.measure.attribute import entropy_change
from entropy_kernels.measure.direction import get_update, load_state, token_weights
from entropy_kernels.measure.features import hidden_features
from entropy_kernels.measure.samples import batch_of, get_rollouts
from entropy_kernels.measure.shares import Batches, influences
from entropy_kernels.measure.statistics import one_batch
from entropy_kernels.measure.steps import load_policy
from entropy_kernels.measure.store import NOWHERE

ETAS = (*DOUBLING, 1e-5)


@pytest.fixture(scope="module")
def run():
    config = demo(baseline="critic")
    policy = load_policy(config)
    state, info = load_state(config, policy)
    U, E = get_rollouts(config, policy, None, False)
    update = get_update(config, policy, state, U, batch_of(U), info.stored_lr, False, marginal=True)
    data = Batches(U, batch_of(U), token_weights(config, U, batch_of(U)), E, batch_of(E))
    found = influences(config, policy, update, data, 1e-5, False, NOWHERE)
    direction = update.direction
    return config, policy, direction, E, found, Along(config, policy, direction, batch_of(E), ETAS, False)


def dot(x, y):
    return sum(float((x[name] * y[name]).sum()) for name in x)


def test_truths_and_predictions_share_the_critic(run):
    along = run[-1]
    assert np.abs(along.baseline[along.mask]).max() > 0.1
    plain = stats.first_derivative(along.base_sums._replace()).value
    without = stats.prompt_sums(
        along.base.values, along.base.values, along.mask, along.prompt, per="token", estimator="per_decision",
        tangents=along.base.tangents,
    )  # fmt: skip
    assert abs(plain / stats.first_derivative(without).value - 1) > 1e-3
    rows = [along._change(i, eta) for i, eta in enumerate(ETAS)]
    direct = np.array([row["true_direct"].value for row in rows])
    integrated = np.array([row["true_integrated"].value for row in rows])
    np.testing.assert_allclose(direct[1:], integrated[1:], rtol=1e-6)
    missed = integrated - [row["linear"].value for row in rows]
    cubic = integrated - [row["quadratic"].value for row in rows]
    n = len(DOUBLING)
    np.testing.assert_allclose(np.diff(np.log2(np.abs(missed[:n]))), 2, atol=0.05)
    np.testing.assert_allclose(np.diff(np.log2(np.abs(cubic[:n]))), 3, atol=0.1)


def test_gradient_and_hvp_share_the_critic(run):
    _, policy, direction, E, _, along = run
    b = torch.as_tensor(along.baseline)
    v = {name: x / 1e3 for name, x in direction.items()}
    first = stats.first_derivative(along.base_sums).value
    assert dot(entropy_gradient(policy, batch_of(E), baseline=b), direction) == pytest.approx(first, rel=1e-9)
    assert dot(entropy_gradient(policy, batch_of(E)), direction) != pytest.approx(first, rel=1e-3)
    second = stats.second_derivative(along.base_sums).value
    assert 1e6 * dot(hvp(policy, batch_of(E), v, baseline=b), v) == pytest.approx(second, rel=1e-8)


def test_shares_add_up_with_the_critic(run):
    found, along = run[-2]["entropy"], run[-1]
    total = found.total("shares").total.sum() + sum(sum(x) for x in found.parts.values())
    assert total == pytest.approx(stats.linear_change(along.base_sums, 1e-5).value, rel=1e-9)
    assert entropy_change(along, 1e-5).value == pytest.approx(total, rel=1e-9)


def test_features_come_from_before_the_token(run):
    """Another last token leaves every feature as it is; another first token changes those behind it, not its own."""
    _, policy, _, E, _, _ = run
    batch = batch_of(E)
    x = hidden_features(policy, batch, width=None)
    assert not x[~batch.response_mask].any() and x[batch.response_mask].any(dim=-1).all()
    ids = batch.input_ids.clone()
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.where(batch.response_mask, columns, 10**6).amin(1)
    last = torch.where(batch.response_mask, columns, -1).amax(1)
    rows = torch.arange(len(ids))
    ids[rows, last] = (ids[rows, last] + 1) % 10
    assert torch.allclose(hidden_features(policy, batch._replace(input_ids=ids), width=None), x)
    ids[rows, first] = (ids[rows, first] + 1) % 10
    moved = hidden_features(policy, batch._replace(input_ids=ids), width=None)
    assert torch.allclose(moved[rows, first], x[rows, first])
    long = last > first
    assert long.any() and not torch.allclose(moved[rows, last][long], x[rows, last][long])
    narrow = hidden_features(policy, batch, width=8)
    assert narrow.shape[-1] == 8 and torch.equal(narrow, hidden_features(policy, batch, width=8))


def test_the_report_has_every_section(run):
    _, _, _, E, _, along = run
    report = along.report(E, 2e-5)
    rows, found = report["lag_profile"], report["statistics"]
    assert [row["first"] for row in rows] == list(range(len(rows)))
    assert rows[0]["part"].value + sum(row["part"].value for row in rows[1:]) == pytest.approx(
        found["unbiased"].value
    )
    assert set(found["baselines"]) == {"position", "ema", "regression", "least_error", "group", "critic"}
    assert found["baselines"]["critic"]["first"] == report["derivatives"]["first"]
    assert found["rao_blackwell"]["rao_blackwell"].value == pytest.approx(
        report["entropy"]["per_token"].value
    )
    sizes = [row["prompts"] for row in found["tails"]["against_prompts"]]
    assert sizes == [24, 12]
    shares = along.token_columns()["contribution"].sum()
    assert float(shares) == pytest.approx(report["derivatives"]["first"].value, rel=1e-10)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_one_batch_is_the_gradients_part_of_the_slope(per):
    """With one prompt's worth of noise taken away, −κU is (∇h)·v_gradient: 200 prompts that are all alike in expectation.

    Responses are drawn from a softmax over three answers of lengths 1, 2 and 3, where everything can be written down.
    """
    rng = np.random.default_rng(3)
    logits, length, reward, P = (
        np.array([0.3, -0.2, 0.1]),
        np.array([1.0, 2, 3]),
        np.array([0.0, 1, 3]),
        np.array([1, 2, 0.5]),
    )
    p = np.exp(logits) / np.exp(logits).sum()
    S = np.log(p)
    score = np.eye(3) - p  # ∇S of each answer
    prompts, group, gain = 4000, 2, 0.7
    y = rng.choice(3, p=p, size=(prompts, group))
    A = reward[y] - reward[y][:, ::-1]
    pull = (A / (prompts * group)).ravel()
    index, y = np.repeat(np.arange(prompts), group), y.ravel()
    keep = 600  # K may hold fewer prompts than the update
    some = index < keep
    K = (score[y[some]] * P) @ score[y[some]].T
    h, T = (-p @ S) / (p @ length), p @ length
    slope = -score.T @ (p * S)  # of the entropy per sequence
    if per == "token":
        slope = (slope - h * (score.T @ (p * length))) / T
    exact = slope @ (gain * P * (score.T @ (p * reward)))
    found = one_batch(
        K,
        pull[some],
        S[y[some]],
        length[y[some]],
        index[some],
        prompts_in_update=prompts,
        gain=gain,
        per=per,
        entropy=h,
    )
    assert abs(found["first"].z_score(exact)) < 3
    assert found["first"].stderr < abs(exact) / 3  # so that sign and factor show
    assert found["bootstrap_stderr"] == pytest.approx(found["first"].stderr, rel=0.2)
    assert found["hoeffding_variance"] == pytest.approx(found["first"].stderr ** 2, rel=0.2)


def test_group_needs_companions():
    with pytest.raises(UserError, match="group_size_e"):
        demo(baseline="group", group_size_e=1)
