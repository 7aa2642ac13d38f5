"""Weights of the terms of a loss against automatic differentiation of the loss itself, and against its formulas at single tokens."""

from __future__ import annotations

import pytest
import torch

from entropy_kernels.errors import UserError
from entropy_kernels.rl.advantages import loss_weights
from entropy_kernels.rl.losses import entropy_bonus_weights, kl_estimate, kl_weights, ratio_weights

LENGTHS = [5, 1, 4, 3, 2, 5]


@pytest.fixture
def batch():
    """Random log-probs of three policies near each other, advantages of both signs, ragged responses."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    S, old, reference = (-3 * torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    A = torch.tensor([1.5, -0.5, 0.7, -1.2, 0.0, -0.3], dtype=torch.float64)
    omega = loss_weights(mask, torch.tensor([0, 0, 0, 1, 1, 1]), kind="grpo")
    return mask, S, S + 0.5 * (old + 1.5), reference, A, omega


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3), (0.0, 0.05)])
def test_ratio_weights_are_the_gradient_of_the_clipped_surrogate(batch, level, low, high):
    mask, S, old, _, A, omega = batch
    x = S.clone().requires_grad_()
    log_ratio = torch.where(mask, x - old, 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1)).unsqueeze(1).expand_as(log_ratio)
    r, a = log_ratio.exp(), A.unsqueeze(1)
    loss = -(omega * torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)).sum()
    want = torch.autograd.grad(loss, x)[0]
    poisoned = torch.where(mask, S - old, torch.nan)
    got = ratio_weights(omega, A, poisoned, mask, level=level, clip_low=low, clip_high=high)
    torch.testing.assert_close(got.logprob, want)
    assert 0 < got.clipped[mask].mean() < 1 and not got.clipped[~mask].any()
    torch.testing.assert_close(got.ratio[mask], r[mask].detach())


def test_a_ratio_of_one_is_the_plain_policy_gradient(batch):
    mask, S, _, _, A, omega = batch
    for level in ("token", "sequence"):
        got = ratio_weights(omega, A, torch.zeros_like(S), mask, level=level, clip_low=0.0, clip_high=0.0)
        torch.testing.assert_close(got.logprob, -omega * A.unsqueeze(1))


@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_kl_weights_are_the_gradient_of_the_estimate(batch, level):
    mask, S, old, reference, A, omega = batch
    x = S.clone().requires_grad_()
    d, log_ratio = reference - x, torch.where(mask, x - old, 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1)).unsqueeze(1).expand_as(log_ratio)
    r = torch.ones_like(x) if level is None else log_ratio.exp()
    want = torch.autograd.grad(0.3 * (omega * r * (d.exp() - d - 1)).sum(), x)[0]
    options = {}
    if level is not None:
        kind = dict(level=level, clip_low=0.0, clip_high=0.0)  # the KL term is never clipped
        options = dict(ratio=ratio_weights(omega, A, S - old, mask, **kind).ratio, level=level)
    got = kl_weights(omega, S, reference, mask, coefficient=0.3, **options)
    torch.testing.assert_close(got, want)


def test_kl_with_the_ratio_has_the_gradient_of_the_divergence():
    """Exactly, on one row: Σ p·weight·∇S is the gradient of KL(p ‖ q); without the ratio it is another's."""
    z, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.3, -1.0, 0.8], [0.5, 0.2, 0.3]))

    def divergence(z):
        logp = z.log_softmax(-1)
        return (logp.exp() * (logp - q.log())).sum()

    want, p = torch.func.grad(divergence)(z), z.softmax(-1)
    assert (p * kl_estimate(p.log(), q.log())).sum().item() == pytest.approx(divergence(z).item(), rel=1e-12)
    scores = torch.eye(3, dtype=torch.float64) - p  # ∇S of each token
    one = torch.ones(3, 1, dtype=torch.float64)
    for ratio, right in ((one, True), (None, False)):
        weight = kl_weights(
            one, p.log().unsqueeze(1), q.log().unsqueeze(1), one, coefficient=1.0, ratio=ratio
        )
        got = (p.unsqueeze(1) * weight * scores).sum(0)
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12) == right


def test_entropy_bonus_is_a_mean_over_tokens(batch):
    mask = batch[0]
    got = entropy_bonus_weights(mask, 0.02)
    assert got.sum().item() == pytest.approx(-0.02) and not got[~mask].any()
    assert got[mask].unique().numel() == 1


def test_an_unknown_level_is_refused(batch):
    mask, S, _, _, A, omega = batch
    with pytest.raises(UserError, match="token, sequence"):
        ratio_weights(omega, A, S, mask, level="word", clip_low=0.2, clip_high=0.2)
