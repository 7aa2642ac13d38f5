r"""Shares and marginals of the tokens of an update (docs/theory.md, section 10).

The loss gradient is a sum over tokens, g_raw = Σ_ik (g_ik ∇S_ik + q_ik ∇H_ik); for a policy gradient g = −ωA and q = 0. With
X = ∇ĥ on held-out samples E (or ∇J), and v the optimizer's direction,

    share     c_ik = −η (κ P X)·(g_ik ∇S_ik + q_ik ∇H_ik)    v̂ and clip frozen:    Σ c + η X·v_momentum + η X·v_decay = η X·v = δH₁
    marginal  the same with y = (1 − a aᵀ) clip Q₀ X for κ P X:  what changes with the token's weight, v̂ and clip moving too

Each is one forward-mode pass over U along one direction: no gradient per sample. X is a sum over the prompts of E, X = X_a + X_b with
every other prompt in X_a; so shares come in two halves from different prompts, at the price of one more pass, and tell their noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import stats
from ..derivatives import Parts, Progress, TokenStats, token_gradient, token_tangents
from ..policy import Parameters, Policy, TokenBatch
from ..updates import UpdateDirection


class TokenWeights(NamedTuple):
    """Weights [N, T] of ∇S_ik and ∇H_ik in the gradient of the loss; None for zero."""

    logprob: Tensor | None  # g
    entropy: Tensor | None = None  # q


def total_weights(parts: Mapping[str, TokenWeights]) -> TokenWeights:
    """The weights of a loss from those of its parts."""

    def total(given: list[Tensor | None]) -> Tensor | None:
        known = [x for x in given if x is not None]
        return torch.stack(known).sum(dim=0) if known else None

    return TokenWeights(
        total([w.logprob for w in parts.values()]), total([w.entropy for w in parts.values()])
    )


def entropy_weights(
    values: TokenStats,
    batch: TokenBatch,
    *,
    per: stats.Per,
    estimator: stats.EstimatorKind,
    baseline: np.ndarray | None = None,
) -> TokenWeights:
    """Weights with which ∇S and ∇H of E's tokens add up to X = ∇ĥ, as `entropy_gradient` has it.

    Args:
        values: H and S of E at the policy that drew it.
        batch: E.
        per: "token" or "sequence".
        estimator: "per_decision", "whole_sequence" or "path".
        baseline: b [N, T] of the estimator, as `stats.baseline` makes it; None for 0.
    """
    q, g = stats.token_cotangents(
        stats.TokenValues(values.entropy.double().numpy(), values.logprob.double().numpy()),
        batch.response_mask.numpy(),
        per=per,
        estimator=estimator,
        baseline=baseline,
    )
    return TokenWeights(_tensor(g), _tensor(q))


def reward_weights(reward: np.ndarray, batch: TokenBatch) -> TokenWeights:
    """Weights with which ∇S of E's tokens add up to X = ∇J = (1/n) Σ_i (r_i − b_i) ∇S_i, b that of `stats.centred_rewards`.

    Args:
        reward: r [N] of E's responses.
        batch: E.
    """
    g = stats.reward_cotangents(reward, batch.prompt_index.numpy(), batch.response_mask.numpy())
    return TokenWeights(_tensor(g))


def half_gradient(
    policy: Policy,
    batch: TokenBatch,
    weights: TokenWeights,
    half: int,
    *,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> Parameters:
    """X_a (half 0) or X_b (half 1): Σ g∇S + q∇H over every other prompt of E; X_a + X_b = X.

    Args:
        policy: the model and its parameters.
        batch: E.
        weights: from `entropy_weights` or `reward_weights`.
        half: 0 or 1.
        progress: called with the number of sequences finished.
        parts: the sum so far, see `token_gradient`.
    """
    prompt = torch.unique(batch.prompt_index, return_inverse=True)[1]
    rows = prompt % 2 == half
    own = TokenBatch(*(x[rows] for x in (batch.input_ids, batch.attention_mask, batch.response_mask, prompt)))
    g, q = (None if w is None else w[rows] for w in weights)
    return token_gradient(policy, own, entropy_weight=q, logprob_weight=g, progress=progress, parts=parts)


def share_direction(update: UpdateDirection, X: Parameters) -> Parameters:
    """κ P X: a token of U with weight g has the share −η g (κ P X)·∇S."""
    return {name: update.gain[name] * update.preconditioner[name] * x for name, x in X.items()}


def marginal_direction(update: UpdateDirection, X: Parameters) -> Parameters:
    """y = z − a (a·z), z = clip Q₀ X: how X·v answers to the loss gradient, v̂ and an active clip included.

    Args:
        update: made with ``marginal=True``.
        X: by parameter name.
    """
    z = {name: update.marginal[name] * x for name, x in X.items()}
    if not update.clip_axis:
        return z
    along = inner(update.clip_axis, z)
    return {name: x - along * update.clip_axis[name] for name, x in z.items()}


def part_values(update: UpdateDirection, X: Parameters) -> dict[str, float]:
    """X·v_part for each part of the direction, by the part's name; per unit η."""
    return {name: inner(part, X) for name, part in update.parts.items()}


def token_influence(
    policy: Policy,
    batch: TokenBatch,
    direction: Parameters,
    weights: Mapping[str, TokenWeights],
    *,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> dict[str, np.ndarray]:
    """−(g_ik y·∇S_ik + q_ik y·∇H_ik) of every token of U, for each part of the loss: one forward-mode pass along y.

    Args:
        policy: the model and its parameters.
        batch: U, [N, T].
        direction: y, from `share_direction` or `marginal_direction`.
        weights: name of the loss's part -> its token weights.
        progress: called with the number of sequences finished.
        parts: micro-batches that are finished already, see `token_tangents`.

    Returns:
        name -> float64 [N, T], per unit η; 0 outside the response.
    """
    tangents = token_tangents(policy, batch, direction, progress=progress, parts=parts)
    found = {}
    for name, (g, q) in weights.items():
        value = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
        if g is not None:
            value -= g.double() * tangents.d_logprob.double()
        if q is not None:
            value -= q.double() * tangents.d_entropy.double()
        found[name] = value.numpy()
    return found


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Σ a·b over all parameters, added up in float64."""
    return sum(float(torch.dot(a[name].double().flatten(), x.double().flatten())) for name, x in b.items())


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))
