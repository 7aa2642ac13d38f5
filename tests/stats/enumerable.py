"""A policy small enough to write down every response with its probability: the exact answer to everything.

Three prompts, three tokens (0 ends a response), four tokens at most: 31 responses per prompt, 93 in all. The logits are
a tanh net of a one-hot context, so the curve along a direction bends, and all in float64.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from entropy_kernels.stats import TokenCurvature, TokenTangents, TokenValues

PROMPTS, V, T, END = 3, 3, 4, 0
HIDDEN = 6
FEATURES = PROMPTS + 2 * (V + 1) + 1
COMBOS = list(itertools.product(("token", "sequence"), ("per_decision", "whole_sequence", "path")))


class World(NamedTuple):
    """All responses to all prompts, M rows, with theta and the direction v."""

    tokens: Tensor  # [M, T]
    mask: np.ndarray  # [M, T]
    prompt: np.ndarray  # [M]
    features: Tensor  # [M, T, F]
    theta: Tensor
    v: Tensor


@lru_cache(maxsize=1)
def world() -> World:
    responses = []
    for length in range(1, T + 1):
        for head in itertools.product(range(1, V), repeat=length - 1):
            # A response of full length is cut: its last token may be anything.
            responses += [(*head, last) for last in (range(V) if length == T else [END])]
    rows = [(p, r) for p in range(PROMPTS) for r in responses]
    M = len(rows)
    tokens, mask = torch.zeros(M, T, dtype=torch.long), np.zeros((M, T), dtype=bool)
    features = torch.zeros(M, T, FEATURES, dtype=torch.float64)
    for m, (p, r) in enumerate(rows):
        mask[m, : len(r)] = True
        for k in range(T):
            before = [V, V, *r[:k]]  # V marks what was before the response
            features[m, k, p] = 1
            features[m, k, PROMPTS + before[-1]] = 1
            features[m, k, PROMPTS + V + 1 + before[-2]] = 1
            features[m, k, -1] = k / T
        tokens[m, : len(r)] = torch.tensor(r)
    g = torch.Generator().manual_seed(2)
    size = HIDDEN * FEATURES + V * HIDDEN
    theta, v = (scale * torch.randn(size, generator=g, dtype=torch.float64) for scale in (0.6, 0.5))
    return World(tokens, mask, np.array([p for p, _ in rows]), features, theta, v)


def entropy_logprob(w: World, theta: Tensor) -> tuple[Tensor, Tensor]:
    """H and S, [M, T], for parameters theta."""
    W1, W2 = theta[: HIDDEN * FEATURES].view(HIDDEN, -1), theta[HIDDEN * FEATURES :].view(V, HIDDEN)
    logp = torch.log_softmax(torch.tanh(w.features @ W1.T) @ W2.T, -1)
    return -(logp.exp() * logp).sum(-1), logp.gather(-1, w.tokens[..., None])[..., 0]


def along(function, eta: float) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """A function of η with its first and second derivative at eta."""
    one = torch.ones((), dtype=torch.float64)

    def first(x: Tensor):
        return jvp(function, (x,), (one,))

    (value, d), (_, d2) = jvp(first, (torch.tensor(eta, dtype=torch.float64),), (one,))
    return tuple([x.numpy() for x in xs] for xs in (value, d, d2))


@lru_cache(maxsize=64)
def at(eta: float) -> tuple[TokenValues, TokenTangents, TokenCurvature]:
    """Values and derivatives of every token at θ + ηv; NaN outside the mask, which nothing may touch."""
    w = world()
    orders = along(lambda x: entropy_logprob(w, w.theta + x * w.v), eta)
    H, S = ([np.where(w.mask, order[i], np.nan) for order in orders] for i in (0, 1))
    return TokenValues(H[0], S[0]), TokenTangents(H[1], S[1]), TokenCurvature(H[2], S[2])


@lru_cache(maxsize=1)
def probabilities() -> np.ndarray:
    """P(prompt) P(response | prompt) at θ, [M]; sums to 1."""
    S = at(0.0)[0].logprob
    return np.exp(np.nansum(S, axis=1)) / PROMPTS


@lru_cache(maxsize=64)
def population(per: str, estimator: str, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact (E[N], E[N]', E[N]'') and the same of D: expectations under the policy at θ + ηv itself, no weights.

    For path the responses stay those of θ.
    """
    w = world()
    mask = torch.tensor(w.mask)

    def expectations(x: Tensor) -> tuple[Tensor, Tensor]:
        H, S = entropy_logprob(w, w.theta + x * w.v)
        drawn = entropy_logprob(w, w.theta)[1] if estimator == "path" else S
        p = torch.where(mask, drawn, 0.0).sum(1).exp() / PROMPTS
        length = mask.sum(1).double() if per == "token" else torch.ones(len(p), dtype=torch.float64)
        return (p * torch.where(mask, H, 0.0).sum(1)).sum(), (p * length).sum()

    value, d, d2 = along(expectations, eta)
    return np.array([value[0], d[0], d2[0]]), np.array([value[1], d[1], d2[1]])


def ratio_derivatives(N: np.ndarray, D: np.ndarray) -> tuple[float, float, float]:
    """h, h', h'' of N/D by Leibniz on N = hD."""
    h = N[0] / D[0]
    h1 = (N[1] - h * D[1]) / D[0]
    return h, h1, (N[2] - 2 * h1 * D[1] - h * D[2]) / D[0]


class Batch(NamedTuple):
    """Rows of the world drawn at θ: `group` responses to each of B prompts."""

    rows: np.ndarray  # [N]
    prompt_index: np.ndarray  # [N]
    mask: np.ndarray

    def at(self, eta: float):
        return tuple(type(x)(*(a[self.rows] for a in x)) for x in at(eta))


def draw(B: int, group: int, seed: int) -> Batch:
    rows = draw_rows(np.random.default_rng(seed), B, group).reshape(-1)
    return Batch(rows, np.repeat(np.arange(B), group), world().mask[rows])


def draw_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Row numbers of the world, the last axis being responses to one and the same prompt."""
    w, p = world(), probabilities()
    per_prompt = len(p) // PROMPTS
    cdf = np.cumsum(p.reshape(PROMPTS, per_prompt) * PROMPTS, axis=1)
    prompt = rng.integers(PROMPTS, size=shape[:-1])
    u = rng.random(shape)
    response = (u[..., None] > cdf[prompt][..., None, :-1]).sum(-1)
    assert (np.diff(w.prompt) >= 0).all()
    return prompt[..., None] * per_prompt + response
