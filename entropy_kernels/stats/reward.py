r"""The expected reward J = E[r] on held-out samples, as the entropy is treated (docs/theory.md, sections 5, 6 and 10).

    J(η) − J(0) = (1/n) Σ_i (w_i − 1)(r_i − b_i),   w_i = exp(S_i(η) − S_i(0)),   J' = (1/n) Σ_i w_i S'_i (r_i − b_i)

b_i is a mean of rewards without response i, so that it is independent of S'_i and costs no bias: of the other responses to its
prompt, or, where there is only one response to a prompt, of all other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .estimate import Estimate
from .linear import linear_change
from .samples import (
    FloatArray,
    PromptSums,
    TokenTangents,
    TokenValues,
    by_prompt,
    check_mask,
    check_prompts,
    log_ratio,
    on_mask,
)
from .truth import integrated_change


def centred_rewards(reward: ArrayLike, prompt_index: ArrayLike) -> FloatArray:
    """r_i − b_i, [N]: b_i the mean over the other responses to the prompt, across prompts if there are none.

    Args:
        reward: [N].
        prompt_index: integers [N], equal for responses to the same prompt.

    Raises:
        UserError: lengths that differ, or fewer than two responses.
    """
    r = np.asarray(reward, dtype=np.float64)
    _, group, size = np.unique(np.asarray(prompt_index), return_inverse=True, return_counts=True)
    if r.shape != group.shape or len(r) < 2:
        raise UserError(
            f"reward has shape {r.shape}, prompt_index {group.shape}; expected two arrays [N], N ≥ 2."
        )
    own = size[group]
    others = np.where(own > 1, np.bincount(group, r)[group], r.sum()) - r
    return r - others / np.where(own > 1, own - 1, len(r) - 1)


def reward_cotangents(reward: ArrayLike, prompt_index: ArrayLike, mask: ArrayLike) -> FloatArray:
    """g = (r_i − b_i)/n at every response token, [N, T]: ∇J = Σ g ∇S.

    Args:
        reward: [N].
        prompt_index: integers [N].
        mask: bool [N, T], True on response tokens.

    Raises:
        UserError: as centred_rewards, or a mask that does not fit.
    """
    mask = check_mask(mask)
    return np.where(mask, centred_rewards(reward, prompt_index)[:, None] / len(mask), 0.0)


def reward_sums(
    base: TokenValues,
    moved: TokenValues,
    tangents: TokenTangents,
    reward: ArrayLike,
    mask: ArrayLike,
    prompt_index: ArrayLike,
) -> PromptSums:
    """Per-prompt Σ w_i (r_i − b_i), its derivative, and the number of responses; ratio and errors as for entropy per sequence.

    Args:
        base: H and S at the policy that drew the samples, [N, T]; only S is read.
        moved: the same at the moved policy; base again for η = 0.
        tangents: H', S' there, [N, T]; only S' is read.
        reward: [N].
        mask: bool [N, T], True on response tokens.
        prompt_index: integers [N].

    Returns:
        PromptSums of kind (sequence, whole_sequence), float64 [B], in the unit of the reward.

    Raises:
        UserError: as centred_rewards, or arrays that do not fit.
    """
    mask = check_mask(mask)
    inverse, B = check_prompts(prompt_index, mask)
    a = centred_rewards(reward, prompt_index)
    with np.errstate(over="ignore", invalid="ignore"):  # a ratio that overflows ends as inf or NaN
        w = np.exp(np.where(mask, log_ratio(base, moved, mask), 0.0).sum(axis=1))
        score = on_mask(tangents.d_logprob, mask, "tangents.d_logprob").sum(axis=1)
        return PromptSums(
            numerator=by_prompt(w * a, inverse, B),
            denominator=by_prompt(np.ones(len(a)), inverse, B),
            per="sequence",
            estimator="whole_sequence",
            d_numerator=by_prompt(w * score * a, inverse, B),
            d_denominator=np.zeros(B),
        )


def linear_reward(sums: PromptSums, eta: float) -> Estimate:
    """δJ₁ = η J', in the unit of the reward, influence-function error over prompts.

    Args:
        sums: reward_sums at η = 0.
        eta: the learning rate.

    Raises:
        UserError: fewer than two prompts.
    """
    return _as_reward(linear_change(sums, eta))


def integrated_reward(node_sums: Sequence[PromptSums], weights: ArrayLike) -> Estimate:
    """ΔJ = ∫ J' along the path, in the unit of the reward.

    Args:
        node_sums: reward_sums at the nodes.
        weights: [J], one row of quadrature.integral_weights.

    Raises:
        UserError: as integrated_change.
    """
    return _as_reward(integrated_change(node_sums, weights))


def _as_reward(found: Estimate) -> Estimate:
    return replace(found, unit="reward", method=f"expected reward, {found.method}")
