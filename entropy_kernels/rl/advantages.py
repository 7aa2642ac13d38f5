r"""Rewards into advantages, and masks into the weight of every token in the loss.

The objective is J = Σ_ik ω_ik A_i S_ik (S: log-prob of token k of response i), the loss −J.
Source: docs/theory.md, section 8. N responses, T padded width, G responses in a group (one prompt).
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_kernels.errors import UserError

ADVANTAGES = ("grpo", "grpo_nostd", "rloo")
LOSSES = ("grpo", "dapo", "dr_grpo_longest", "dr_grpo_constant")

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL's GRPOTrainer does."""


def advantages(rewards: Tensor, group_index: Tensor, *, kind: str) -> Tensor:
    r"""A_i of response i, from the rewards r of its group.

    * ``grpo``        (r_i − r̄) / (s + 1e-4), s the group's standard deviation with G − 1 in the denominator
    * ``grpo_nostd``  r_i − r̄
    * ``rloo``        r_i − mean of the *other* rewards of the group  =  G/(G−1) (r_i − r̄)

    The first is what TRL's ``GRPOTrainer`` computes with ``scale_rewards="group"`` (its ``nanstd`` applies
    Bessel's correction), the second with ``scale_rewards="none"``. A group whose rewards are all equal gets
    exactly 0; :func:`degenerate_groups` counts those.

    Args:
        rewards: [N], finite, any floating dtype.
        group_index: [N] integers, equal for responses to the same prompt, in any order.
        kind: "grpo", "grpo_nostd" or "rloo".

    Returns:
        [N] in the dtype of ``rewards`` (float32 for narrower ones), worked out in float64.

    Raises:
        UserError: unknown kind, shapes that differ, rewards that are not finite, a group of one.
    """
    if kind not in ADVANTAGES:
        raise UserError(f"kind={kind!r} is not a known advantage; choose one of {', '.join(ADVANTAGES)}.")
    group, size = _groups(rewards, group_index)
    if bool((size < 2).any()):
        raise UserError(
            f"{int((size < 2).sum())} of {size.numel()} groups hold a single response: an advantage compares "
            "responses to the same prompt, so it is undefined there. Sample at least two per prompt "
            "(group_size ≥ 2)."
        )
    r = rewards.detach().to(torch.float64)
    # Measured from one member of the group: equal rewards then give exactly 0, whatever their value.
    r = r - _pick_one(r, group, size.numel())[group]
    mean = _sums(r, group, size.numel()) / size
    centred = r - mean[group]
    if kind == "grpo":
        std = (_sums(centred.square(), group, size.numel()) / (size - 1)).sqrt()
        result = centred / (std[group] + STD_FLOOR)
    elif kind == "rloo":
        result = centred * (size / (size - 1))[group]
    else:
        result = centred
    return result.to(torch.promote_types(rewards.dtype, torch.float32))


def degenerate_groups(rewards: Tensor, group_index: Tensor) -> tuple[int, int]:
    """(groups whose rewards are all equal, groups): the former have zero advantage and teach nothing.

    Raises:
        UserError: shapes that differ, rewards that are not finite.
    """
    group, size = _groups(rewards, group_index)
    r = rewards.detach().to(torch.float64)
    differs = (r != _pick_one(r, group, size.numel())[group]).to(torch.float64)
    return int((_sums(differs, group, size.numel()) == 0).sum()), size.numel()


def loss_weights(
    response_mask: Tensor, group_index: Tensor, *, kind: str, max_new_tokens: int | None = None
) -> Tensor:
    r"""ω_ik, the weight of token k of response i in J = Σ ω A S.

    * ``grpo``              1 / (N T_i): the mean over responses of the mean over their tokens
    * ``dapo``              1 / Σ_j T_j: the mean over all tokens
    * ``dr_grpo_longest``   1 / (N L), L the longest response of the group
    * ``dr_grpo_constant``  1 / (N max_new_tokens): the published form, TRL's ``loss_type="dr_grpo"``

    N counts the responses given here, so pass one optimizer step's whole batch.

    Args:
        response_mask: [N, T], true at response tokens.
        group_index: [N] integers; used by ``dr_grpo_longest``.
        kind: one of the four names.
        max_new_tokens: the constant of ``dr_grpo_constant``.

    Returns:
        [N, T] float64, zero outside the response.

    Raises:
        UserError: unknown kind, wrong shapes, an empty response, ``max_new_tokens`` missing or shorter than a
            response.
    """
    if kind not in LOSSES:
        raise UserError(f"kind={kind!r} is not a known loss; choose one of {', '.join(LOSSES)}.")
    if response_mask.ndim != 2 or response_mask.shape[0] != group_index.numel() or group_index.ndim != 1:
        raise UserError(
            f"response_mask has shape {tuple(response_mask.shape)}, group_index {tuple(group_index.shape)}; "
            "expected [N, T] and [N]."
        )
    mask = response_mask.to(torch.bool).to(torch.float64)
    length = mask.sum(dim=1)
    N = length.numel()
    if N == 0 or bool((length == 0).any()):
        raise UserError(
            "response_mask: every response needs at least one token, and there must be a response; "
            f"{int((length == 0).sum())} of {N} are empty. Drop them from the rollouts."
        )
    if kind == "grpo":
        omega = 1.0 / (N * length)
    elif kind == "dapo":
        omega = (1.0 / length.sum()).expand(N)
    elif kind == "dr_grpo_longest":
        labels, group = torch.unique(group_index, return_inverse=True)
        group = group.to(length.device)
        longest = torch.zeros(labels.numel(), dtype=torch.float64, device=length.device)
        omega = 1.0 / (N * longest.scatter_reduce(0, group, length, "amax")[group])
    else:
        if max_new_tokens is None or max_new_tokens < int(length.max()):
            raise UserError(
                f"max_new_tokens={max_new_tokens!r}: dr_grpo_constant divides by the length limit of the "
                f"sampling, which is at least the longest response here, {int(length.max())}."
            )
        omega = torch.full_like(length, 1.0 / (N * max_new_tokens))
    return omega[:, None] * mask


def _groups(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(dense group number [N], responses per group [B]), after the checks."""
    if rewards.ndim != 1 or rewards.shape != group_index.shape or rewards.numel() == 0:
        raise UserError(
            f"rewards has shape {tuple(rewards.shape)}, group_index {tuple(group_index.shape)}; expected "
            "both [N], N ≥ 1."
        )
    if not bool(torch.isfinite(rewards).all()):
        raise UserError("rewards hold NaN or infinite entries; every response needs a finite reward.")
    _, group, size = torch.unique(group_index.to(rewards.device), return_inverse=True, return_counts=True)
    return group, size


def _sums(x: Tensor, group: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=x.dtype, device=x.device).index_add(0, group, x)


def _pick_one(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """One member's value per group [B]: the largest, so that it does not depend on the order."""
    lowest = torch.full((groups,), -torch.inf, dtype=x.dtype, device=x.device)
    return lowest.scatter_reduce(0, group, x, "amax")
