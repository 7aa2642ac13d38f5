r"""The terms of a loss beyond −Σ ω A S, each as the weight with which every token's ∇S or ∇H enters the gradient.

Written as a function of the log-probs S_ik of the policy that is stepped from, with ω_ik the token weights of `loss_weights`:

    ratio     ℓ = −Σ ω min(r A, clip(r, 1 − a, 1 + b) A)       r_ik = e^{S_ik − S_ik(old)}, or one r_i for a response
    KL        β Σ ω r (e^x − x − 1),  x = S(reference) − S      an estimate of KL(π ‖ reference), never negative ("k3")
    bonus     −c Σ H / Σ T

Source: docs/theory.md, section 8; TRL's GRPOTrainer has the same terms. N responses, T padded width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.errors import UserError

LEVELS = ("token", "sequence")


class RatioWeights(NamedTuple):
    """∂ℓ/∂S, the ratio r and where it is clipped (0 or 1), each [N, T] float64, 0 outside the responses."""

    logprob: Tensor
    ratio: Tensor
    clipped: Tensor


def ratio_weights(
    omega: Tensor,
    advantage: Tensor,
    log_ratio: Tensor,
    response_mask: Tensor,
    *,
    level: str,
    clip_low: float,
    clip_high: float,
) -> RatioWeights:
    r"""∂ℓ/∂S of the clipped surrogate: 0 where the minimum is the clipped side, which S does not move.

        token      ∂ℓ/∂S_ik = −ω_ik A_i r_ik               r_ik = e^{S_ik − S_ik(old)}
        sequence   ∂ℓ/∂S_ij = −A_i r_i (Σ_k ω_ik)/T_i      r_i  = exp((1/T_i) Σ_k [S_ik − S_ik(old)])

    Clipped is r > 1 + b where A > 0, and r < 1 − a where A < 0. A response-level ratio is the geometric mean of its tokens' (GSPO);
    every token moves it by 1/T_i.

    Args:
        omega: ω [N, T].
        advantage: A [N].
        log_ratio: S − S(old) [N, T], of the policy stepped from and of the one that drew the samples.
        response_mask: [N, T].
        level: "token" or "sequence".
        clip_low: a ≥ 0.
        clip_high: b ≥ 0.

    Raises:
        UserError: an unknown level.
    """
    if level not in LEVELS:
        raise UserError(
            f"level={level!r} is not a known level of the ratio; choose one of {', '.join(LEVELS)}."
        )
    mask = response_mask.to(torch.float64)
    x = torch.where(response_mask.bool(), log_ratio.to(torch.float64), 0.0)
    weight = omega.to(torch.float64)
    if level == "sequence":
        length = mask.sum(dim=1, keepdim=True)
        x = x.sum(dim=1, keepdim=True) / length * mask
        weight = weight.sum(dim=1, keepdim=True) / length * mask
    A = advantage.to(torch.float64).unsqueeze(1)
    r = x.exp() * mask
    clipped = (((A > 0) & (r > 1 + clip_high)) | ((A < 0) & (r < 1 - clip_low))).to(torch.float64) * mask
    return RatioWeights(-weight * A * r * (1 - clipped), r, clipped)


def kl_estimate(logprob: Tensor, reference: Tensor) -> Tensor:
    """e^x − x − 1 with x = S(reference) − S, of every token: its mean under π is KL(π ‖ reference), nats."""
    x = reference.to(torch.float64) - logprob.to(torch.float64)
    return torch.expm1(x) - x


def kl_weights(
    omega: Tensor,
    logprob: Tensor,
    reference: Tensor,
    response_mask: Tensor,
    *,
    coefficient: float,
    ratio: Tensor | None = None,
    level: str = "token",
) -> Tensor:
    r"""∂/∂S of β Σ ω k with k = e^x − x − 1; or of β Σ ω r k, with a ratio r that is differentiated too (TRL's default).

        without r          β ω (1 − e^x)
        r_ik of a token    β ω r (k + 1 − e^x) = β ω r (S − S(reference))         the gradient of KL(π ‖ reference) in the mean
        r_i of a response  β [ω_ij r_i (1 − e^{x_ij}) + (r_i/T_i) Σ_k ω_ik k_ik]

    A ratio of 1 matters: its derivative is not 0. Without it the mean is not the gradient of the divergence, only of the estimate on
    fixed samples.

    Args:
        omega: ω [N, T].
        logprob: S of the policy stepped from, [N, T].
        reference: S of the reference model, [N, T].
        response_mask: [N, T].
        coefficient: β.
        ratio: r [N, T], as of `ratio_weights`, or None for a term without it.
        level: "token" or "sequence", of the ratio.

    Returns:
        [N, T] float64, 0 outside the responses.
    """
    mask = response_mask.to(torch.float64)
    weight = omega.to(torch.float64) * mask
    x = (reference.to(torch.float64) - logprob.to(torch.float64)) * mask
    plain = -weight * torch.expm1(x)
    if ratio is None:
        return coefficient * plain
    if level == "token":
        return -coefficient * weight * ratio * x
    k = (weight * (torch.expm1(x) - x)).sum(dim=1, keepdim=True)
    return coefficient * ratio * (plain + k / mask.sum(dim=1, keepdim=True) * mask)


def entropy_bonus_weights(response_mask: Tensor, coefficient: float) -> Tensor:
    """∂/∂H of −c Σ H / Σ T: −c/ΣT on every response token, [N, T] float64; the same whatever the loss's own ω."""
    mask = response_mask.to(torch.float64)
    return -coefficient * mask / mask.sum()
