r"""Derivatives of entropy and logprob along a direction v, and gradients of what is estimated from them.

    tangents   S' = ∇S·v, H' = ∇H·v             one forward-mode pass
    curvature  S'' = vᵀ∇²S v, H'' = vᵀ∇²H v     forward over forward
    gradient   Σ q∇H + g∇S                      one backward pass, whatever the weights q and g
    hvp        its derivative along v           forward over reverse

Every function works one micro-batch at a time; nothing here needs a gradient per sample. Where a run is split over ranks
(`distributed.joined`), micro-batches are dealt out to them and every rank has the whole result. The weights q and g of an estimator come
from `stats.coefficients` (docs/theory.md, sections 6 and 7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_kernels import distributed, stats
from entropy_kernels.policy import MicroBatch, Parameters, Policy, TokenBatch, check_direction, micro_batches

_func: Any = torch.func  # its type stubs do not know that has_aux decides how many results there are
Progress = Callable[[int], Any]  # called with the number of sequences just finished
# Results of micro-batches by their number: what is there is not computed again, what is computed is put there. A sum over
# micro-batches puts the sum so far, which goes on changing: a mapping that keeps tensors copies them.
Parts = MutableMapping[int, tuple[Tensor, ...]]


class TokenStats(NamedTuple):
    """Per response token, [N, T], in nats; 0 outside the response. Column t is about input_ids[:, t] given those before."""

    entropy: Tensor
    logprob: Tensor


class TokenTangents(NamedTuple):
    """TokenStats and their first derivatives along the direction, [N, T], nats per unit of learning rate."""

    entropy: Tensor
    logprob: Tensor
    d_entropy: Tensor
    d_logprob: Tensor


class TokenCurvature(NamedTuple):
    """TokenTangents and the second derivatives along the direction, [N, T]."""

    entropy: Tensor
    logprob: Tensor
    d_entropy: Tensor
    d_logprob: Tensor
    d2_entropy: Tensor
    d2_logprob: Tensor


class TokenSupport(NamedTuple):
    """What a truncated policy keeps at every response token, [N, T], nats, 0 outside the response (`policy.SupportRows`)."""

    entropy: Tensor
    logprob: Tensor
    full_entropy: Tensor
    kept_mass: Tensor
    kept_count: Tensor
    moved: Tensor  # 1 where the parameters, asked by themselves, would keep another set
    at_edge: Tensor  # 1 where the token belongs to the set by a rounding error


def token_stats(
    policy: Policy, batch: TokenBatch, *, progress: Progress | None = None, parts: Parts | None = None
) -> TokenStats:
    """H and S of every response token: one forward pass.

    Args:
        policy: the model and its parameters.
        batch: sequences, [N, T].
        progress: called after each micro-batch with its number of sequences.
        parts: micro-batches that are finished already; new ones are added.

    Returns:
        TokenStats, [N, T], in the policy's dtype.

    Raises:
        UserError: a batch without responses where they should be.
    """

    def values(micro: MicroBatch) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return policy.rows(policy.params, micro)

    return TokenStats(*_on_grid(policy, batch, values, 2, progress, parts))


def token_support(
    policy: Policy, batch: TokenBatch, *, progress: Progress | None = None, parts: Parts | None = None
) -> TokenSupport:
    """H and S of every response token under a truncated policy, the sets it keeps, and the full entropy: two forward passes.

    At θ + ηv (`Policy.shifted`) the sets are those kept at θ, and `moved` says where they would be others.

    Args and errors are those of `token_stats`.

    Returns:
        TokenSupport, [N, T], in the policy's dtype.
    """
    return TokenSupport(*_on_grid(policy, batch, policy.support, 7, progress, parts))


def token_tangents(
    policy: Policy,
    batch: TokenBatch,
    direction: Parameters,
    *,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> TokenTangents:
    """H, S and H' = ∇H·v, S' = ∇S·v of every response token: one forward-mode pass, about three forward passes.

    Args:
        policy: the model and its parameters θ.
        batch: sequences, [N, T].
        direction: v by parameter name, shapes and dtypes of the parameters.
        progress: called after each micro-batch with its number of sequences.
        parts: micro-batches that are finished already; new ones are added.

    Returns:
        TokenTangents, [N, T], in the policy's dtype.

    Raises:
        UserError: a direction or batch that does not fit.
    """
    check_direction(policy, direction)
    direction = {name: direction[name] for name in policy.params}  # torch.func compares the order, too

    def values(micro: MicroBatch) -> tuple[Tensor, ...]:
        primal, tangent = _func.jvp(lambda p: policy.rows(p, micro), (policy.params,), (direction,))
        return *primal, *tangent

    return TokenTangents(*_on_grid(policy, batch, values, 4, progress, parts))


def token_curvature(
    policy: Policy,
    batch: TokenBatch,
    direction: Parameters,
    *,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> TokenCurvature:
    """H, S with first and second derivatives along v: forward over forward, about nine forward passes.

    Args and errors are those of `token_tangents`.

    Returns:
        TokenCurvature, [N, T], in the policy's dtype; d2 is the second derivative of H(θ + ηv) and S(θ + ηv) in η.
    """
    check_direction(policy, direction)
    direction = {name: direction[name] for name in policy.params}  # torch.func compares the order, too

    def values(micro: MicroBatch) -> tuple[Tensor, ...]:
        def first(params: Parameters) -> tuple[Tensor, ...]:
            primal, tangent = _func.jvp(lambda p: policy.rows(p, micro), (params,), (direction,))
            return *primal, *tangent

        lower, upper = _func.jvp(first, (policy.params,), (direction,))
        return *lower, *upper[2:]

    return TokenCurvature(*_on_grid(policy, batch, values, 6, progress, parts))


def token_gradient(
    policy: Policy,
    batch: TokenBatch,
    *,
    entropy_weight: Tensor | None = None,
    logprob_weight: Tensor | None = None,
    progress: Progress | None = None,
    parts: Parts | None = None,
) -> Parameters:
    """Σ_ik (q_ik ∇H_ik + g_ik ∇S_ik): one backward pass with the weights as cotangents.

    Args:
        policy: the model and its parameters.
        batch: sequences, [N, T].
        entropy_weight: q [N, T], or None for zero.
        logprob_weight: g [N, T], or None for zero. The gradient of a policy-gradient loss has g = −ω·A.
        progress: called after each micro-batch with its number of sequences.
        parts: the sum over the micro-batches that are finished already; new sums are added.

    Returns:
        The gradient by parameter name, in the policy's dtype.

    Raises:
        UserError: a batch that does not fit.
    """

    def part(micro: MicroBatch) -> Parameters:
        weights = tuple(_at(micro, w, policy) for w in (entropy_weight, logprob_weight))
        return _pulled_back(policy, micro, policy.params, weights)

    return _summed(policy, batch, part, progress, parts)


def entropy_gradient(
    policy: Policy,
    batch: TokenBatch,
    *,
    per: stats.Per = "token",
    estimator: stats.EstimatorKind = "per_decision",
    baseline: Tensor | None = None,
    progress: Progress | None = None,
) -> Parameters:
    """∇ĥ: the gradient of the entropy estimator at η = 0, score part included, so that ĥ'(0) = ∇ĥ·v for every v.

    Per decision and per token, with T_tot the number of response tokens and h = ΣH/T_tot:
        ∇ĥ = (1/T_tot) Σ_ik [∇H_ik + Σ_{k'>k}(H_ik' − h) ∇S_ik].
    One forward pass for the weights, one backward pass (docs/theory.md, section 6).

    Args:
        policy: the model and its parameters.
        batch: samples drawn from the policy at these parameters, [N, T].
        per: "token" for nats per token, "sequence" for nats per sequence.
        estimator: "per_decision", "whole_sequence", or "path" (the path part alone, without scores).
        baseline: b [N, T], taken from the weight of each token's score, as `stats.baseline` makes it; None for 0.
        progress: called after each micro-batch of each pass with its number of sequences.

    Returns:
        The gradient by parameter name.

    Raises:
        UserError: an unknown `per` or `estimator`, or a batch that does not fit.
    """
    values = token_stats(policy, batch, progress=progress)
    q, g = stats.token_cotangents(
        stats.TokenValues(_array(values.entropy), _array(values.logprob)),
        _array(batch.response_mask),
        per=per,
        estimator=estimator,
        baseline=None if baseline is None else _array(baseline),
    )
    return token_gradient(
        policy, batch, entropy_weight=_tensor(q), logprob_weight=_tensor(g), progress=progress
    )


def hvp(
    policy: Policy,
    batch: TokenBatch,
    direction: Parameters,
    *,
    per: stats.Per = "token",
    estimator: stats.EstimatorKind = "per_decision",
    baseline: Tensor | None = None,
    progress: Progress | None = None,
) -> Parameters:
    """∇²ĥ·v of the same estimator at η = 0, so that vᵀ∇²ĥ v = ĥ''(0): forward over reverse.

    The weights of the gradient move along v as well: their tangents come from H' and S' of a first forward-mode pass.

    Args and errors are those of `entropy_gradient` and `token_tangents`.

    Returns:
        The Hessian-vector product by parameter name.
    """
    first = token_tangents(policy, batch, direction, progress=progress)
    direction = {name: direction[name] for name in policy.params}
    values = stats.TokenValues(_array(first.entropy), _array(first.logprob))
    tangents = stats.TokenTangents(_array(first.d_entropy), _array(first.d_logprob))
    mask = _array(batch.response_mask)
    b = None if baseline is None else _array(baseline)
    q, g = stats.token_cotangents(values, mask, per=per, estimator=estimator, baseline=b)
    dq, dg = stats.token_cotangent_tangents(values, tangents, mask, per=per, estimator=estimator, baseline=b)

    def part(micro: MicroBatch) -> Parameters:
        weights = tuple(_at(micro, _tensor(w), policy) for w in (q, g))
        weight_tangents = tuple(_at(micro, _tensor(w), policy) for w in (dq, dg))
        _, product = _func.jvp(
            lambda params, weights: _pulled_back(policy, micro, params, weights),
            (policy.params, weights),
            (direction, weight_tangents),
        )
        return product

    return _summed(policy, batch, part, progress)


def _pulled_back(
    policy: Policy, micro: MicroBatch, params: Parameters, weights: tuple[Tensor, ...]
) -> Parameters:
    """Σ (q∇H + g∇S) over a micro-batch, as a function of the parameters and of the weights (q, g)."""
    _, pullback = _func.vjp(lambda p: policy.rows(p, micro), params)
    return pullback(weights)[0]


def _summed(
    policy: Policy,
    batch: TokenBatch,
    part: Callable[[MicroBatch], Parameters],
    progress: Progress | None,
    parts: Parts | None = None,
) -> Parameters:
    done = distributed.of_first(lambda: -1 if parts is None else max(parts, default=-1))
    total = {name: torch.zeros_like(p) for name, p in policy.params.items()}
    if done >= 0:
        kept = distributed.tensors_of_first(
            lambda: None if parts is None else dict(zip(total, parts[done], strict=True))
        )
        assert kept is not None  # rank 0 has just named it
        total = {name: x.to(policy.device) for name, x in kept.items()}

    def missing() -> Iterator[tuple[int, MicroBatch]]:
        for number, micro in enumerate(micro_batches(policy, batch)):
            if number > done:
                yield number, micro
            else:
                _tick(progress, micro)

    def compute(item: tuple[int, MicroBatch]) -> tuple[Tensor, ...]:
        found = part(item[1])
        return tuple(found[name] for name in total)

    for (number, micro), found in distributed.dealt(missing(), compute):
        for name, x in zip(total, found, strict=True):
            total[name] += x
        if parts is not None:
            parts[number] = tuple(total.values())
        _tick(progress, micro)
    return total


def _on_grid(
    policy: Policy,
    batch: TokenBatch,
    values: Callable[[MicroBatch], tuple[Tensor, ...]],
    count: int,
    progress: Progress | None,
    parts: Parts | None = None,
) -> Iterator[Tensor]:
    grids = [torch.zeros(batch.input_ids.shape, dtype=policy.dtype) for _ in range(count)]
    known = distributed.of_first(lambda: {} if parts is None else dict(parts.items()))

    def put(micro: MicroBatch, found: tuple[Tensor, ...]) -> None:
        for grid, rows in zip(grids, found, strict=True):
            grid[micro.destination] = rows
        _tick(progress, micro)

    def missing() -> Iterator[tuple[int, MicroBatch]]:
        for number, micro in enumerate(micro_batches(policy, batch)):
            if number in known:
                put(micro, known[number])
            else:
                yield number, micro

    def compute(item: tuple[int, MicroBatch]) -> tuple[Tensor, ...]:
        return tuple(rows.detach().to("cpu", policy.dtype) for rows in values(item[1]))

    for (number, micro), received in distributed.dealt(missing(), compute):
        found = tuple(received)
        if parts is not None:
            parts[number] = found
        put(micro, found)
    return iter(grids)


def _at(micro: MicroBatch, weight: Tensor | None, policy: Policy) -> Tensor:
    if weight is None:
        return torch.zeros(len(micro.targets), dtype=policy.dtype, device=policy.device)
    return weight.cpu()[micro.destination].to(policy.device, policy.dtype)


def _tick(progress: Progress | None, micro: MicroBatch) -> None:
    if progress is not None:
        progress(len(micro.input_ids))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))
